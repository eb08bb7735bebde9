"""The files that ship: they are what the README says, and they detect."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from model.detector import Detector
from model.pretrained import PRETRAINED
from tests.support.networks import assert_agree
from training.coco import load_coco
from training.demo.draw import draw_data_set, draw_picture
from training.evaluate import evaluate, open_predictor

MAX_BYTES = 12_000_000
SHIPPED = (PRETRAINED, PRETRAINED.with_name("shapes-int8.onnx"))
CHECKPOINT = PRETRAINED.with_suffix(".pt")


@pytest.mark.parametrize("shipped", SHIPPED)
def test_the_shipped_file_is_small_and_says_how_it_was_made(shipped: Path) -> None:
    assert shipped.stat().st_size <= MAX_BYTES
    metadata = Detector(shipped, device="cpu").metadata
    assert metadata.name == "shapes"
    assert {label.label for label in metadata.labels} >= {"circle", "square", "triangle"}
    assert metadata.ap is not None
    assert {"command", "commit", "steps", "weights"} <= set(metadata.training)
    assert (metadata.resize.shorter_side, metadata.resize.longest_side) == (800, 1333)


@pytest.mark.parametrize("shipped", SHIPPED)
def test_the_shipped_file_is_opset_18_with_its_weights_inside(shipped: Path) -> None:
    model = onnx.load(shipped)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
def test_the_shipped_file_finds_what_the_checkpoint_beside_it_finds() -> None:
    assert CHECKPOINT.stat().st_size <= MAX_BYTES
    file, checkpoint = open_predictor(PRETRAINED, "cpu"), open_predictor(CHECKPOINT, "cpu")
    pictures = [draw_picture(988, "val", index).pixels for index in range(4)]
    assert_agree([(checkpoint(picture), file(picture)) for picture in pictures], score_tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shipped", SHIPPED)
def test_it_detects_shapes_that_it_was_not_trained_on(tmp_path: Path, shipped: Path) -> None:
    draw_data_set(tmp_path, images=0, validation_images=24, seed=987, workers=1)
    report = evaluate(open_predictor(shipped, "cpu"), load_coco(tmp_path, "val"), progress=False)
    claimed = Detector(shipped, device="cpu").metadata.ap
    assert claimed is not None
    assert np.isfinite(report.ap)
    assert report.ap > claimed - 0.1  # 24 pictures: the AP of as many validation pictures varies by some hundredths
