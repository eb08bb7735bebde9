"""The exported graph where graphs break: no detections, tiny and long pictures, batches, one class and five hundred."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from model.candidates import PRE_NMS_TOP_K
from model.detector import Detector
from model.image import to_canvas
from model.types import CanvasImage
from tests.support.background import Background
from tests.support.networks import TINY, draw, tiny_checkpoint
from training.exchange.onnx_file import export

ANCHORS_PER_CELL = 9


@dataclass(frozen=True)
class Case:
    num_classes: int
    file: Path
    detector: Detector


def exported(folder: Path, num_classes: int) -> Path:
    export(tiny_checkpoint(num_classes), folder / "detector.onnx", name="hard")
    return folder / "detector.onnx"


FILES = {count: Background(exported, count) for count in (1, 500)}
pytestmark = [pytest.mark.slow, pytest.mark.needs(*FILES.values())]


@pytest.fixture(scope="module", params=FILES)
def case(request: pytest.FixtureRequest) -> Case:
    file = FILES[request.param].result()
    return Case(request.param, file, Detector(file, device="cpu"))


def test_the_file_says_what_its_anchors_are(case: Case) -> None:
    assert case.detector.metadata.anchors == TINY.anchors


def test_the_graph_is_one_valid_file_with_named_axes(case: Case) -> None:
    model = onnx.load(case.file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
    assert list(case.file.parent.iterdir()) == [case.file]
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {
        "images": ["batch", "height", "width", 3],
        "sizes": ["batch", 2],
        "boxes": ["batch", 5 * PRE_NMS_TOP_K, 4],
        "scores": ["batch", 5 * PRE_NMS_TOP_K],
        "labels": ["batch", 5 * PRE_NMS_TOP_K],
    }


@pytest.mark.parametrize("size", [(32, 32), (32, 224), (224, 32), (160, 96), (256, 352)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_level_offers_what_it_has_up_to_a_thousand_pairs(case: Case, size: tuple[int, int], batch: int) -> None:
    canvases = [CanvasImage(draw(*size, seed), size, size) for seed in range(batch)]
    grid = np.array(size) // 8
    offered = []
    for _ in range(5):  # P3 to P7: each half of the one below, rounded up
        offered.append(min(PRE_NMS_TOP_K, int(grid.prod()) * ANCHORS_PER_CELL * case.num_classes))
        grid = -(-grid // 2)
    for candidates in case.detector.run(canvases):
        by_level = candidates.scores.reshape(5, PRE_NMS_TOP_K)
        assert [int((level >= 0).sum()) for level in by_level] == offered
        assert (by_level[by_level < 0] == -1).all()
        assert candidates.boxes.min() >= 0
        assert (candidates.boxes <= np.array([*size, *size])[[1, 0, 3, 2]]).all()
        assert set(candidates.labels) <= {2 * column + 1 for column in range(case.num_classes)}


@pytest.mark.parametrize("size", [(1, 1), (32, 4000), (4000, 32), (1, 4000)])
def test_tiny_and_long_pictures_are_answered_within_their_bounds(case: Case, size: tuple[int, int]) -> None:
    detections = case.detector.detect(draw(*size, seed=3), score_threshold=0.0)
    assert len(detections) > 0
    height, width = size
    assert (detections.boxes >= 0).all()
    assert (detections.boxes <= np.array([width, height, width, height])).all()


def test_nothing_found_is_an_empty_answer(case: Case) -> None:
    detections = case.detector.detect(draw(100, 80, seed=1), score_threshold=1.0)
    assert (detections.boxes.shape, detections.scores.shape, detections.labels.shape) == ((0, 4), (0,), (0,))


def test_an_image_gets_the_same_answer_alone_and_in_any_batch(case: Case) -> None:
    canvases = [to_canvas(draw(100, 150, seed), case.detector.metadata.resize) for seed in range(5)]
    alone = [case.detector.run([canvas])[0] for canvas in canvases]
    for order in ([0, 1], [1, 0], [4, 3, 2, 1, 0], [2, 2, 0, 2, 1]):
        batch = case.detector.run([canvases[index] for index in order])
        for index, answer in zip(order, batch, strict=True):
            # in one order on each level: candidates of nearly equal scores may change places
            assert np.abs(answer.scores - alone[index].scores).max() <= 1e-3
            both = zip((answer.boxes, answer.labels), (alone[index].boxes, alone[index].labels), strict=True)
            same = [np.isclose(ours, theirs, atol=0.05).reshape(len(ours), -1).all(axis=1) for ours, theirs in both]
            assert np.logical_and(*same).mean() > 0.99
