"""Validation during training: COCO AP of the weights that export would take, with losses and some pictures.

Everything comes from the forward passes that AP needs: `torch_run` passes the network's outputs on, so nothing is
computed twice. The losses are those of training, on whole pictures without augmentation; each picture has the same
weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.candidates import CandidateDetector
from model.metadata import Label, ResizePolicy
from model.retinanet import LevelOutputs, RetinaNet
from model.types import CanvasImage, Detections, Pixels
from training.coco import CocoDataSet, Target
from training.config import LossConfig, TrainConfig
from training.distributed import Ranks
from training.evaluate import evaluate, torch_predictor
from training.evaluation.average_precision import ApReport
from training.loss.losses import retinanet_losses
from training.transforms import TensorTarget

SHOWN_PICTURES = 12


@dataclass(frozen=True, eq=False)
class ShownPicture:
    """A picture with its objects and detections, in its pixels."""

    index: int
    """Index in the data set."""
    name: str
    pixels: Pixels
    target: Target
    target_ids: NDArray[np.int64]
    """[objects] category ids, like the detections' labels."""
    detections: Detections


@dataclass(frozen=True)
class PictureLosses:
    classification: float
    box: float


@dataclass(frozen=True, eq=False)
class Validation:
    """The result of one validation."""

    ap: ApReport
    losses: Sequence[PictureLosses]
    """Losses of each picture, in any order."""
    pictures: Sequence[ShownPicture]

    @property
    def mean_losses(self) -> PictureLosses:
        """Mean losses over the pictures; NaN if there were none."""
        if not self.losses:
            return PictureLosses(float("nan"), float("nan"))
        values = np.array([(losses.classification, losses.box) for losses in self.losses])
        return PictureLosses(*values.mean(axis=0).tolist())


def validate(
    network: RetinaNet,
    labels: tuple[Label, ...],
    data_set: CocoDataSet,
    config: TrainConfig,
    *,
    limit: int,
    ranks: Ranks,
) -> Validation:
    """Evaluate the network, whose columns are `labels`, on the first `limit` pictures (0: all).

    Every rank evaluates a share of them and gets the whole result.
    """
    detector = CandidateDetector(network, labels).to(next(network.parameters()).device).eval()
    count = min(len(data_set), limit or len(data_set))
    shown = frozenset(np.linspace(0, count - 1, SHOWN_PICTURES).astype(int).tolist())
    collector = _Collector(network, labels, data_set, config.resize, config.loss, shown)
    report = evaluate(
        torch_predictor(detector, labels, config.resize, config.detection, on_outputs=collector.take_outputs),
        data_set,
        limit=limit,
        skip_unreadable=config.unreadable == "skip",
        ranks=ranks,
        on_picture=collector.take_picture,
    )
    pictures = sorted(ranks.gather(collector.pictures), key=lambda picture: picture.index)
    return Validation(report, ranks.gather(collector.losses), pictures)


@dataclass
class _Collector:
    """Collects the losses of this rank's pictures, and those of its pictures that the report shows."""

    network: RetinaNet
    labels: Sequence[Label]
    data_set: CocoDataSet
    resize: ResizePolicy
    loss: LossConfig
    shown: frozenset[int]
    losses: list[PictureLosses] = field(default_factory=list)
    pictures: list[ShownPicture] = field(default_factory=list)

    def take_outputs(self, outputs: LevelOutputs, canvas: CanvasImage) -> None:
        """Keep the network's outputs for the picture whose detections come next."""
        self._outputs, self._canvas = outputs, canvas

    def take_picture(self, index: int, pixels: Pixels, detections: Detections) -> None:
        picture, labels = self.data_set.pictures[index], self.data_set.labels
        target = picture.target.on_canvas(picture.size, self.resize)
        columns = np.array([self.labels.index(label) for label in labels])[target.columns]
        self.losses.append(self._losses_of(TensorTarget.of(replace(target, columns=columns))))
        if index in self.shown:
            ids = np.array([label.class_id for label in labels])[target.columns]
            self.pictures.append(ShownPicture(index, picture.file.name, pixels, picture.target, ids, detections))

    @torch.inference_mode()
    def _losses_of(self, target: TensorTarget) -> PictureLosses:
        """Compute a picture's losses. `target` has canvas pixels and the network's columns."""
        anchors, predictions = self.network.anchors_of(self._canvas.canvas_size), self.network.flatten(self._outputs)
        target = target.to(anchors.device, anchors.dtype)
        losses = retinanet_losses(predictions, anchors, [target], self.loss, sizes=[self._canvas.size])
        return PictureLosses(losses.classification.item(), losses.box.item())
