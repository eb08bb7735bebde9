"""Data sets and checkpoints that are wrong: one clear line and exit code 2, or used for what is right in them.

Detector files that are wrong are in test_detector.py, damaged annotations in test_coco.py, weights in
exchange/test_torchvision.py; this is what a user of the commands sees.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from model.metadata import Label
from tests.support.networks import draw, tiny_checkpoint
from tests.support.tiny_model import write_tiny_model
from training.__main__ import main
from training.checkpoint import save_checkpoint

GAPS = [{"id": 1, "name": "thing 0"}, {"id": 3, "name": "thing 1"}, {"id": 5, "name": "thing 2"}]
"""tiny_checkpoint's labels."""


def box(index: int, *bbox: float, category: int = 3) -> dict[str, Any]:
    return {"id": index, "image_id": 7, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}


def data_set(folder: Path, annotations: list[dict[str, Any]], categories: list[dict[str, Any]] = GAPS) -> Path:
    """Two pictures of 60 x 90; the annotations are the first's."""
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        images = []
        for image_id in (7, 9):
            name = f"{image_id}.png"
            Image.fromarray(draw(60, 90, image_id)).save(folder / "images" / split / name)
            images.append({"id": image_id, "file_name": name, "height": 60, "width": 90})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    save_checkpoint(tiny_checkpoint(), file)
    return file


def refusal(arguments: list[str | Path], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says."""
    assert main([str(argument) for argument in arguments]) == 2
    *_, line = capfd.readouterr().err.strip().splitlines()  # after the log's
    assert line.startswith("python -m training: error: ")
    return line


def flags() -> list[str]:
    """Return the flags of the smallest run."""
    values = {"backbone": "resnet18", "backbone-width": 0.25, "backbone-norm": "batch", "fpn-channels": 16}
    values |= {"head-channels": 16, "head-convs": 1, "steps": 2, "batch-size": 2, "workers": 0, "shorter-sides": 64}
    values |= {"shorter-side": 64, "longest-side": 96, "warmup-steps": 1, "learning-rate": 0.01}
    return ["--device", "cpu", "--no-pretrained-backbone"] + [str(x) for k, v in values.items() for x in (f"--{k}", v)]


NOTHING: list[list[dict[str, Any]]] = [
    [],
    [box(1, 200, 10, 30, 30), box(2, 10, 10, 0, 20), box(3, 5, 5, 20, -4)],
]
"""No annotations; boxes outside the picture or without area."""


@pytest.mark.slow
def test_ids_with_gaps_train_and_evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = data_set(tmp_path / "data", [box(1, 10, 10, 40, 40)])
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *flags()]) == 0
    assert main(["evaluate", "--data", str(data), "--model", str(tmp_path / "run" / "last.pt"), "--device", "cpu"]) == 0
    assert "AP@[0.50:0.95]" in capfd.readouterr().out


@pytest.mark.parametrize("annotations", NOTHING)
def test_data_without_a_usable_box_cannot_be_learned_from(
    annotations: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path / "data", annotations)
    line = refusal(["train", "--data", data, "--out", tmp_path / "run", *flags()], capfd)
    assert "has no objects, so there is nothing to learn from it" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("annotations", NOTHING)
def test_data_without_a_usable_box_has_no_ap(
    annotations: list[dict[str, Any]], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path, annotations)
    assert main(["evaluate", "--data", str(data), "--model", str(checkpoint), "--device", "cpu"]) == 0
    assert "AP@[0.50:0.95]" in capfd.readouterr().out


def test_a_box_of_a_category_that_is_not_listed_is_refused(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path, [box(1, 5, 5, 20, 20, category=4)])
    assert "annotation 1: category_id 4 is not among the categories" in refusal(
        ["evaluate", "--data", data, "--model", checkpoint], capfd
    )


def test_a_validation_split_without_a_readable_picture_has_no_ap(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path, [box(1, 5, 5, 20, 20)])
    for file in (data / "images" / "val").iterdir():
        file.write_bytes(b"no picture")
    line = refusal(["evaluate", "--data", data, "--model", checkpoint, "--unreadable", "skip"], capfd)
    assert "none of the pictures can be read" in line


def test_a_checkpoint_of_another_class_count_is_refused(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_set(tmp_path, [], [*GAPS, {"id": 6, "name": "fourth"}])
    line = refusal(["evaluate", "--data", data, "--model", checkpoint], capfd)
    assert "the model knows 3 labels (1 thing 0, 3 thing 1, 5 thing 2); " in line
    assert "has 4 labels" in line


def test_a_checkpoint_with_more_labels_than_weights_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = tiny_checkpoint()
    save_checkpoint(replace(good, labels=(*good.labels, Label(99, "more"))), tmp_path / "bad.pt")
    line = refusal(["export", "--model", tmp_path / "bad.pt", "--out", tmp_path / "x.onnx"], capfd)
    assert "the weights do not fit the architecture" in line
    assert "cls_logits.weight" in line
    assert not (tmp_path / "x.onnx").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("no\ncheckpoint")
    for name, complaint in [("text.pt", "not a readable checkpoint"), ("none.pt", "there is no checkpoint")]:
        assert complaint in refusal(["export", "--model", tmp_path / name, "--out", tmp_path / "x.onnx"], capfd)
    assert [file.name for file in tmp_path.iterdir()] == ["text.pt"]


def test_evaluating_a_bad_onnx_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = data_set(tmp_path / "data", [])
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    write_tiny_model(good)
    model = onnx.load(good)
    del model.metadata_props[:]
    onnx.save(model, bad)
    assert "carries no retinaserve metadata" in refusal(["evaluate", "--data", data, "--model", bad], capfd)
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert "bad.onnx is no ONNX file, or a damaged one" in refusal(["evaluate", "--data", data, "--model", bad], capfd)
    onnx.save(onnx.load(good), bad, save_as_external_data=True, size_threshold=0, location="bad.data")
    assert "external data" in refusal(["evaluate", "--data", data, "--model", bad], capfd)


def test_an_export_that_cannot_be_written_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a file" / "x.onnx"
    out.parent.write_text("not a folder")
    refusal(["export", "--model", checkpoint, "--out", out], capfd)
    assert out.parent.read_text() == "not a folder"
    assert list(tmp_path.iterdir()) == [out.parent]
