"""RetinaNet's two losses: focal loss over all anchors and classes, and a box loss over the positive anchors.

Both are sums divided by the number of positive anchors (of each image, then averaged; or of the whole batch), so
their scale does not depend on the number of easy background anchors. Source: Lin et al. 2017 (Focal Loss) §3 and
§4.1; GIoU: Rezatofighi 2019.
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
from training.matcher import BACKGROUND, IGNORED, match
from training.transforms import TensorTarget


@dataclass(frozen=True, eq=False)
class Losses:
    classification: Tensor
    box: Tensor
    """Already times its weight."""

    @property
    def total(self) -> Tensor:
        return self.classification + self.box


def retinanet_losses(
    predictions: Predictions, anchors: Tensor, targets: Sequence[TensorTarget], config: LossConfig
) -> Losses:
    """predictions [N, A, …] and the anchors [A, 4] of the batch's canvas, against each image's target."""
    matches = torch.stack(
        [
            match(
                anchors,
                target.boxes,
                target.ignored,
                fg_iou_threshold=config.fg_iou_threshold,
                bg_iou_threshold=config.bg_iou_threshold,
            )
            for target in targets
        ]
    )
    positives = (matches >= 0).sum(dim=1)
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
    return Losses(
        _normalise(classification, positives, config), config.box_loss_weight * _normalise(box, positives, config)
    )


def focal_loss(logits: Tensor, truth: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of each logit, not reduced (paper eq. 5).

    logits  [...]
    truth   [...]  1 for foreground, 0 for background
    FL = -alpha_t (1 - p_t)**gamma log(p_t); p_t = p, alpha_t = alpha for foreground, 1 - p, 1 - alpha for background.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = torch.sigmoid(logits)
    missed = probability + truth - 2 * probability * truth
    alpha_t = 1 - alpha + (2 * alpha - 1) * truth
    return alpha_t * missed**gamma * cross_entropy


def _classification_loss(logits: Tensor, matches: Tensor, columns: Tensor, config: LossConfig) -> Tensor:
    """Sum over one image's anchors [A, K] that are not ignored."""
    truth = torch.zeros_like(logits)
    positive = (matches >= 0).nonzero().squeeze(1)
    truth[positive, columns[matches[positive]]] = 1
    loss = focal_loss(logits, truth, alpha=config.focal_alpha, gamma=config.focal_gamma).sum(dim=1)
    return loss.masked_fill(matches == IGNORED, 0).sum()


def _box_loss(deltas: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, config: LossConfig) -> Tensor:
    """Sum over one image's positive anchors [A, 4]."""
    positive = (matches > BACKGROUND).nonzero().squeeze(1)
    deltas, anchors, boxes = deltas[positive], anchors[positive], boxes[matches[positive]]
    if config.box_loss == "giou":
        loss: Tensor = generalized_box_iou_loss(decode_boxes(deltas, anchors), boxes, reduction="sum")
        return loss
    beta = config.smooth_l1_beta if config.box_loss == "smooth_l1" else 0.0
    return F.smooth_l1_loss(deltas, encode_boxes(boxes, anchors), beta=beta, reduction="sum")


def _normalise(sums: Tensor, positives: Tensor, config: LossConfig) -> Tensor:
    if config.normaliser == "batch":
        return sums.sum() / positives.sum().clamp(min=1)
    return (sums / positives.clamp(min=1)).mean()
