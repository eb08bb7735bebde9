"""Validation while training: COCO AP of the weights that export would take, with losses and some pictures.

All comes out of the very forward passes that AP needs: `torch_run` hands the network's outputs on, and nothing is
computed twice. The losses are those of training, on whole pictures and without augmentation; each picture counts the
same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
from training.evaluate import ApReport, evaluate, torch_predictor
from training.losses import retinanet_losses
from training.transforms import TensorTarget

SHOWN_PICTURES = 12


@dataclass(frozen=True, eq=False)
class ShownPicture:
    """A picture with what is there and what was found, in its pixels."""

    index: int
    """In the data set."""
    name: str
    pixels: Pixels
    target: Target
    target_ids: NDArray[np.int64]
    """[objects] category ids, as the detections' labels."""
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
    """Those of each picture, in any order."""
    pictures: Sequence[ShownPicture]

    @property
    def mean_losses(self) -> PictureLosses:
        """The mean over the pictures; NaN if there were none."""
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

    Every rank looks at a share of them and gets the whole result.
    """
    detector = CandidateDetector(network, labels).to(next(network.parameters()).device).eval()
    collector = _Collector(network, labels, data_set, config.resize, config.loss, limit)
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


class _Collector:
    """The losses of all pictures of this rank, and SHOWN_PICTURES of all pictures."""

    def __init__(
        self,
        network: RetinaNet,
        labels: Sequence[Label],
        data_set: CocoDataSet,
        resize: ResizePolicy,
        loss: LossConfig,
        limit: int,
    ) -> None:
        self._network, self._data_set, self._resize, self._loss = network, data_set, resize, loss
        self._columns = np.array([labels.index(label) for label in data_set.labels])
        self._ids = np.array([label.class_id for label in data_set.labels])
        count = min(len(data_set), limit or len(data_set))
        self._shown = set(np.linspace(0, count - 1, SHOWN_PICTURES).astype(int).tolist())
        self.losses: list[PictureLosses] = []
        self.pictures: list[ShownPicture] = []

    def take_outputs(self, outputs: LevelOutputs, canvas: CanvasImage) -> None:
        """Keep the network's answer for the picture that is told of next."""
        self._outputs, self._canvas = outputs, canvas

    def take_picture(self, index: int, pixels: Pixels, detections: Detections) -> None:
        picture = self._data_set.pictures[index]
        self.losses.append(self._losses_of(picture.target.on_canvas(picture.size, self._resize)))
        if index in self._shown:
            ids = self._ids[picture.target.columns]
            self.pictures.append(ShownPicture(index, picture.file.name, pixels, picture.target, ids, detections))

    @torch.inference_mode()
    def _losses_of(self, target: Target) -> PictureLosses:
        """`target`: canvas pixels, the data set's columns."""
        anchors = self._network.anchors_of(self._canvas.canvas_size)
        columns = self._columns[target.columns]
        losses = retinanet_losses(
            self._network.flatten(self._outputs),
            anchors,
            [TensorTarget.of(Target(target.boxes, columns, target.ignored)).to(anchors.device, anchors.dtype)],
            self._loss,
            sizes=[self._canvas.size],
        )
        return PictureLosses(losses.classification.item(), losses.box.item())
