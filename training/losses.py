"""RetinaNet's two losses: focal loss over all anchors and classes, and a box loss over the positive anchors.

Both are sums divided by the number of positive anchors (of each image, then averaged; or of the whole batch), so
their scale does not depend on the number of easy background anchors. With `sampled_anchors` only some anchors count,
as in the region proposal network: drawn anew in each step, by the step's seed. Source: Lin et al. 2017 (Focal Loss) §3
and §4.1; GIoU: Rezatofighi 2019; sampling: Ren et al. 2015 (Faster R-CNN) §3.1.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from model.anchors import decode_boxes, encode_boxes
from model.retinanet import Predictions
from training.config import LossConfig
from training.focal import focal_loss_sum
from training.matcher import BACKGROUND, IGNORED, draw_anchors, match, match_inside
from training.transforms import TensorTarget


@dataclass(frozen=True, eq=False)
class Losses:
    """Of a batch or of a part of one: the sums and the divisors of all parts add up to those of the batch."""

    classification_sum: Tensor
    box_sum: Tensor
    """Already times its weight."""
    divisor: Tensor
    """What both are divided by, where it is above 1: positive anchors (or all that count), or pictures (whose sums are
    divided by their own positives before)."""

    @property
    def classification(self) -> Tensor:
        return self.classification_sum / self.divisor.clamp(min=1)

    @property
    def box(self) -> Tensor:
        return self.box_sum / self.divisor.clamp(min=1)

    @property
    def total(self) -> Tensor:
        return self.classification + self.box


def retinanet_losses(
    predictions: Predictions,
    anchors: Tensor,
    targets: Sequence[TensorTarget],
    config: LossConfig,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> Losses:
    """predictions [N, A, …] and the anchors [A, 4] of the batch's canvas, against each image's target.

    sizes  (height, width) of each image on the canvas; needed with `border_anchors="ignored"`
    seed   of the anchors drawn with `sampled_anchors`; the same seed draws the same ones
    """
    matches = match_batch(anchors, targets, config, sizes=sizes, seed=seed)
    counted = matches != IGNORED if config.normaliser == "anchors" else matches >= 0
    positives = counted.sum(dim=1)
    classification = torch.stack(
        [
            _classification_loss(logits, matched, target.columns, config)
            for logits, matched, target in zip(predictions.cls_logits, matches, targets, strict=True)
        ]
    )
    box = torch.stack(
        [
            _box_loss(deltas, anchors, matched, target.boxes, config)
            for deltas, matched, target in zip(predictions.bbox_regression, matches, targets, strict=True)
        ]
    )
    if config.normaliser == "image":
        classification, box = classification / positives.clamp(min=1), box / positives.clamp(min=1)
        divisor = positives.new_tensor(len(positives))
    else:
        divisor = positives.sum()
    return Losses(classification.sum(), config.box_loss_weight * box.sum(), divisor)


def match_batch(
    anchors: Tensor,
    targets: Sequence[TensorTarget],
    config: LossConfig,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> Tensor:
    """Each image's matches [N, A]: the object of each anchor, BACKGROUND or IGNORED. sizes, seed: as above."""
    thresholds = {"fg_iou_threshold": config.fg_iou_threshold, "bg_iou_threshold": config.bg_iou_threshold}
    if config.border_anchors == "ignored":
        if sizes is None:
            raise ValueError('border_anchors "ignored" needs the sizes of the images')
        matches = [
            match_inside(anchors, target.boxes, target.ignored, size, **thresholds)
            for target, size in zip(targets, sizes, strict=True)
        ]
    else:
        matches = [match(anchors, target.boxes, target.ignored, **thresholds) for target in targets]
    if config.sampled_anchors:
        generator = torch.Generator().manual_seed(seed)
        most = int(config.sampled_anchors * config.sampled_positives)
        matches = [draw_anchors(each, config.sampled_anchors, most, generator) for each in matches]
    return torch.stack(matches)


def _classification_loss(logits: Tensor, matches: Tensor, columns: Tensor, config: LossConfig) -> Tensor:
    """Sum over one image's anchors [A, K] that are not ignored."""
    rows = (matches >= 0).nonzero().squeeze(1)
    positive = rows, columns[matches[rows]]
    return focal_loss_sum(logits, positive, matches == IGNORED, alpha=config.focal_alpha, gamma=config.focal_gamma)


def _box_loss(deltas: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, config: LossConfig) -> Tensor:
    """Sum over one image's positive anchors [A, 4]."""
    positive = (matches > BACKGROUND).nonzero().squeeze(1)
    deltas, anchors, boxes = deltas[positive], anchors[positive], boxes[matches[positive]]
    if config.box_loss == "giou":
        loss: Tensor = generalized_box_iou_loss(decode_boxes(deltas, anchors), boxes, reduction="sum")
        return loss
    beta = config.smooth_l1_beta if config.box_loss == "smooth_l1" else 0.0
    return F.smooth_l1_loss(deltas, encode_boxes(boxes, anchors), beta=beta, reduction="sum")
