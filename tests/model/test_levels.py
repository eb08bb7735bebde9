"""A pyramid of other levels than P3 to P7, all the way: trained, exported, opened and run as the service does."""

from dataclasses import replace
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

import numpy as np
import pytest

from model.anchors import AnchorConfig
from model.detector import Detector
from model.image import to_canvas
from tests.support.tiny_training import TINY, train_here, write_tiny_data
from training.checkpoint import load_checkpoint
from training.exchange.onnx_file import export

P2_TO_P6 = AnchorConfig(base_sizes=(8, 16, 32, 64, 128), lowest_level=2)
P3_TO_P5 = AnchorConfig(base_sizes=(16, 32, 64), scales=(1, 1.5))


@pytest.fixture(scope="module")
def files(exporters: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[AnchorConfig, "AsyncResult[Path]"]:
    data = write_tiny_data(tmp_path_factory.mktemp("levels") / "data")
    return {
        anchors: exporters.apply_async(trained_and_exported, (anchors, data, data.with_name(str(anchors.levels))))
        for anchors in (P2_TO_P6, P3_TO_P5)
    }


def trained_and_exported(anchors: AnchorConfig, data: Path, out: Path) -> Path:
    train_here(replace(TINY, steps=2, model=replace(TINY.model, anchors=anchors)), data, out)
    export(load_checkpoint(out / "best.pt"), out / "levels.onnx", name="levels")  # checks the file against torch
    return out / "levels.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("anchors", [P2_TO_P6, P3_TO_P5], ids=["P2 to P6", "P3 to P5"])
def test_other_levels_are_trained_exported_and_run(
    anchors: AnchorConfig, files: dict[AnchorConfig, "AsyncResult[Path]"]
) -> None:
    detector = Detector(files[anchors].get(), device="cpu")
    [candidates] = detector.run([to_canvas(np.full((90, 120, 3), 128, np.uint8), TINY.resize)])
    assert candidates.boxes.shape == (1000 * len(anchors.base_sizes), 4)
    assert detector.metadata.anchors == anchors
    levels = f"P{anchors.levels[0]}-P{anchors.levels[-1]}"
    assert levels in detector.metadata.architecture
