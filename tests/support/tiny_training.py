"""A data set and a network so small that twenty steps take seconds, and the real command line that trains it."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from model.anchors import AnchorConfig
from model.metadata import ResizePolicy
from model.retinanet import RetinaNetConfig
from training.coco import CocoDataSet, load_coco
from training.config import AugmentConfig, OptimiserConfig, TrainConfig
from training.train import train

ROOT = Path(__file__).parents[2]
STANDALONE = ("--standalone",)
TINY = TrainConfig(
    model=RetinaNetConfig(
        backbone="resnet18",
        backbone_width=0.25,
        backbone_norm="batch",
        fpn_channels=16,
        head_channels=16,
        head_convs=1,
        anchors=AnchorConfig(base_sizes=(16, 32, 64, 128, 256)),
    ),
    optimiser=OptimiserConfig(
        optimiser="adamw", learning_rate=3e-3, reference_batch_size=4, warmup_steps=2, schedule="cosine", ema_decay=0.9
    ),
    augment=AugmentConfig(shorter_sides=(64,), scale_jitter=(0.8, 1.2)),
    resize=ResizePolicy(shorter_side=64, longest_side=96),
    steps=6,
    batch_size=4,
    checkpoint_every=2,
    evaluate_every=0,
    pretrained_backbone=False,
)


def write_tiny_data(folder: Path, *, training_pictures: int = 8, validation_pictures: int = 3) -> Path:
    """Pictures of 64 x 80 with one bright rectangle on noise; the last of each split has none."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", training_pictures), ("val", validation_pictures)):
        (folder / "images" / split).mkdir(parents=True)
        rng = np.random.default_rng([count])
        content: dict[str, list[dict[str, object]]] = {
            "images": [], "annotations": [], "categories": [{"id": 2, "name": "box"}, {"id": 9, "name": "other"}],
        }  # fmt: skip
        for index in range(count):
            pixels = rng.integers(0, 90, (64, 80, 3), dtype=np.uint8)
            x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(20, 34, 2)))
            if index < count - 1:
                pixels[y : y + h, x : x + w] = 220
                box = {"id": index + 1, "image_id": index, "bbox": [x, y, w, h], "area": w * h}
                content["annotations"].append(box | {"category_id": 2, "iscrowd": 0})
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), pixels)
            content["images"].append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 80})
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def train_here(
    config: TrainConfig, data: Path, out: Path, *, resume: bool = False, training_set: CocoDataSet | None = None
) -> None:
    """Train on the data's two splits in this process; `training_set` stands in for the first."""
    train(
        config,
        load_coco(data, "train") if training_set is None else training_set,
        load_coco(data, "val"),
        out,
        device=torch.device("cpu"),
        workers=0,
        resume=resume,
        notes={"command": "test"},
    )


def train_arguments(config: TrainConfig, data: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of `python -m training` that train with this config."""
    command = ["train", "--preset", "paper", "--data", str(data), "--out", str(out)]
    return [*command, "--workers", "0", "--device", "cpu", *flags(config), *more]


def train_command(
    config: TrainConfig, data: Path, out: Path, *more: str, processes: int = 0, torchrun: Sequence[str] = STANDALONE
) -> list[str]:
    """The command line that trains with this config; by torchrun, with these flags, on that many processes."""
    launcher = ["-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, *launcher, "-m", "training", *train_arguments(config, data, out, *more)]


def environment() -> dict[str, str]:
    """One thread for each process, so that sums are made in one order whatever else the machine does."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def flags(config: Any) -> list[str]:
    """Every value of a config as its command-line flag; empty and unset ones have none."""
    return [argument for name, value in _leaves(config) for argument in _flag(name.replace("_", "-"), value)]


def metrics(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
    for entry in fields(config):
        value = vars(config)[entry.name]
        if is_dataclass(value):
            yield from _leaves(value)
        else:
            yield entry.name, value


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *(repr(item) for item in value)] if value else []
    return [f"--{name}", value if isinstance(value, str) else repr(value)]
