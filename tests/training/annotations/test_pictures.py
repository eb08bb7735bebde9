"""Pictures that would fail in the middle of a run are found before its first step."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.metadata import InvalidModel
from tests.support.tiny_training import TINY, train_here, write_tiny_data
from training.annotations.pictures import refuse_absent
from training.checkpoint import CheckpointNotWritten, load_checkpoint, refuse_full_disk
from training.coco import InvalidDataSet, load_coco
from training.config import DetectionConfig, TrainConfig

SKIPPING = replace(TINY, steps=1, unreadable="skip")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tiny_data(tmp_path / "data")


def damage(data: Path, split: str, *names: str) -> None:
    for name in names:
        (data / "images" / split / name).write_bytes(b"no picture")


def remove(data: Path, split: str, *names: str) -> None:
    for name in names:
        (data / "images" / split / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "config", "message"),
    [
        (lambda data: remove(data, "train", "6.png", "7.png"), TINY,
         r"2 of the 8 pictures of .*_train\.json cannot be read, the first: .*6\.png \(id 6\) is not there; --u"),
        (lambda data: damage(data, "val", "1.png"), TINY,
         r"1 of the 3 pictures of .*_val\.json cannot be read, the first: .*1\.png cannot be read: .*--unreadable"),
        (lambda data: damage(data, "val", "0.png", "1.png", "2.png"), SKIPPING, "so nothing is left"),
        (lambda data: remove(data, "train", *(f"{n}.png" for n in range(8))), SKIPPING, "so nothing is left"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_read_are_found_before_the_first_step(
    spoil: Callable[[Path], None], config: TrainConfig, message: str, data: Path, tmp_path: Path
) -> None:
    spoil(data)
    with pytest.raises(InvalidDataSet, match=message):
        train_here(config, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_skipped_pictures_are_counted_before_the_first_step(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remove(data, "train", "6.png")
    damage(data, "val", "2.png")
    train_here(SKIPPING, data, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "and are skipped" in record.getMessage()]
    assert [text.partition(" of /")[0] for text in said] == ["1 of the 8 pictures", "1 of the 3 pictures"]


def test_a_picture_too_large_to_be_decoded_is_named(data: Path) -> None:
    data_set = load_coco(data, "val")
    large = replace(data_set.pictures[0], size=(9000, 8000))
    with pytest.raises(InvalidDataSet, match=r"0\.png \(id 0\) has 72,000,000 pixels, 50,000,000 are allowed"):
        refuse_absent(replace(data_set, pictures=[large]), skip=False)


def test_what_no_exported_file_may_carry_is_refused_before_the_first_step(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="max_detections is 0"):
        train_here(replace(TINY, detection=DetectionConfig(max_detections=0)), data, tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_disk_that_cannot_hold_the_checkpoints_is_named(tmp_path: Path) -> None:
    refuse_full_disk(1000, tmp_path)
    with pytest.raises(CheckpointNotWritten, match=r"MB free, and its checkpoints take 3 x 1,000,000,000 MB"):
        refuse_full_disk(10**15, tmp_path)


def test_a_resumed_run_says_that_its_data_set_has_changed(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    train_here(replace(TINY, steps=1), data, tmp_path / "run")
    train_here(replace(TINY, steps=1), data, tmp_path / "run", resume=True)
    assert "has changed" not in caplog.text
    file = data / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace('"bbox": [', '"bbox": [1', 1))
    train_here(replace(TINY, steps=1), data, tmp_path / "run", resume=True)
    [record] = [record for record in caplog.records if "has changed" in record.getMessage()]
    assert "instances_train.json has changed since the run began: 8 pictures, 7 objects, " in record.getMessage()
    resume = load_checkpoint(tmp_path / "run" / "last.pt").resume
    assert resume is not None and set(resume["data_sets"]) == {"train", "val"}
