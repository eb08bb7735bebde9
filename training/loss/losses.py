"""RetinaNet's two losses: focal loss over all anchors and classes, and a box loss over the positive anchors.

Anchors are matched to objects first (`match_batch`), which needs no prediction. So the divisors of the losses
(`loss_divisors`) are known for the whole step, over all parts and ranks, before the network runs. They count positive
anchors (of each image, then averaged; or of the whole step), so the losses' scale does not depend on the number of easy
background anchors. With `sampled_anchors` only some anchors count, as in the region proposal network; each step samples
them anew, by its seed.

Sources: Lin et al. 2017 (Focal Loss) §3, §4.1 and eq. 5; GIoU: Rezatofighi 2019; sampling: Ren et al. 2015 (Faster
R-CNN) §3.1.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from model.anchors import decode_boxes, encode_boxes
from model.retinanet import Predictions
from training.config import LossConfig, Normaliser
from training.distributed import ALONE, Ranks
from training.loss.matcher import BACKGROUND, IGNORED, draw_anchors, match, match_inside
from training.transforms import TensorTarget

EXACT_UNTIL = 40.0
"""Value from which softplus(x) equals x, in float64 too."""
RUNNING_MEAN_KEEPS = 0.9
"""Weight of earlier steps in the mean number of positives, with `normaliser="running"` (detectron2's)."""


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a batch or of a part of one; those of all parts and ranks add up to the step's."""

    classification: Tensor
    box: Tensor
    """The box loss, with its weight applied."""

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
    """Match a whole batch and compute its losses; for the arguments see `match_batch` and `matched_losses`."""
    matches = match_batch(anchors, targets, config, sizes=sizes, seed=seed)
    return matched_losses(predictions, anchors, targets, matches, loss_divisors(matches, config.normaliser), config)


def match_batch(
    anchors: Tensor,
    targets: Sequence[TensorTarget],
    config: LossConfig,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> Tensor:
    """Match the anchors [A, 4] of a canvas to each image's objects.

    sizes    (height, width) of each image on the canvas; needed with `border_anchors="ignored"`
    seed     of the sampled anchors, with `sampled_anchors`
    returns  int64 [N, A]: the object of each anchor, BACKGROUND or IGNORED
    """
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


def loss_divisors(
    matches: Tensor, normaliser: Normaliser, *, ranks: Ranks = ALONE, mean_positives: float | None = None
) -> Tensor:
    """Compute the divisor of each image's losses: float64 [N], at least 1.

    matches         int64 [N, A], this rank's images of the step
    mean_positives  mean of earlier steps, with "running"; None: there were none
    """
    counts = (matches != IGNORED if normaliser == "anchors" else matches >= 0).sum(dim=1, dtype=torch.float64)
    if normaliser == "image":
        return counts.clamp(min=1) * ranks.sum(counts.new_tensor(len(counts)))
    total = ranks.sum(counts.sum()).clamp(min=1)
    if normaliser == "running" and mean_positives is not None:
        total = RUNNING_MEAN_KEEPS * mean_positives + (1 - RUNNING_MEAN_KEEPS) * total
    return total.expand(len(counts))


def matched_losses(
    predictions: Predictions,
    anchors: Tensor,
    targets: Sequence[TensorTarget],
    matches: Tensor,
    divisors: Tensor,
    config: LossConfig,
) -> Losses:
    """Compute the losses of images [N, A, …] whose anchors [A, 4] are matched.

    matches   int64 [N, A], as `match_batch` returns them
    divisors  [N], as `loss_divisors` returns them
    """
    classification, box = [], []
    images = zip(predictions.cls_logits, predictions.bbox_regression, targets, matches, strict=True)
    for logits, deltas, target, matched in images:
        rows = (matched > BACKGROUND).nonzero().squeeze(1)
        objects = matched[rows]
        positive = rows, target.columns[objects]
        classification.append(
            focal_loss_sum(logits, positive, matched == IGNORED, alpha=config.focal_alpha, gamma=config.focal_gamma)
        )
        box.append(_box_loss_sum(deltas[rows], anchors[rows], target.boxes[objects], config))
    return Losses(
        (torch.stack(classification) / divisors).sum(), config.box_loss_weight * (torch.stack(box) / divisors).sum()
    )


def _box_loss_sum(deltas: Tensor, anchors: Tensor, boxes: Tensor, config: LossConfig) -> Tensor:
    """Sum the box loss over one image's positive anchors: deltas, anchors and objects' boxes, [P, 4] each."""
    if config.box_loss == "giou":
        loss: Tensor = generalized_box_iou_loss(decode_boxes(deltas, anchors), boxes, reduction="sum")
        return loss
    beta = config.smooth_l1_beta if config.box_loss == "smooth_l1" else 0.0
    return F.smooth_l1_loss(deltas, encode_boxes(boxes, anchors), beta=beta, reduction="sum")


def focal_loss_sum(
    logits: Tensor, positive: tuple[Tensor, Tensor], ignored: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Sum FL = -alpha_t (1 - p_t)**gamma log(p_t) over the (anchor, class) pairs of one image.

    logits    [A, K]
    positive  int64 [P] each: row and column of the pairs that are foreground, each pair once
    ignored   bool [A]: rows that do not count; none of them is positive
    p_t = p, alpha_t = alpha for foreground; 1 - p, 1 - alpha for background.
    alpha below 0: alpha_t is 1, as in torchvision; with gamma 0 that is plain cross-entropy.
    """
    loss: Tensor = _FocalLossSum.apply(logits, *positive, ignored, alpha, gamma)
    return loss


class _FocalLossSum(torch.autograd.Function):
    """The focal loss sum, with its gradient in the same pass.

    Nearly all of the millions of pairs are background. Every pair is computed as background, without a tensor of
    truths, and the few positive ones are corrected. Autograd would keep ten tensors of the logits' size for the
    backward pass; this keeps one.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Tensor, columns: Tensor, ignored: Tensor, alpha: float, gamma: float
    ) -> Tensor:
        of_foreground, of_background = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
        loss, gradient = _loss_and_slope(logits, of_background * (~ignored[:, None]).to(logits.dtype), gamma)
        chosen = logits[rows, columns]
        as_background, _ = _loss_and_slope(chosen, torch.full_like(chosen, of_background), gamma)
        as_foreground, slope = _loss_and_slope(-chosen, torch.full_like(chosen, of_foreground), gamma)
        gradient[rows, columns] = -slope
        ctx.save_for_backward(gradient)
        return loss - as_background + as_foreground

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None, None, None


def _loss_and_slope(logits: Tensor, weights: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sum weight * m**gamma * -log(1 - m) over background pairs, m = sigmoid(logit); return the sum and each slope."""
    missed = logits.sigmoid()
    cross_entropy = F.softplus(logits, threshold=EXACT_UNTIL)
    focus = (missed**gamma).mul_(weights)
    loss = torch.dot(focus.flatten(), cross_entropy.flatten())
    slope = cross_entropy.mul_(1 - missed).mul_(gamma).add_(missed).mul_(focus)
    return loss, slope
