"""Sessions of fixed shapes, their lanes, threads and budget, with the CPU in the GPU's place."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import psutil
import pytest

from model.image import to_canvas
from model.metadata import ResizePolicy
from model.runtime.cpu import CpuRuntime, open_on_cpu
from model.runtime.cuda import CudaLane, CudaRuntime, common_batches
from model.runtime.cuda_device import CudaDevice
from model.runtime.cuda_session import CudaOptions, InputShape, fixed_shape_options
from model.runtime.session import DeviceUnavailable
from model.types import CanvasImage
from tests.model.runtime.probe import canvas, loose_probe, open_fixed, probe
from tests.support.serving import wait_until
from tests.support.tiny_model import SMALL, write_tiny_model

COPIED_BYTES = 2 * 3 * 64 * 64
"""Bytes of a canvas of 64 × 64 in two lanes."""
OUT_OF_MEMORY = RuntimeError("bfc_arena.cc:360 Available memory of 1 is smaller than requested bytes of 2")


class Watched(ort.InferenceSession):
    """Notes the runs in progress and their threads, in all of them; can be held there, and fails if told."""

    running = 0
    most_running = 0
    threads: set[str]
    gate: threading.Event
    lock: threading.Lock
    error: Exception | None

    def run_with_iobinding(self, iobinding: ort.IOBinding, run_options: ort.RunOptions | None = None) -> None:
        with Watched.lock:
            Watched.running += 1
            Watched.most_running = max(Watched.most_running, Watched.running)
            Watched.threads.add(threading.current_thread().name)
        assert Watched.gate.wait(20)
        with Watched.lock:
            Watched.running -= 1
        if Watched.error is not None:
            raise Watched.error
        super().run_with_iobinding(iobinding, run_options)


@pytest.fixture(autouse=True)
def watched() -> Iterator[type[Watched]]:
    Watched.running = Watched.most_running = 0
    Watched.threads, Watched.error = set(), None
    Watched.gate, Watched.lock = threading.Event(), threading.Lock()
    Watched.gate.set()
    yield Watched
    Watched.gate.set()


class Harness:
    """A runtime over real sessions, on the CPU, with room for `room` canvases of 64 × 64."""

    def __init__(self, room: int = 100, device: CudaDevice | None = None) -> None:
        self.opened: list[InputShape] = []
        self.alive: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()
        """Sessions whose memory is still held."""
        self.gate = threading.Event()
        """Openings wait while it is not set."""
        self.gate.set()
        self.error: Exception | None = None
        self.model = probe()
        self.device = device or CudaDevice("cpu", room * COPIED_BYTES, CudaOptions())
        self.runtime = CudaRuntime(self.open, self.device, SMALL, weight_bytes=0, bytes_per_pixel=0)
        self.run = self.runtime.run

    def open(self, shape: InputShape) -> ort.InferenceSession:
        self.opened.append(shape)
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        options = fixed_shape_options(shape, threads=1)
        session = Watched(self.model, options, providers=["CPUExecutionProvider"])
        self.alive.add(session)
        return session

    def lane(self, height: int = 64, width: int = 64, count: int = 1) -> CudaLane | None:
        return self.runtime.free_lane((height, width), count, concurrent=False)

    def opened_lane(self, height: int = 64, width: int = 64, count: int = 1) -> CudaLane:
        """Asked for again until it is there."""
        found: list[CudaLane] = []

        def ask() -> bool:
            lane = self.lane(height, width, count)
            found.extend([] if lane is None else [lane])
            return bool(found)

        wait_until(ask)
        return found[0]


# Batches and sessions


def test_a_batch_is_padded_to_the_next_power_of_two_and_only_its_own_rows_come_back() -> None:
    harness = Harness()
    for count, padded in [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16)]:
        values, sizes = harness.run([canvas(value) for value in range(count)])
        assert values.tolist() == list(range(count))
        assert sizes.tolist() == [[50, 60]] * count
        assert harness.runtime.shapes()[-1] == InputShape(padded, 64, 64)


def test_a_session_is_opened_once_for_each_shape() -> None:
    harness = Harness()
    for value in range(3):
        harness.run([canvas(value)])
        harness.run([canvas(value, 96, 32)])
    assert harness.opened == [(1, 64, 64), (1, 96, 32)]


def test_an_earlier_batch_leaves_nothing_in_a_smaller_ones_answer() -> None:
    harness = Harness()
    harness.run([canvas(7, valid=(1, 2))] * 4)
    values, sizes = harness.run([canvas(8)] * 3)
    assert values.tolist() == [8, 8, 8]
    assert sizes.tolist() == [[50, 60]] * 3


def test_fixed_shapes_answer_as_one_session_for_all_does(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    model = (tmp_path / "a.onnx").read_bytes()
    device = CudaDevice("cpu", 2**30, CudaOptions())
    fixed = CudaRuntime(lambda shape: open_fixed(model, shape), device, SMALL, weight_bytes=0, bytes_per_pixel=1)
    free = CpuRuntime(open_on_cpu(model, threads=1), SMALL)
    for count, height, width in [(1, 60, 80), (3, 60, 80), (2, 80, 60), (3, 60, 80), (1, 1, 1)]:
        batch = pictures(count, height, width)
        for one, other in zip(fixed.run(batch), free.run(batch), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def pictures(count: int, height: int, width: int) -> Sequence[CanvasImage]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [to_canvas(cv2.resize(picture, (width, height)), SMALL) for picture in coarse]


# The budget


def test_the_least_recently_used_session_is_closed_first() -> None:
    harness = Harness(room=2)
    tall, wide, square = canvas(1, 128, 32), canvas(1, 32, 128), canvas(1)
    for image in (tall, wide, tall, square):
        harness.run([image])
    assert harness.runtime.shapes() == [(1, 128, 32), (1, 64, 64)]
    harness.run([wide])
    assert harness.runtime.shapes() == [(1, 64, 64), (1, 32, 128)]


def test_an_idle_session_is_closed_rather_than_one_in_use() -> None:
    harness = Harness(room=2)
    harness.run([canvas(1)])
    in_use = harness.opened_lane()
    harness.run([canvas(1, 32, 128)])
    harness.run([canvas(1, 128, 32)])
    assert harness.runtime.shapes() == [(1, 64, 64), (1, 128, 32)]
    in_use.run([canvas(1)])


def test_a_large_batch_makes_room_by_closing_several() -> None:
    harness = Harness(room=4)
    for width in (32, 64, 96):
        harness.run([canvas(1, 32, width)])
    harness.run([canvas(1)] * 4)
    assert harness.runtime.shapes() == [(4, 64, 64)]


def test_a_shape_larger_than_the_limit_runs_alone() -> None:
    harness = Harness(room=1)
    harness.run([canvas(1)])
    values, _ = harness.run([canvas(3)] * 2)
    assert values.tolist() == [3, 3]
    assert harness.runtime.shapes() == [(2, 64, 64)]


def test_there_is_room_for_what_is_open_and_for_what_closes_nothing() -> None:
    harness = Harness(room=2)
    assert harness.runtime.has_room(2, (64, 64))
    assert not harness.runtime.has_room(3, (64, 64))
    harness.run([canvas(1)])
    assert harness.runtime.has_room(1, (64, 64))
    assert harness.runtime.has_room(1, (32, 128))
    assert not harness.runtime.has_room(2, (64, 64))


@pytest.mark.parametrize(("capture_graph", "both"), [(False, True), (True, False)])
def test_activations_count_once_but_where_graphs_are_captured(capture_graph: bool, both: bool) -> None:
    activation_bytes = 60 * 64 * 64
    options = CudaOptions(capture_graph=capture_graph)
    device = CudaDevice("cpu", 2 * COPIED_BYTES + activation_bytes, options)
    runtime = CudaRuntime(lambda shape: open_fixed(probe(), shape), device, SMALL, weight_bytes=0, bytes_per_pixel=60)
    runtime.run([canvas(1)])
    assert runtime.has_room(1, (32, 128)) is both
    runtime.run([canvas(1, 32, 128)])
    assert len(runtime.shapes()) == (2 if both else 1)


def test_two_runtimes_share_one_budget() -> None:
    device = CudaDevice("cpu", 2 * COPIED_BYTES, CudaOptions())
    old, new = Harness(device=device), Harness(device=device)
    old.run([canvas(1)])
    old.run([canvas(1, 32, 128)])
    assert not new.runtime.has_room(1, (64, 64))
    values, _ = new.run([canvas(5)])
    assert values.tolist() == [5]
    assert (old.runtime.shapes(), new.runtime.shapes()) == ([(1, 32, 128)], [(1, 64, 64)])


def test_a_runtime_that_is_gone_leaves_its_room_to_the_others() -> None:
    device = CudaDevice("cpu", COPIED_BYTES, CudaOptions())
    new = Harness(device=device)
    old = CudaRuntime(lambda shape: open_fixed(probe(), shape), device, SMALL, weight_bytes=0, bytes_per_pixel=0)
    old.run([canvas(1)])
    assert not new.runtime.has_room(1, (64, 64))
    gc.disable()  # a service's garbage collector seldom looks at what is old
    try:
        del old
        wait_until(lambda: new.runtime.has_room(1, (64, 64)))
    finally:
        gc.enable()


def test_a_closed_sessions_memory_is_given_back() -> None:
    """Each session has 4 MB of buffers; twenty of them, one open at a time, hold no more than a few."""
    harness = Harness(room=100)
    process = psutil.Process()

    def grown_by(shapes: int) -> int:
        before = process.memory_info().rss
        for number in range(shapes):
            harness.run([canvas(1, 256 + 32 * (number % 2), 1024 + 32 * number)])
        return process.memory_info().rss - before

    grown_by(5)
    assert grown_by(20) < 30 * 2**20
    assert len(harness.runtime.shapes()) == 1


# Threads


def test_one_batch_runs_at_a_time_and_the_next_is_laid_in_meanwhile(watched: type[Watched]) -> None:
    harness = Harness()
    laid_in = []
    watched.gate.clear()

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

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(harness.run, [tell(value)]) for value in (1, 2)]
        wait_until(lambda: sorted(laid_in) == [1, 2])
        assert Watched.running == 1
        watched.gate.set()
        assert sorted(float(each.result()[0][0]) for each in answers) == [1, 2]
    assert (Watched.most_running, len(harness.opened)) == (1, 1)


def test_one_thread_of_the_process_alone_runs_sessions(watched: type[Watched]) -> None:
    device = CudaDevice("cpu", 2**30, CudaOptions())
    one, other = Harness(device=device), Harness(device=device)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda value: (one if value % 2 else other).run([canvas(1, 64, 32 + value % 3)]), range(40)))
    assert watched.threads == {"cuda_run"}
    assert watched.most_running == 1


def test_more_callers_than_lanes_get_their_own_answers() -> None:
    harness = Harness()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda value: harness.run([canvas(value % 200)])[0].tolist(), range(400)))
    assert answers == [[value % 200] for value in range(400)]
    assert len(harness.opened) == 1


def test_callers_with_more_shapes_than_room_get_their_own_answers() -> None:
    harness = Harness(room=1)
    shapes = [(64, 64), (128, 32), (32, 128)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda v: harness.run([canvas(v, *shapes[v % 3])])[0].tolist(), range(120)))
    assert answers == [[value] for value in range(120)]
    assert len(harness.runtime.shapes()) == 1


def test_a_session_in_use_is_not_closed_to_make_room(watched: type[Watched]) -> None:
    harness = Harness(room=1)
    watched.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(harness.run, [canvas(1)])
        wait_until(lambda: Watched.running == 1)
        second = pool.submit(harness.run, [canvas(2, 128, 32)])
        time.sleep(0.05)
        assert harness.opened == [(1, 64, 64)], "there is no room yet"
        watched.gate.set()
        assert (first.result()[0].tolist(), second.result()[0].tolist()) == ([1], [2])
    assert harness.runtime.shapes() == [(1, 128, 32)]


@pytest.mark.parametrize(("grace_seconds", "is_kept"), [(20, True), (0.01, False)])
def test_a_session_that_has_just_opened_is_not_closed_for_another_before_its_run_if_that_comes_soon(
    monkeypatch: pytest.MonkeyPatch, grace_seconds: float, is_kept: bool
) -> None:
    monkeypatch.setattr("model.runtime.cuda_device.GRACE_SECONDS", grace_seconds)
    harness = Harness(room=1)
    assert harness.lane() is None and harness.lane(32, 128) is None
    wait_until(lambda: len(harness.runtime.shapes()) == 1)
    if is_kept:
        time.sleep(0.05)
        assert harness.runtime.shapes() == [(1, 64, 64)]
        harness.opened_lane().run([canvas(1)])
    wait_until(lambda: harness.runtime.shapes() == [(1, 32, 128)])
    assert len(harness.opened) == 2


HANGS = """
import threading
from model.runtime.cuda import CudaRuntime
from model.runtime.cuda_device import CudaDevice
from model.runtime.cuda_session import CudaOptions
from model.runtime.session import DeviceUnavailable
from tests.model.runtime.probe import canvas, loose_probe, open_fixed, probe

device = CudaDevice("cpu", 2**30, CudaOptions())
runtime = CudaRuntime(lambda shape: open_fixed(probe(), shape), device, None, weight_bytes=0, bytes_per_pixel=0)
hangs, forever = threading.Event(), threading.Event()
runtime.run([canvas(1)])

class Stuck:
    def run(self):
        hangs.set()
        forever.wait()

threading.Thread(target=device.run, args=(Stuck(),), daemon=True).start()
hangs.wait()
assert runtime.free_lane((64, 64), 1, concurrent=False) is not None
assert runtime.free_lane((32, 32), 1, concurrent=False) is None
"""


def test_a_hung_run_keeps_neither_free_lane_nor_the_end_of_the_process_waiting() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=60, check=False).returncode == 0


# Lanes


def test_a_lane_is_not_waited_for_and_an_opening_holds_up_no_other_canvas(watched: type[Watched]) -> None:
    harness = Harness()
    harness.run([canvas(1)])
    harness.gate.clear()
    for _ in range(3):
        assert harness.lane(32, 128) is None
    wait_until(lambda: harness.opened[1:] == [(1, 32, 128)])
    lane = harness.lane()
    assert lane is not None, "while another canvas's session opens"
    assert lane.run([canvas(7)])[0].tolist() == [7]
    assert harness.run([canvas(8)])[0].tolist() == [8]
    harness.gate.set()
    assert harness.opened_lane(32, 128).run([canvas(9, 32, 128)])[0].tolist() == [9]
    assert len(harness.opened) == 2, "it was asked for once"


def test_sessions_open_one_at_a_time() -> None:
    harness = Harness()
    harness.gate.clear()
    assert harness.lane(32, 128) is None and harness.lane(128, 32) is None
    wait_until(lambda: bool(harness.opened))
    time.sleep(0.05)
    assert len(harness.opened) == 1
    harness.gate.set()
    wait_until(lambda: len(harness.runtime.shapes()) == 2)


def test_no_more_lanes_are_out_than_there_are() -> None:
    harness = Harness()
    for width in (64, 128):
        harness.run([canvas(1, 64, width)])
    lanes = [harness.lane(), harness.lane(64, 128)]
    assert None not in lanes and harness.runtime.lanes == 2
    assert harness.lane() is None and harness.lane(64, 128) is None
    assert lanes[0].run([canvas(3)])[0].tolist() == [3]  # type: ignore[union-attr]
    assert harness.lane(64, 128) is not None


def told_of(harness: Harness) -> list[str]:
    """The threads on which it was told that a lane became free."""
    told: list[str] = []
    harness.runtime.when_lane_freed(lambda: told.append(threading.current_thread().name))
    return told


def test_the_line_is_told_when_a_session_has_opened_or_a_run_outside_it_ended() -> None:
    harness = Harness()
    told = told_of(harness)
    assert harness.lane() is None
    wait_until(lambda: told == ["cuda_open"])
    harness.opened_lane().run([canvas(1)])
    assert told == ["cuda_open"], "the end of a lane's own run is its owner's to know"
    harness.run([canvas(1)])
    assert told == ["cuda_open", threading.current_thread().name]


def test_what_is_told_may_ask_for_a_lane() -> None:
    harness = Harness()
    lanes: list[CudaLane | None] = []
    harness.runtime.when_lane_freed(lambda: lanes.append(harness.lane()))
    assert harness.lane() is None
    wait_until(lambda: len(lanes) == 1)
    assert lanes[0] is not None and lanes[0].run([canvas(4)])[0].tolist() == [4]


# Failures


def test_an_opening_that_fails_is_a_lane_whose_run_raises_and_then_is_tried_again() -> None:
    harness = Harness()
    told = told_of(harness)
    harness.run([canvas(1, 32, 32)])
    harness.error = OSError("no such device")
    assert harness.lane() is None
    lane = harness.opened_lane()
    assert told[-1] == "cuda_open"
    with pytest.raises(OSError, match="no such device"):
        lane.run([canvas(1)])
    with pytest.raises(OSError, match="no such device"):
        harness.run([canvas(1)])
    harness.error = None
    assert harness.run([canvas(2)])[0].tolist() == [2]
    assert harness.opened == [(1, 32, 32)] + [(1, 64, 64)] * 3


def test_after_a_failure_a_session_is_opened_anew_and_the_others_stay_open() -> None:
    harness = Harness()
    for width in (64, 128):
        harness.run([canvas(1, 64, width)])
    with pytest.raises(RuntimeError, match="out of data bounds"):
        harness.run([canvas(255)])
    assert harness.runtime.shapes() == [(1, 64, 128)]
    values, _ = harness.run([canvas(2)])
    assert values.tolist() == [2]
    harness.run([canvas(2, 64, 128)])
    assert harness.opened == [(1, 64, 64), (1, 64, 128), (1, 64, 64)]


def test_the_other_lane_of_a_session_that_failed_ends_well_and_is_on_the_books_until_then() -> None:
    harness = Harness(room=1)
    harness.run([canvas(1)])
    good, bad = harness.opened_lane(), harness.opened_lane()
    with pytest.raises(RuntimeError, match="out of data bounds"):
        bad.run([canvas(255)])
    assert harness.runtime.shapes() == []
    assert not harness.runtime.has_room(1, (32, 32)), "its memory is still in use"
    assert good.run([canvas(3)])[0].tolist() == [3]
    assert harness.runtime.has_room(1, (32, 32))


def test_where_memory_was_short_idle_sessions_close_and_those_in_use_stay_on_the_books(
    watched: type[Watched],
) -> None:
    harness = Harness(room=3)
    for width in (64, 32, 16):
        harness.run([canvas(1, 64, width)])
    in_use, failing = harness.opened_lane(), harness.opened_lane(64, 32)
    watched.error = OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="smaller than requested"):
        failing.run([canvas(1, 64, 32)])
    watched.error = None
    assert harness.runtime.shapes() == [(1, 64, 64)]
    assert harness.runtime.has_room(2, (64, 64)) and not harness.runtime.has_room(3, (64, 64))
    assert in_use.run([canvas(6)])[0].tolist() == [6]
    assert harness.opened.count(InputShape(1, 64, 64)) == 1


def test_a_session_that_failed_does_not_live_on_in_its_error() -> None:
    harness = Harness()
    harness.run([canvas(1)])
    with pytest.raises(RuntimeError, match="out of data bounds") as caught:
        harness.run([canvas(255)])
    assert caught.value.__traceback__ is not None
    wait_until(lambda: not harness.alive)


def test_a_session_that_opened_and_cannot_be_used_does_not_live_on_in_its_error() -> None:
    harness = Harness()
    harness.model = loose_probe()
    with pytest.raises(DeviceUnavailable, match="not of a fixed size"):
        harness.run([canvas(1)])
    wait_until(lambda: not harness.alive)


# Warming up


def test_what_is_warmed_is_each_common_canvas_in_each_batch_that_gets_a_session() -> None:
    batches = common_batches(ResizePolicy(), max_batch_size=6)
    sizes = [batch[0].canvas_size for batch in batches]
    assert [len(batch) for batch in batches] == [1] * 7 + [2] * 7 + [4] * 7 + [6] * 7
    assert sizes[:7] == [(800, 800), (800, 1088), (1088, 800), (800, 1216), (1216, 800), (768, 1344), (1344, 768)]
    assert sizes == sizes[:7] * 4
    assert len(common_batches(ResizePolicy(), max_batch_size=1)) == 7


def test_warming_up_opens_what_has_room_and_says_what_has_none(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(room=8)
    warmed = list(harness.runtime.warm_up(max_batch_size=2))
    batches = common_batches(SMALL, 2)
    assert 1 < len(warmed) == len(harness.runtime.shapes()) < len(batches)
    left = len(batches) - len(warmed)
    assert (
        f"{left} of the {len(batches)} common canvases and batch sizes do not fit into the memory budget" in caplog.text
    )


def test_a_canvas_that_runs_out_of_memory_while_warming_up_is_one_without_room(
    watched: type[Watched], caplog: pytest.LogCaptureFixture
) -> None:
    harness = Harness()
    watched.error = OUT_OF_MEMORY
    assert list(harness.runtime.warm_up(max_batch_size=1)) == []
    assert "do not fit into the memory budget" in caplog.text
    watched.error = ValueError("anything else")
    with pytest.raises(ValueError, match="anything else"):
        list(harness.runtime.warm_up(max_batch_size=1))
