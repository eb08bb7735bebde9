"""The loop on a tiny data set and network: it learns, stops when it must, and goes on as if it had never stopped."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_training import TINY, train_here, write_tiny_data
from training.checkpoint import (
    Checkpoint,
    CheckpointNotWritten,
    InvalidCheckpoint,
    build_detector,
    load_checkpoint,
    save_checkpoint,
)
from training.coco import CocoDataSet, InvalidDataSet, load_coco
from training.config import LossConfig, TrainConfig
from training.data import load_batches, schedule
from training.loss.losses import Losses
from training.optimiser import learning_rate, memory_format
from training.presets import PRESETS
from training.state import RunFolderInUse
from training.stopping import COMPARED_STEPS, DivergenceCheck, TrainingDiverged


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


RUN_FOLDER = ["best.pt", "last.pt", "metrics.jsonl", "report", "tensorboard"]
"""Files of a finished run, which leaves no unfinished ones."""


def run(config: TrainConfig, data: Path, out: Path, *, resume: bool = False) -> Checkpoint:
    train_here(config, data, out, resume=resume)
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
        train_here(TINY, data, stopped, training_set=failing)
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


def test_weights_that_are_no_numbers_are_never_written(data: Path, tmp_path: Path) -> None:
    config = replace(
        TINY, checkpoint_every=1, optimiser=replace(TINY.optimiser, learning_rate=float("inf"), warmup_steps=0)
    )
    with pytest.raises(TrainingDiverged, match="step 1 made weights that are NaN or infinite"):
        run(config, data, tmp_path)
    assert not (tmp_path / "last.pt").exists()


def losses(total: float) -> Losses:
    return Losses(torch.tensor(total), torch.tensor(0.0))


def test_losses_that_grow_stop_the_run_and_noise_does_not() -> None:
    divergence = DivergenceCheck(5, Path("last.pt"))
    for step in range(1, 2 * COMPARED_STEPS + 1):
        divergence.check(step, losses(1 + 3 * (step % 2)))
    with pytest.raises(
        TrainingDiverged, match=f"step {3 * COMPARED_STEPS}: the mean loss of {COMPARED_STEPS} steps is 20"
    ):
        for step in range(2 * COMPARED_STEPS + 1, 4 * COMPARED_STEPS):
            divergence.check(step, losses(20))


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(normaliser="image"),
        LossConfig(normaliser="batch"),
        LossConfig(normaliser="running"),
        LossConfig(normaliser="anchors", sampled_anchors=64),
    ],
    ids=lambda loss: loss.normaliser,
)
def test_a_step_computed_in_parts_is_the_step_in_one(data: Path, tmp_path: Path, loss: LossConfig) -> None:
    whole = replace(
        TINY,
        model=replace(TINY.model, backbone_norm="frozen"),
        optimiser=replace(TINY.optimiser, optimiser="sgd", learning_rate=1e-3, gradient_clip=1.0),
        loss=loss,
        precision="fp64",
        steps=3,
    )
    one = run(whole, data, tmp_path / "one")
    parts = run(replace(whole, accumulate_steps=3), data, tmp_path / "parts")  # of 1, 1 and 2 images
    for name in one.model:
        torch.testing.assert_close(parts.model[name], one.model[name], rtol=1e-9, atol=1e-12)


def test_the_running_mean_of_the_positives_is_detectron2s(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=1, log_every=1, loss=LossConfig(normaliser="running"))
    by_mean = run(config, data, tmp_path / "mean")
    run(replace(config, loss=LossConfig(normaliser="batch")), data, tmp_path / "batch")
    mean_line, batch_line = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("mean", "batch")
    )
    assert by_mean.resume is not None
    mean = by_mean.resume["mean_positives"]
    positives = (mean - 0.9 * 100) / 0.1
    assert positives >= 1
    expected = batch_line["classification_loss"] * positives / mean
    assert mean_line["classification_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("capability", "device", "asked", "last"),
    [
        ("AVX512", "cpu", None, True),
        ("AVX2", "cpu", None, False),
        ("AVX2", "cuda", None, True),
        ("AVX512", "cpu", False, False),
        ("AVX2", "cpu", True, True),
    ],
)
def test_the_layout_in_memory_is_the_devices_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capability: str, device: str, asked: bool | None, last: bool
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    chosen = memory_format(asked, torch.device(device))
    assert chosen == (torch.channels_last if last else torch.contiguous_format)


def test_the_layout_in_memory_does_not_change_what_is_computed(data: Path, tmp_path: Path) -> None:
    config = replace(TINY, steps=1, precision="fp64")
    last = run(replace(config, channels_last=True), data, tmp_path / "last")
    first = run(replace(config, channels_last=False), data, tmp_path / "first")
    for name in last.model:
        torch.testing.assert_close(first.model[name], last.model[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_single_and_keeps_single_precision_weights(
    data: Path, tmp_path: Path, precision: str
) -> None:
    config = replace(TINY, model=replace(TINY.model, backbone_norm="frozen"), steps=2, log_every=1)
    run(config, data, tmp_path / "single")
    half = run(replace(config, precision=precision), data, tmp_path / "half")  # type: ignore[arg-type]
    assert {value.dtype for value in half.model.values() if value.is_floating_point()} == {torch.float32}
    lines = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("single", "half")]
    assert lines[1]["classification_loss"] == pytest.approx(lines[0]["classification_loss"], rel=0.05)
    assert lines[1]["classification_loss"] != lines[0]["classification_loss"]


def test_where_validation_has_no_objects_there_is_no_ap_and_the_last_weights_are_the_best(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", validation_pictures=1)
    last = run(replace(TINY, steps=4, evaluate_every=2), data, tmp_path / "run")
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert last.ap is None
    assert best.step == 4


def test_the_run_says_how_the_learning_rate_scales_and_what_has_no_objects(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(TINY, steps=1, batch_size=8)
    run(config, data, tmp_path)
    assert "learning rate 0.006 = 0.003 for 4 images a step x 8 / 4" in caplog.text
    assert "has no objects of other" in caplog.text


def test_a_detector_says_which_weights_it_takes(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    averaged = run(replace(TINY, steps=1), data, tmp_path / "averaged")
    build_detector(averaged)
    assert "the weights are the moving average (EMA)" in caplog.text
    build_detector(replace(averaged, ema=None))
    assert "the weights are those of the last step" in caplog.text


def test_a_checkpoint_of_before_the_newer_settings_can_be_resumed(data: Path, tmp_path: Path) -> None:
    whole = run(TINY, data, tmp_path / "whole")
    run(replace(TINY, steps=4), data, tmp_path / "old")
    content = torch.load(tmp_path / "old" / "last.pt", weights_only=True)
    newer = (
        "log_every",
        "group_by_aspect",
        "unreadable",
        "precision",
        "accumulate_steps",
        "channels_last",
        "divergence_factor",
    )
    for name in newer:
        del content["config"][name]
    for name in ("scaler", "evaluated", "mean_positives"):
        del content["optimiser"][name]
    content["config"]["steps"] = 6
    torch.save(content, tmp_path / "old" / "last.pt")
    resumed = run(TINY, data, tmp_path / "old", resume=True)
    assert resumed.step == whole.step == 6


def test_samples_do_not_depend_on_the_step_a_run_starts_at(data: Path) -> None:
    training_set = load_coco(data, "train")
    whole = list(load_batches(training_set, TINY, first_step=0, workers=0))
    resumed = list(load_batches(training_set, TINY, first_step=4, workers=0))
    assert len(whole) == 6
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], resumed, strict=True))


def test_every_picture_comes_once_an_epoch() -> None:
    steps = schedule([(64, 80)] * 10, TINY.augment, 4, seed=0, group_by_aspect=False)
    keys = [key for _ in range(5) for key in next(steps)]
    assert sorted(key.index for key in keys if key.epoch == 0) == list(range(10))
    assert sorted(key.index for key in keys if key.epoch == 1) == list(range(10))


def test_grouped_by_aspect_a_step_has_upright_or_lying_pictures_and_every_picture_comes() -> None:
    sizes = [(90, 60) if index % 3 == 0 else (60, 90) for index in range(12)]
    steps = schedule(sizes, TINY.augment, 4, seed=0, group_by_aspect=True)
    keys = [next(steps) for _ in range(30)]
    for step in keys:
        assert len({sizes[key.index][0] > sizes[key.index][1] for key in step}) == 1
    first_epoch = [key.index for step in keys for key in step if key.epoch == 0]
    assert sorted(first_epoch) == list(range(12))


def test_an_unreadable_picture_is_named_and_the_next_one_stands_in(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    (data / "images" / "train" / "2.png").write_bytes(b"no picture")
    training_set = load_coco(data, "train")
    config = replace(TINY, batch_size=8, steps=1)
    with pytest.raises(InvalidDataSet, match=r"2\.png cannot be read.*--unreadable skip"):
        next(load_batches(training_set, config, first_step=0, workers=0))
    batch = next(load_batches(training_set, replace(config, unreadable="skip"), first_step=0, workers=0))
    assert len(batch.targets) == 8
    [problem] = batch.unreadable
    assert "2.png" in problem
    for picture in training_set.pictures:
        picture.file.unlink()
    with pytest.raises(InvalidDataSet, match="none of the 8 pictures"):
        next(load_batches(training_set, replace(config, unreadable="skip"), first_step=0, workers=0))


def test_the_learning_rate_warms_up_and_drops_at_the_milestones() -> None:
    paper = PRESETS["paper"]
    rates = [
        learning_rate(paper.optimiser, step, steps=paper.steps, batch_size=paper.batch_size)
        for step in (0, 499, 999, 59_999, 60_000, 80_000)
    ]
    assert rates == pytest.approx([1e-5, 5e-3, 1e-2, 1e-2, 1e-3, 1e-4])


def test_the_learning_rate_scales_with_the_batch() -> None:
    rate = learning_rate(PRESETS["paper"].optimiser, 5000, steps=90_000, batch_size=4)
    assert rate == pytest.approx(0.0025)


def test_a_cosine_ends_at_zero() -> None:
    config = PRESETS["demo"].optimiser
    assert learning_rate(config, 999, steps=1000, batch_size=8) == pytest.approx(0, abs=1e-7)
    assert math.isclose(learning_rate(config, 600, steps=1000, batch_size=8), config.learning_rate / 2)


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
    broken = replace(saved, resume={"state": lambda: None})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(broken, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == RUN_FOLDER


def test_a_full_disk_leaves_the_old_checkpoint_and_is_named(data: Path, tmp_path: Path) -> None:
    saved = run(replace(TINY, steps=1), data, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / f".last.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(CheckpointNotWritten, match=r"No space left on device; the one before it is intact"):
        save_checkpoint(saved, tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == RUN_FOLDER
