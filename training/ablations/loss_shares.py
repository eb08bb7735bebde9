"""The shares of easy and hard examples in the loss: the focal loss paper's figure 4, on a model of ours.

An example is one (anchor, class) pair that counts. The examples' losses of a trained model are sorted and summed,
foreground and background separately, so alpha, which is constant within each kind, has no effect.
Source: Lin et al. 2017 §5.1 "Analysis of the Focal Loss".
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.candidates import CandidateDetector
from model.image import to_canvas
from model.metadata import ResizePolicy
from training.coco import CocoDataSet
from training.config import LossConfig
from training.loss.losses import EXACT_UNTIL, match_batch
from training.loss.matcher import IGNORED
from training.transforms import TensorTarget


@dataclass(frozen=True, eq=False)
class Examples:
    """Logits [examples] of a model on a data set."""

    foreground: Tensor
    background: Tensor


@torch.inference_mode()
def examples(
    detector: CandidateDetector, data_set: CocoDataSet, resize: ResizePolicy, loss: LossConfig, *, limit: int
) -> Examples:
    """Collect the examples of the first `limit` pictures, on their canvases; the loss says how anchors are matched."""
    foreground, background = [], []
    for index, picture in enumerate(data_set.pictures[:limit]):
        canvas = to_canvas(data_set.read(index), resize)
        target = TensorTarget.of(picture.target.on_canvas(picture.size, resize))
        outputs = detector.outputs(torch.from_numpy(canvas.pixels[None]), torch.tensor([canvas.size]))
        anchors = detector.network.anchors_of(canvas.canvas_size)
        [matches] = match_batch(anchors, [target], loss, sizes=[canvas.size])
        [logits] = detector.network.flatten(outputs).cls_logits
        truth = torch.zeros_like(logits, dtype=torch.bool)
        positive = (matches >= 0).nonzero().squeeze(1)
        truth[positive, target.columns[matches[positive]]] = True
        counted = (matches != IGNORED)[:, None].expand_as(truth)
        foreground.append(logits[truth & counted])
        background.append(logits[~truth & counted])
    return Examples(torch.cat(foreground), torch.cat(background))


def loss_of_each(logits: Tensor, *, foreground: bool, gamma: float) -> Tensor:
    """Compute the focal loss of each example [examples], without alpha; float64, because millions are summed."""
    wrong = (-logits if foreground else logits).double()
    return wrong.sigmoid() ** gamma * F.softplus(wrong, threshold=EXACT_UNTIL)


def cumulative_share(losses: Tensor) -> Tensor:
    """Compute the share of the loss in the easiest 1, 2, … examples: ascending, [examples], the last is 1."""
    summed = losses.sort().values.cumsum(0)
    return summed / summed[-1]


def share_of_hardest(shares: Tensor, fraction: float) -> float:
    """Compute the share of the loss in the hardest `fraction` of all examples."""
    easier = len(shares) - max(1, round(fraction * len(shares)))
    return 1 - (float(shares[easier - 1]) if easier else 0.0)
