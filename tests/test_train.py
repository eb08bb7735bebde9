"""The loop on a tiny data set and network: it learns, stops when it must, and goes on as if it had never stopped."""

import json
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model.anchors import AnchorConfig
from model.metadata import ResizePolicy
from model.retinanet import RetinaNetConfig
from training.checkpoint import Checkpoint, InvalidCheckpoint, build_detector, load_checkpoint, save_checkpoint
from training.coco import CocoDataSet, load_coco
from training.config import PRESETS, AugmentConfig, OptimiserConfig, TrainConfig
from training.data import load_batches, schedule
from training.train import RunFolderInUse, TrainingDiverged, learning_rate, train

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 64 x 80 with one bright rectangle on noise; the last has none."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 3)):
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


def run(config: TrainConfig, data: Path, out: Path, *, resume: bool = False) -> Checkpoint:
    train(
        config,
        load_coco(data, "train"),
        load_coco(data, "val"),
        out,
        device=torch.device("cpu"),
        workers=0,
        resume=resume,
        notes={"command": "test"},
    )
    return load_checkpoint(out / "last.pt")


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    return all(torch.equal(one.best_weights[name], other.best_weights[name]) for name in one.best_weights)


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    whole = run(TINY, data, tmp_path / "whole")
    stopped = tmp_path / "stopped"

    class Power(Exception):
        pass

    class FailingSet(CocoDataSet):
        reads = 0

        def read(self, index: int) -> np.ndarray:  # type: ignore[type-arg]
            FailingSet.reads += 1
            if FailingSet.reads > 4 * TINY.batch_size + 1:  # in the 5th step; step 4 is the last checkpoint
                raise Power
            return super().read(index)

    failing = FailingSet(**vars(load_coco(data, "train")))
    with pytest.raises(Power):
        train(
            TINY,
            failing,
            load_coco(data, "val"),
            stopped,
            device=torch.device("cpu"),
            workers=0,
            resume=False,
            notes={},
        )
    assert load_checkpoint(stopped / "last.pt").step == 4
    assert equal(run(TINY, data, stopped, resume=True), whole)


@pytest.mark.slow
def test_it_learns_to_find_rectangles(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=120, checkpoint_every=1000)
    checkpoint = run(config, data, tmp_path / "run")
    assert checkpoint.ap is not None
    assert checkpoint.ap > 0.3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["classification_loss"] + line["box_loss"] for line in lines if "box_loss" in line]
    assert losses[-1] < losses[0] / 2
    assert lines[-1]["ap"] == checkpoint.ap
    assert load_checkpoint(tmp_path / "run" / "best.pt").ap == checkpoint.ap


def test_a_used_folder_is_refused_without_resume(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=1, checkpoint_every=1)
    run(config, data, tmp_path)
    with pytest.raises(RunFolderInUse, match="--resume"):
        run(config, data, tmp_path)


def test_resume_in_an_empty_folder_starts_fresh(data: Path, tmp_path: Path) -> None:
    assert run(replace(TINY, steps=1), data, tmp_path / "new", resume=True).step == 1


def test_resuming_with_other_settings_is_refused(data: Path, tmp_path: Path) -> None:
    run(replace(TINY, steps=1), data, tmp_path)
    with pytest.raises(RunFolderInUse, match="other settings"):
        run(replace(TINY, steps=2), data, tmp_path, resume=True)


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, optimiser=replace(TINY.optimiser, learning_rate=float("inf"), warmup_steps=0, ema_decay=0))
    with pytest.raises(TrainingDiverged, match="step 2"):
        run(config, data, tmp_path)


def test_samples_do_not_depend_on_the_step_a_run_starts_at(data: Path) -> None:
    training_set = load_coco(data, "train")
    whole = list(load_batches(training_set, TINY, first_step=0, workers=0))
    resumed = list(load_batches(training_set, TINY, first_step=4, workers=0))
    assert len(whole) == 6
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], resumed, strict=True))


def test_every_picture_comes_once_an_epoch() -> None:
    steps = schedule(10, replace(TINY, batch_size=4))
    keys = [key for _ in range(5) for key in next(steps)]
    assert sorted(key.index for key in keys if key.epoch == 0) == list(range(10))
    assert sorted(key.index for key in keys if key.epoch == 1) == list(range(10))


def test_the_learning_rate_warms_up_and_drops_at_the_milestones() -> None:
    paper = PRESETS["paper"]
    rates = [learning_rate(paper, step) for step in (0, 499, 999, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([1e-5, 5e-3, 1e-2, 1e-2, 1e-3, 1e-4])


def test_the_learning_rate_scales_with_the_batch() -> None:
    assert learning_rate(replace(PRESETS["paper"], batch_size=4), 5000) == pytest.approx(0.0025)


def test_a_cosine_ends_at_zero() -> None:
    config = replace(PRESETS["demo"], steps=1000)
    assert learning_rate(config, 999) == pytest.approx(0, abs=1e-7)
    assert math.isclose(learning_rate(config, 600), config.optimiser.learning_rate / 2)


def test_a_checkpoint_is_read_with_weights_only_and_restores_everything(data: Path, tmp_path: Path) -> None:
    saved = run(replace(TINY, steps=1), data, tmp_path)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {"model", "config", "labels", "step", "ap"} <= set(content)
    assert saved.config == replace(TINY, steps=1)
    assert [label.class_id for label in saved.labels] == [2, 9]
    build_detector(saved)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.pt"
    file.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"bad\.pt") as error:
        load_checkpoint(file)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(data: Path, tmp_path: Path) -> None:
    saved = run(replace(TINY, steps=1), data, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    broken = replace(saved, optimiser={"state": lambda: None})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(broken, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.pt", "last.pt", "metrics.jsonl"]
