"""What an evaluation shows beside its AP, out of the very forward passes that AP needs: losses, and some pictures.

An `EvaluationWatch` is called with each picture after the network has seen it; the network's raw answer reaches it by
a forward hook, so nothing is computed twice. Its losses are those of training, on whole pictures and without
augmentation; each picture counts the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.image import resized_size
from model.metadata import Label
from model.retinanet import LevelOutputs, RetinaNet
from model.types import Detections, Pixels
from training.coco import CocoDataSet, Target
from training.config import TrainConfig
from training.distributed import Ranks
from training.evaluate import ApReport
from training.losses import retinanet_losses
from training.transforms import TensorTarget

SHOWN_PICTURES = 12


@dataclass(frozen=True, eq=False)
class ShownPicture:
    """A picture with what is there and what was found. Its pixels."""

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
class Seen:
    """What an evaluation saw."""

    ap: ApReport
    losses: Sequence[PictureLosses]
    """Of each picture, in any order."""
    pictures: Sequence[ShownPicture]

    def gathered(self, ranks: Ranks) -> "Seen":
        """What all ranks saw, on every rank."""
        pictures = sorted(ranks.gather(self.pictures), key=lambda picture: picture.index)
        return Seen(self.ap, ranks.gather(self.losses), pictures)

    @property
    def mean_losses(self) -> PictureLosses:
        """Over the pictures; NaN if there were none."""
        if not self.losses:
            return PictureLosses(float("nan"), float("nan"))
        values = np.array([(losses.classification, losses.box) for losses in self.losses])
        return PictureLosses(*values.mean(axis=0).tolist())


class EvaluationWatch:
    """Looks at the pictures of one evaluation of `data_set`, of which SHOWN_PICTURES are kept to be shown."""

    def __init__(
        self,
        network: RetinaNet,
        labels: Sequence[Label],
        data_set: CocoDataSet,
        config: TrainConfig,
        *,
        limit: int = 0,
    ) -> None:
        """`labels`: the network's; `limit`: as `evaluate` has it."""
        self._network, self._data_set, self._config = network, data_set, config
        self._columns = np.array([labels.index(label) for label in data_set.labels])
        self._ids = np.array([label.class_id for label in data_set.labels])
        count = min(len(data_set), limit or len(data_set))
        self._shown = set(np.linspace(0, count - 1, SHOWN_PICTURES).astype(int).tolist())
        self._answer: tuple[LevelOutputs, tuple[int, int]] | None = None
        self.losses: list[PictureLosses] = []
        self.pictures: list[ShownPicture] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it is open, the network's answers are seen."""
        handle = self._network.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()
            self._answer = None

    def __call__(self, index: int, pixels: Pixels, detections: Detections) -> None:
        """The picture of that index has just gone through the network."""
        target = self._data_set.pictures[index].target
        self.losses.append(self._losses(self._data_set.pictures[index].size, target))
        if index in self._shown:
            name = self._data_set.pictures[index].file.name
            self.pictures.append(ShownPicture(index, name, pixels, target, self._ids[target.columns], detections))

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        self._answer = outputs, (inputs[0].shape[2], inputs[0].shape[3])

    @torch.inference_mode()
    def _losses(self, size: tuple[int, int], target: Target) -> PictureLosses:
        assert self._answer is not None, "a watch is called while `watching`, after the network has answered"
        outputs, canvas = self._answer
        height, width = resized_size(*size, self._config.resize)
        scale = np.array([width / size[1], height / size[0]] * 2, np.float32)
        scaled = TensorTarget(
            torch.from_numpy(target.boxes * scale),
            torch.from_numpy(self._columns[target.columns]),
            torch.from_numpy(target.ignored * scale),
        )
        anchors = torch.cat(self._network.anchors(canvas, outputs.grids))
        predictions = self._network.flatten(outputs)
        losses = retinanet_losses(
            predictions,
            anchors,
            [scaled.to(anchors.device, anchors.dtype)],
            self._config.loss,
            sizes=[(height, width)],
        )
        return PictureLosses(losses.classification.item(), losses.box.item())
