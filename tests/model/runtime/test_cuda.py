import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest

from model.image import to_canvas
from model.pretrained import PRETRAINED
from model.runtime.cpu import AnyShape, open_on_cpu
from model.runtime.cuda import BYTES_PER_PIXEL, LANES, FixedShapes, InputShape, Lane, fixed_shape_options
from model.runtime.session import DeviceUnavailable, operators_on
from model.types import CanvasImage
from tests.support.tiny_model import SMALL, write_tiny_model

PROBE = """
<ir_version: 10, opset_import: ["" : 18]>
probe (uint8[batch,height,width,3] images, int64[batch,2] sizes) => (float[batch] values, int64[batch,2] valid) {
    corner = Slice(images, from_one, to_one, axes)
    flat = Reshape(corner, row)
    values = Cast<to=1>(flat)
    black = Cast<to=7>(flat)
    is_fault = Equal(black, fault)
    out_of_range = Cast<to=7>(is_fault)
    zero_each = Gather(zero, out_of_range)
    zero_rows = Unsqueeze(zero_each, one)
    valid = Add(sizes, zero_rows)
}
"""
"""Answers with each row's first pixel and valid size; raises if a first pixel is 255."""


def probe() -> bytes:
    model = onnx.parser.parse_model(PROBE)
    values = {"from_one": [0, 0, 0], "to_one": [1, 1, 1], "axes": [1, 2, 3], "row": [-1], "fault": [255], "zero": [0]}
    for name, value in (values | {"one": [1]}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def open_fixed(model: bytes, shape: InputShape) -> ort.InferenceSession:
    """As open_on_cuda does, on the CPU."""
    session = ort.InferenceSession(model, fixed_shape_options(shape, threads=1), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [*shape, 3]
    return session


class Watched(ort.InferenceSession):
    """Notes how many runs are in progress, in any of them, and can be held there."""

    running = 0
    most_running = 0
    gate: threading.Event
    lock: threading.Lock

    def run_with_iobinding(self, iobinding: ort.IOBinding, run_options: ort.RunOptions | None = None) -> None:
        with Watched.lock:
            Watched.running += 1
            Watched.most_running = max(Watched.most_running, Watched.running)
        assert Watched.gate.wait(20)
        super().run_with_iobinding(iobinding, run_options)
        with Watched.lock:
            Watched.running -= 1


class Harness:
    """FixedShapes over real sessions, on the CPU, with room for `room` canvases of 64 × 64 and their weights."""

    def __init__(self, room: int, session: type[ort.InferenceSession] = ort.InferenceSession) -> None:
        self.opened: list[InputShape] = []
        self._model, self._session = probe(), session
        pixel_bytes = BYTES_PER_PIXEL["fp32"] * 64 * 64
        self.runner = FixedShapes(self.open, memory="cpu", weight_bytes=100, limit_bytes=room * (pixel_bytes + 100))

    def open(self, shape: InputShape) -> ort.InferenceSession:
        self.opened.append(shape)
        return self._session(self._model, fixed_shape_options(shape, threads=1), providers=["CPUExecutionProvider"])


def canvas(value: int, height: int = 64, width: int = 64, valid: tuple[int, int] = (50, 60)) -> CanvasImage:
    return CanvasImage(np.full((height, width, 3), value, np.uint8), valid, valid)


def test_a_batch_is_padded_to_the_next_power_of_two_and_only_its_own_rows_come_back() -> None:
    harness = Harness(room=100)
    for count, padded in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16)]:
        values, sizes = harness.runner([canvas(value) for value in range(count)])
        assert values.tolist() == list(range(count))
        assert sizes.tolist() == [[50, 60]] * count
        assert harness.runner.shapes()[-1] == InputShape(padded, 64, 64)


def test_a_session_is_opened_once_for_each_shape() -> None:
    harness = Harness(room=100)
    for value in range(3):
        harness.runner([canvas(value)])
        harness.runner([canvas(value, 96, 32)])
    assert harness.opened == [(1, 64, 64), (1, 96, 32)]


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
    with pytest.raises(RuntimeError, match="out of data bounds"):
        harness.runner([canvas(255)])
    assert harness.runner.shapes() == []
    values, _ = harness.runner([canvas(2)])
    assert values.tolist() == [2]
    assert harness.opened == [(1, 64, 64)] * 2


# Lanes: one set of buffers, used for batch after batch


TWO_SMALL = InputShape(2, 64, 64)


def lanes_of(count: int, shape: InputShape = TWO_SMALL) -> list[Lane]:
    session = open_fixed(probe(), shape)
    return [Lane(session, shape, "cpu", number) for number in range(count)]


def addresses(lane: Lane) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in (lane.inputs | lane.outputs).items()}


def answer(lane: Lane, *canvases: CanvasImage) -> list[Any]:
    lane.load(canvases)
    lane.run()
    return [output.tolist() for output in lane.read(len(canvases))]


def test_a_lane_reads_and_writes_the_same_addresses_run_after_run() -> None:
    [lane] = lanes_of(1)
    before = addresses(lane)
    assert len(set(before.values())) == 4
    for value in (3, 4, 5):
        assert answer(lane, canvas(value), canvas(value + 10)) == [[value, value + 10], [[50, 60]] * 2]
        assert addresses(lane) == before
        assert lane.outputs["values"].numpy()[0] == value, "the graph wrote into our memory, not into some of its own"


def test_an_answer_is_not_changed_by_the_next_one() -> None:
    [lane] = lanes_of(1)
    lane.load([canvas(1)])
    lane.run()
    first = lane.read(1)
    answer(lane, canvas(2))
    assert first[0].tolist() == [1]


def test_two_lanes_of_a_session_do_not_touch_each_other() -> None:
    one, other = lanes_of(2)
    one.load([canvas(1), canvas(2)])
    other.load([canvas(3), canvas(4)])
    one.run()
    other.run()
    assert one.read(2)[0].tolist() == [1, 2]
    assert other.read(2)[0].tolist() == [3, 4]


def test_a_graph_whose_outputs_have_no_fixed_size_is_refused() -> None:
    session = ort.InferenceSession(
        onnx.parser.parse_model(
            """
            <ir_version: 10, opset_import: ["" : 18]>
            loose (uint8[batch,height,width,3] images, int64[batch,2] sizes) => (int64[2,some] places) {
                places = NonZero(sizes)
            }
            """
        ).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    with pytest.raises(DeviceUnavailable, match=r"places .* is not of a fixed size"):
        Lane(session, InputShape(1, 8, 8), "cpu")


# Two threads


@pytest.fixture
def watched() -> type[Watched]:
    Watched.running = Watched.most_running = 0
    Watched.gate, Watched.lock = threading.Event(), threading.Lock()
    return Watched


def test_one_batch_runs_at_a_time_and_the_next_is_laid_in_meanwhile(watched: type[Watched]) -> None:
    harness = Harness(room=100, session=watched)
    laid_in = []

    class Telling(CanvasImage):
        """Says when its pixels are taken."""

        @property
        def size(self) -> tuple[int, int]:  # type: ignore[override]
            laid_in.append(int(self.pixels[0, 0, 0]))
            return 50, 60

    def tell(value: int) -> CanvasImage:
        told = object.__new__(Telling)
        object.__setattr__(told, "pixels", np.full((64, 64, 3), value, np.uint8))
        return told

    with ThreadPoolExecutor(LANES) as pool:
        answers = [pool.submit(harness.runner, [tell(value)]) for value in (1, 2)]
        wait_for(lambda: sorted(laid_in) == [1, 2])
        assert Watched.running == 1
        watched.gate.set()
        assert sorted(float(each.result()[0][0]) for each in answers) == [1, 2]
    assert (Watched.most_running, len(harness.opened)) == (1, 1)


def test_more_callers_than_lanes_get_their_own_answers() -> None:
    harness = Harness(room=100)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda value: harness.runner([canvas(value % 200)])[0].tolist(), range(400)))
    assert answers == [[value % 200] for value in range(400)]
    assert len(harness.opened) == 1


def test_callers_with_more_shapes_than_room_get_their_own_answers() -> None:
    harness = Harness(room=1)
    shapes = [(64, 64), (128, 32), (32, 128)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda v: harness.runner([canvas(v, *shapes[v % 3])])[0].tolist(), range(120)))
    assert answers == [[value] for value in range(120)]
    assert len(harness.runner.shapes()) == 1


def test_a_session_in_use_is_not_closed_to_make_room(watched: type[Watched]) -> None:
    harness = Harness(room=1, session=watched)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(harness.runner, [canvas(1)])
        wait_for(lambda: Watched.running == 1)
        second = pool.submit(harness.runner, [canvas(2, 128, 32)])
        time.sleep(0.05)
        assert harness.opened == [(1, 64, 64)], "there is no room yet"
        watched.gate.set()
        assert (first.result()[0].tolist(), second.result()[0].tolist()) == ([1], [2])
    assert harness.runner.shapes() == [(1, 128, 32)]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


# Room


def test_there_is_room_for_what_is_open_and_for_what_closes_nothing() -> None:
    harness = Harness(room=2)
    assert harness.runner.has_room(2, 64, 64)
    assert not harness.runner.has_room(3, 64, 64)
    harness.runner([canvas(1)])
    assert harness.runner.has_room(1, 64, 64)
    assert harness.runner.has_room(1, 32, 128)
    assert not harness.runner.has_room(2, 64, 64)


def test_a_closed_sessions_memory_is_given_back() -> None:
    """Each session has 4 MB of buffers; twenty of them, one open at a time, hold no more than a few."""
    harness = Harness(room=16)
    process = psutil.Process()

    def grown_by(shapes: int) -> int:
        before = process.memory_info().rss
        for number in range(shapes):
            harness.runner([canvas(1, 256 + 32 * (number % 2), 1024 + 32 * number)])
        return process.memory_info().rss - before

    grown_by(5)
    assert grown_by(20) < 30 * 2**20
    assert len(harness.runner.shapes()) == 1


def test_fixed_shapes_answer_as_one_session_for_all_does(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    model = (tmp_path / "a.onnx").read_bytes()

    fixed = FixedShapes(
        lambda shape: open_fixed(model, shape), memory="cpu", weight_bytes=len(model), limit_bytes=2**30
    )
    free = AnyShape(open_on_cpu(model, threads=1))
    for count, height, width in [(1, 60, 80), (3, 60, 80), (2, 80, 60), (3, 60, 80), (1, 1, 1)]:
        batch = pictures(count, height, width)
        for one, other in zip(fixed(batch), free(batch), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def pictures(count: int, height: int, width: int) -> Sequence[CanvasImage]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [to_canvas(cv2.resize(picture, (width, height)), SMALL) for picture in coarse]


def test_with_every_size_fixed_the_shipped_graph_computes_no_shapes() -> None:
    """ONNX Runtime would do that on the CPU, and so would a Gather that reads a shape."""
    session = open_fixed(PRETRAINED.read_bytes(), InputShape(2, 96, 128))
    operators = operators_on(session, "CPUExecutionProvider")
    assert {"Conv", "TopK", "GatherElements"} <= operators
    assert not operators & {"Shape", "Size", "Gather", "NonZero", "Range", "ConstantOfShape"}
    assert [output.shape for output in session.get_outputs()] == [[2, 5000, 4], [2, 5000], [2, 5000]]
