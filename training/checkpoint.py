"""Checkpoints: a dict that `torch.load(weights_only=True)` reads, written to a temporary name and renamed.

Keys: `model` (state dict on torchvision's names), `ema` (the averaged weights, or None), `config`, `labels`, `step`,
`ap`, `data_set`, and what resuming needs (`optimiser` and others). Evaluation and export use `ema` if there is one.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.candidates import CandidateDetector
from model.files import replacing
from model.metadata import Label, ModelMetadata, Precision
from model.retinanet import RetinaNet
from training.config import TrainConfig, from_dict, to_dict

log = logging.getLogger(__name__)
FORMAT = "retinaserve checkpoint 1"


class InvalidCheckpoint(ValueError):
    """The file is not a checkpoint of ours, or does not fit its use."""


class CheckpointNotWritten(OSError):
    """The disk is full, or the folder cannot be written; an older file of that name is unchanged."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    config: TrainConfig
    labels: tuple[Label, ...]
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None
    step: int = 0
    ap: float | None = None
    suggested_score_threshold: float | None = None
    """Score threshold of the best F1, if AP is known."""
    data_set: str = ""
    training: Mapping[str, str] | None = None
    """Provenance, for readers: command, seconds, commit."""
    resume: Mapping[str, Any] | None = None
    """The state that resuming needs: the optimiser's and others."""

    @property
    def best_weights(self) -> Mapping[str, Tensor]:
        return self.model if self.ema is None else self.ema


def save_checkpoint(checkpoint: Checkpoint, file: Path) -> None:
    """Write the file, or leave the old one unchanged. CheckpointNotWritten: the disk is full, for instance."""
    content = {
        "format": FORMAT,
        "config": to_dict(checkpoint.config),
        "labels": [{"class_id": label.class_id, "label": label.label} for label in checkpoint.labels],
        "model": dict(checkpoint.model),
        "ema": None if checkpoint.ema is None else dict(checkpoint.ema),
        "step": checkpoint.step,
        "ap": checkpoint.ap,
        "suggested_score_threshold": checkpoint.suggested_score_threshold,
        "data_set": checkpoint.data_set,
        "training": dict(checkpoint.training or {}),
        "optimiser": checkpoint.resume,  # its name in files since the first ones
    }
    try:
        with replacing(file) as temporary, temporary.open("wb") as written:
            torch.save(content, written)
            written.flush()
            os.fsync(written.fileno())  # else a power cut may leave the new name without the new bytes
    except (OSError, RuntimeError) as error:
        kept = "the one before it is intact" if file.exists() else "there is none before it"
        raise CheckpointNotWritten(f"the checkpoint {file} cannot be written: {_cause(error)}; {kept}") from error


def _cause(error: BaseException) -> str:
    """Return the system's message: torch's writer hides a full disk behind an error of its own."""
    while not isinstance(error, OSError) and (before := error.__cause__ or error.__context__) is not None:
        error = before
    return str(error)


def load_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. InvalidCheckpoint: missing, corrupt, of another program or version."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"there is no checkpoint {file}") from error
    except Exception as error:  # torch's unpickler raises whatever the bytes lead it to, IndexError among them
        raise InvalidCheckpoint(f"{file} is not a readable checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidCheckpoint(
            f"{file} is no {FORMAT}; `python -m training import` makes one of torchvision's weights"
        )
    try:
        return Checkpoint(
            config=from_dict(TrainConfig, content["config"]),
            labels=tuple(Label(label["class_id"], label["label"]) for label in content["labels"]),
            model=content["model"],
            ema=content["ema"],
            step=content["step"],
            ap=content["ap"],
            suggested_score_threshold=content.get("suggested_score_threshold"),  # older files have none
            data_set=content["data_set"],
            training=content["training"],
            resume=content["optimiser"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpoint(f"{file} does not hold what this version expects: {error}") from error


def build_detector(checkpoint: Checkpoint) -> CandidateDetector:
    """Make the network with the checkpoint's best weights, for evaluation or export."""
    network = RetinaNet(checkpoint.config.model, len(checkpoint.labels))
    try:
        network.load_state_dict(dict(checkpoint.best_weights), strict=True)
    except RuntimeError as error:
        raise InvalidCheckpoint(f"the weights do not fit the architecture: {error}") from error
    log.info("the weights are %s", "those of the last step" if checkpoint.ema is None else "the moving average (EMA)")
    return CandidateDetector(network, checkpoint.labels).eval()


def describe(checkpoint: Checkpoint, name: str, precision: Precision) -> ModelMetadata:
    """Make the metadata of an exported file. InvalidModel: a value that no file may carry."""
    weights = "trained weights" if checkpoint.ema is None else "moving average of the weights"
    return ModelMetadata(
        name=name,
        labels=checkpoint.labels,
        architecture=checkpoint.config.model.describe(),
        precision=precision,
        resize=checkpoint.config.resize,
        score_threshold=checkpoint.config.detection.score_threshold,
        nms_threshold=checkpoint.config.detection.nms_threshold,
        max_detections=checkpoint.config.detection.max_detections,
        data_set=checkpoint.data_set,
        ap=checkpoint.ap,
        suggested_score_threshold=checkpoint.suggested_score_threshold,
        training={**(checkpoint.training or {}), "steps": str(checkpoint.step), "weights": weights},
        anchors=checkpoint.config.model.level_anchors,
    )


def refuse_full_disk(num_bytes: int, out: Path) -> None:
    """Raise CheckpointNotWritten if the disk has no room for last.pt, best.pt and the file being written."""
    missing = 3 - sum((out / name).exists() for name in ("last.pt", "best.pt"))
    free = shutil.disk_usage(out).free
    if free < missing * num_bytes:
        raise CheckpointNotWritten(
            f"{out} has {free / 1e6:,.0f} MB free, and its checkpoints take {missing} x {num_bytes / 1e6:,.0f} MB"
        )
