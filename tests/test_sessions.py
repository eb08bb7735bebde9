import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import pytest
from tiny_model import SMALL, write_tiny_model

from model.image import to_canvas
from model.sessions import (
    BYTES_PER_PIXEL,
    AnyShape,
    FixedShapes,
    InputShape,
    available_cores,
    open_on_cpu,
    operators_on,
)
from model.types import CanvasImage


class FakeSession:
    """Answers with each row's first pixel and valid size, and keeps what it was given."""

    def __init__(self, shape: InputShape, opened: list[InputShape]) -> None:
        self.shape = shape
        self.inputs: list[np.ndarray] = []
        opened.append(shape)

    def run(self, output_names: None, input_feed: dict[str, Any]) -> list[np.ndarray]:
        images, sizes = input_feed["images"], input_feed["sizes"]
        assert images.shape == (*self.shape, 3) and images.dtype == np.uint8
        assert sizes.shape == (self.shape.batch, 2) and sizes.dtype == np.int64
        assert (sizes > 0).all()
        self.inputs.append(images)
        if (images[:, 0, 0, 0] == 255).any():
            raise RuntimeError("made to fail")
        return [images[:, 0, 0, 0].copy(), sizes.copy()]


class Harness:
    """FixedShapes over fakes with room for `room` canvases of 64 × 64 and their weights."""

    def __init__(self, room: int) -> None:
        self.opened: list[InputShape] = []
        self.sessions: dict[InputShape, FakeSession] = {}
        pixel_bytes = BYTES_PER_PIXEL * 64 * 64
        self.runner = FixedShapes(self.open, weight_bytes=100, limit_bytes=room * (pixel_bytes + 100))

    def open(self, shape: InputShape) -> FakeSession:
        self.sessions[shape] = FakeSession(shape, self.opened)
        return self.sessions[shape]


def canvas(value: int, height: int = 64, width: int = 64, valid: tuple[int, int] = (50, 60)) -> CanvasImage:
    return CanvasImage(np.full((height, width, 3), value, np.uint8), valid, valid)


def test_a_batch_is_padded_to_the_next_power_of_two_and_only_its_own_rows_come_back() -> None:
    harness = Harness(room=100)
    for count, padded in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16)]:
        values, sizes = harness.runner([canvas(value) for value in range(count)])
        assert values.tolist() == list(range(count))
        assert sizes.tolist() == [[50, 60]] * count
        assert harness.runner.shapes()[-1] == InputShape(padded, 64, 64)


def test_a_session_is_opened_once_for_each_shape_and_its_input_memory_used_again() -> None:
    harness = Harness(room=100)
    for value in range(3):
        harness.runner([canvas(value)])
        harness.runner([canvas(value, 96, 32)])
    assert harness.opened == [(1, 64, 64), (1, 96, 32)]
    first, second, third = harness.sessions[InputShape(1, 64, 64)].inputs
    assert first is second is third


def test_an_earlier_batch_leaves_nothing_in_a_smaller_ones_answer() -> None:
    harness = Harness(room=100)
    harness.runner([canvas(7, valid=(1, 2))] * 4)
    values, sizes = harness.runner([canvas(8)] * 3)
    assert values.tolist() == [8, 8, 8]
    assert sizes.tolist() == [[50, 60]] * 3


def test_the_least_recently_used_session_is_closed_first() -> None:
    harness = Harness(room=2)
    tall, wide, square = canvas(1, 128, 32), canvas(1, 32, 128), canvas(1)
    for image in (tall, wide, tall, square):
        harness.runner([image])
    assert harness.runner.shapes() == [(1, 128, 32), (1, 64, 64)]
    harness.runner([wide])
    assert harness.runner.shapes() == [(1, 64, 64), (1, 32, 128)]


def test_a_large_batch_makes_room_by_closing_several() -> None:
    harness = Harness(room=4)
    for width in (32, 64, 96):
        harness.runner([canvas(1, 32, width)])
    harness.runner([canvas(1)] * 4)
    assert harness.runner.shapes() == [(4, 64, 64)]


def test_a_shape_larger_than_the_limit_runs_alone() -> None:
    harness = Harness(room=1)
    harness.runner([canvas(1)])
    values, _ = harness.runner([canvas(3)] * 2)
    assert values.tolist() == [3, 3]
    assert harness.runner.shapes() == [(2, 64, 64)]


def test_after_a_failure_sessions_are_opened_anew() -> None:
    harness = Harness(room=100)
    harness.runner([canvas(1)])
    with pytest.raises(RuntimeError, match="made to fail"):
        harness.runner([canvas(255)])
    assert harness.runner.shapes() == []
    values, _ = harness.runner([canvas(2)])
    assert values.tolist() == [2]
    assert harness.opened == [(1, 64, 64)] * 2


def test_fixed_shapes_answer_as_one_session_for_all_does(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    model = (tmp_path / "a.onnx").read_bytes()

    def open_fixed(shape: InputShape) -> ort.InferenceSession:
        options = ort.SessionOptions()
        for name, size in shape._asdict().items():
            options.add_free_dimension_override_by_name(name, size)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape == [*shape, 3]
        return session

    fixed = FixedShapes(open_fixed, weight_bytes=len(model), limit_bytes=2**30)
    free = AnyShape(open_on_cpu(model, threads=1))
    for count, height, width in [(1, 60, 80), (3, 60, 80), (2, 80, 60), (3, 60, 80), (1, 1, 1)]:
        batch = pictures(count, height, width)
        for one, other in zip(fixed(batch), free(batch), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def pictures(count: int, height: int, width: int) -> Sequence[CanvasImage]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [to_canvas(cv2.resize(picture, (width, height)), SMALL) for picture in coarse]


def test_the_operators_a_provider_runs_can_be_listed(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    assert {"MatMul", "Sigmoid", "ArgMax"} <= operators_on(session, "CPUExecutionProvider")
    assert not operators_on(session, "CUDAExecutionProvider")


# Cores


def quota_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


def legacy(quota: str) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": f"{quota}\n", "cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, 1000),
        ({"cpu.max": "max 100000\n"}, 1000),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "290000 100000\n"}, 2),
        ({"cpu.max": "99900000 100000\n"}, 999),
        (legacy("-1"), 1000),
        (legacy("100000"), 1),
        (legacy("20000"), 1),
    ],
)
def test_cores_are_those_of_affinity_and_quota(tmp_path: Path, files: dict[str, str], quota: int) -> None:
    assert available_cores(quota_files(tmp_path, files)) == min(len(os.sched_getaffinity(0)), quota)
