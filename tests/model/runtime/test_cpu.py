"""The CPU's lanes on sessions written by hand, and the sessions themselves."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.metadata import ResizePolicy
from model.runtime.cpu import CpuRuntime, cpu_runtime, open_on_cpu
from model.types import CanvasImage
from tests.support.tiny_model import SMALL, write_tiny_model


class HandSession:
    """Notes what it is given; can be held, and fails if told."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run(self, output_names: None, input_feed: dict[str, Any], run_options: object) -> list[np.ndarray]:
        self.inputs.append(input_feed)
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return [input_feed["sizes"]]

    @property
    def canvas_sizes(self) -> list[tuple[int, int]]:
        return [given["images"].shape[1:3] for given in self.inputs]


CANVAS = CanvasImage.uniform((32, 64), 1)


def free_lane(runtime: CpuRuntime, concurrent: bool) -> Any:
    return runtime.free_lane((32, 64), 1, concurrent=concurrent)


def shared(lanes: int = 2) -> tuple[CpuRuntime, HandSession, HandSession]:
    wide, narrow = HandSession(), HandSession()
    return CpuRuntime(wide, SMALL, narrow=narrow, lanes=lanes), wide, narrow


# The table: lanes taken before, by `concurrent`; then what is asked for, and whether it is there. W: wide, N: narrow.


@pytest.mark.parametrize(
    ("taken", "concurrent", "session"),
    [
        ("", False, "wide"),
        ("", True, "narrow"),
        ("W", False, None),
        ("W", True, None),
        ("N", False, None),
        ("N", True, "narrow"),
        ("NN", True, "narrow"),
        ("NNN", True, None),
        ("NN", False, None),
    ],
)
def test_a_run_has_all_cores_alone_or_shares_them(taken: str, concurrent: bool, session: str | None) -> None:
    runtime, wide, narrow = shared(lanes=3)
    for each in taken:
        assert free_lane(runtime, concurrent=each == "N") is not None
    lane = free_lane(runtime, concurrent)
    assert (lane and lane.session) is {"wide": wide, "narrow": narrow, None: None}[session]


@pytest.mark.parametrize("concurrent", [False, True])
def test_without_a_narrow_session_runs_take_turns_on_the_wide_one(concurrent: bool) -> None:
    runtime = CpuRuntime(wide := HandSession(), SMALL, lanes=2)
    assert runtime.lanes == 1
    assert free_lane(runtime, concurrent).session is wide
    assert free_lane(runtime, not concurrent) is None


@pytest.mark.parametrize("error", [None, RuntimeError("a run fails")])
@pytest.mark.parametrize("concurrent", [False, True])
def test_a_lane_is_free_again_when_its_run_ends_however_it_ends(concurrent: bool, error: Exception | None) -> None:
    runtime, wide, narrow = shared()
    wide.error = narrow.error = error
    for _ in range(3):
        lane = free_lane(runtime, concurrent)
        try:
            assert lane.run([CANVAS])[0].tolist() == [[32, 64]]
        except RuntimeError as raised:
            assert raised is error
    assert free_lane(runtime, not concurrent) is not None


def test_a_caller_without_a_lane_waits_for_the_wide_one_and_tells_when_it_is_free() -> None:
    runtime, wide, narrow = shared()
    told: list[bool] = []
    runtime.when_lane_freed(lambda: told.append(free_lane(runtime, concurrent=True) is not None))
    lane = free_lane(runtime, concurrent=True)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(runtime.run, [CANVAS])
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        assert not wide.inputs
        lane.run([CANVAS])
        assert waiting.result(20)[0].tolist() == [[32, 64]]
    assert (len(wide.inputs), len(narrow.inputs)) == (1, 1)
    assert told == [True], "once: the end of a lane's own run is its owner's to know"


def test_a_single_canvas_is_not_copied_on_its_way_into_the_session() -> None:
    runtime = CpuRuntime(session := HandSession(), SMALL)
    runtime.run([CANVAS])
    assert np.shares_memory(session.inputs[0]["images"], CANVAS.pixels)


def test_canvases_become_one_batch_with_their_sizes() -> None:
    runtime = CpuRuntime(session := HandSession(), SMALL)
    batch = [CanvasImage(np.full((32, 64, 3), value, np.uint8), (value, 60), (1, 1)) for value in (3, 4)]
    assert runtime.run(batch)[0].tolist() == [[3, 60], [4, 60]]
    assert session.inputs[0]["images"][:, 0, 0, 0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("resize", "size"), [(ResizePolicy(), (384, 544)), (SMALL, (32, 32)), (ResizePolicy(32, 32, 32), (32, 32))]
)
def test_a_quarter_of_a_canvas_warms_each_session(resize: ResizePolicy, size: tuple[int, int]) -> None:
    wide, narrow = HandSession(), HandSession()
    assert len(list(CpuRuntime(wide, resize, narrow=narrow, lanes=2).warm_up(8))) == 2
    assert wide.canvas_sizes == narrow.canvas_sizes == [size]
    assert len(list(CpuRuntime(wide, resize).warm_up(8))) == 1


# Real sessions


@pytest.mark.parametrize(("runs_at_once", "threads_each"), [(2, 3), (3, 2), (8, 1)])
def test_a_narrow_session_leaves_the_other_callers_a_core(tmp_path: Path, runs_at_once: int, threads_each: int) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    model = (tmp_path / "a.onnx").read_bytes()
    runtime = cpu_runtime(model, open_on_cpu(model, 4), SMALL, threads=4, runs_at_once=runs_at_once)
    assert runtime.lanes == runs_at_once
    assert threads_of(runtime, concurrent=True) == [threads_each] * runs_at_once
    runtime = cpu_runtime(model, open_on_cpu(model, 4), SMALL, threads=4, runs_at_once=runs_at_once)
    assert threads_of(runtime, concurrent=False) == [4]


def threads_of(runtime: CpuRuntime, concurrent: bool) -> Sequence[int]:
    """Threads of each lane that can be taken at once."""
    lanes = iter(lambda: free_lane(runtime, concurrent), None)
    return [lane.session.get_session_options().intra_op_num_threads for lane in lanes]
