"""The focal loss of one image's logits, summed, with its gradient in the same pass.

Nearly all of the pairs (anchor, class) are background, and there are millions: every pair is computed as background,
without a tensor of truths, and the few positive ones are put right. Written out, autograd would keep ten tensors of
the logits' size for the way back; this keeps one.

Source: Lin et al. 2017 (Focal Loss) eq. 5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_UNTIL = 40.0
"""Beyond it softplus(x) is x, in float64 too."""


def focal_loss_sum(
    logits: Tensor, positive: tuple[Tensor, Tensor], ignored: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Sum over the pairs of FL = -alpha_t (1 - p_t)**gamma log(p_t).

    logits    [A, K]
    positive  int64 [P] each: row and column of the pairs that are foreground, each pair once
    ignored   bool [A]: rows that add nothing; none of them positive
    p_t = p, alpha_t = alpha for foreground; 1 - p, 1 - alpha for background.
    alpha below 0: alpha_t is 1, as torchvision has it; with gamma 0 that is plain cross-entropy.
    """
    loss: Tensor = _FocalLossSum.apply(logits, *positive, ignored, alpha, gamma)
    return loss


class _FocalLossSum(torch.autograd.Function):
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
    """Of background pairs, weight * m**gamma * -log(1 - m) for m = sigmoid(logit): the sum, and the slope of each."""
    missed = logits.sigmoid()
    cross_entropy = F.softplus(logits, threshold=EXACT_UNTIL)
    focus = (missed**gamma).mul_(weights)
    loss = torch.dot(focus.flatten(), cross_entropy.flatten())
    slope = cross_entropy.mul_(1 - missed).mul_(gamma).add_(missed).mul_(focus)
    return loss, slope
