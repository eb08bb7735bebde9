"""A pyramid of other levels than P3 to P7, all the way: trained, exported, opened and run as the service does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.anchors import AnchorConfig
from model.detector import Detector
from model.image import to_canvas
from tests.support.background import Background
from tests.support.tiny_training import TINY, train_here, write_tiny_data
from training.checkpoint import load_checkpoint
from training.exchange.onnx_file import export

P2_TO_P6 = AnchorConfig(base_sizes=(8, 16, 32, 64, 128), lowest_level=2)
P3_TO_P5 = AnchorConfig(base_sizes=(16, 32, 64), scales=(1, 1.5))


def trained_and_exported(folder: Path, anchors: AnchorConfig) -> Path:
    config = replace(TINY, steps=2, model=replace(TINY.model, anchors=anchors))
    train_here(config, write_tiny_data(folder / "data"), folder / "run")
    # checks the file against torch
    export(load_checkpoint(folder / "run" / "best.pt"), folder / "levels.onnx", name="levels")
    return folder / "levels.onnx"


FILES = {anchors: Background(trained_and_exported, anchors) for anchors in (P2_TO_P6, P3_TO_P5)}


@pytest.mark.slow
@pytest.mark.needs(*FILES.values())
@pytest.mark.parametrize("anchors", FILES, ids=["P2 to P6", "P3 to P5"])
def test_other_levels_are_trained_exported_and_run(anchors: AnchorConfig) -> None:
    detector = Detector(FILES[anchors].result(), device="cpu")
    [candidates] = detector.run([to_canvas(np.full((90, 120, 3), 128, np.uint8), TINY.resize)])
    assert candidates.boxes.shape == (1000 * len(anchors.base_sizes), 4)
    assert detector.metadata.anchors == anchors
    levels = f"P{anchors.levels[0]}-P{anchors.levels[-1]}"
    assert levels in detector.metadata.architecture
