"""The CPU: a wide session that uses all cores for one run, and a narrow one whose runs share the cores.

A run that is alone takes the wide session. Under concurrent load runs execute in parallel on the narrow session: fewer
threads each waste less of the cores. A run's calling thread computes too, so N callers add N - 1 threads to the
session's own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.metadata import ResizePolicy
from model.runtime.session import CPU, RUNS_AT_ONCE, blank_canvas, open_session, run_options, session_options
from model.types import CanvasImage

LARGE_MODEL_BYTES = 64 * 2**20


class Session(Protocol):
    """The methods of ort.InferenceSession that are used."""

    def run(
        self, output_names: None, input_feed: dict[str, Any], run_options: ort.RunOptions | None
    ) -> list[NDArray[Any]]: ...


class CpuRuntime:
    """See `model.runtime.session.Runtime`."""

    provider = CPU
    tf32 = False
    batch_size = 1

    def __init__(self, wide: Session, resize: ResizePolicy, *, narrow: Session | None = None, lanes: int = 1) -> None:
        """Make a runtime in which `lanes` runs share `narrow`; without `narrow`, runs take turns on `wide`."""
        self.lanes = lanes if narrow is not None else 1
        self._wide, self._narrow, self._resize = wide, narrow, resize
        self._changed = threading.Condition()
        self._taken: list[CpuLane] = []
        self._call: Callable[[], None] = lambda: None

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> "CpuLane | None":
        session = self._narrow if concurrent and self._narrow is not None else self._wide
        with self._changed:
            alone = session is self._wide or any(lane.session is self._wide for lane in self._taken)
            if len(self._taken) >= (1 if alone else self.lanes):
                return None
            lane = CpuLane(session, self._free)
            self._taken.append(lane)
            return lane

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        return self._run(canvases, concurrent=False)

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        self._call = call

    def warm_up(self, max_batch_size: int) -> Iterator[list[NDArray[Any]]]:
        """Run a quarter of a canvas on each session: that finds a broken file, and a slow network starts soon. The
        first picture after it takes a little longer than the next, because it touches new memory."""
        divisor = self._resize.divisor
        height, width = (max(1, side // 2 // divisor) * divisor for side in blank_canvas(self._resize).canvas_size)
        quarter = CanvasImage.uniform((height, width))
        yield self._run([quarter], concurrent=False)
        if self.lanes > 1:
            yield self._run([quarter], concurrent=True)

    def _run(self, canvases: Sequence[CanvasImage], *, concurrent: bool) -> list[NDArray[Any]]:
        with self._changed:  # which the calling thread may take twice
            while (lane := self.free_lane(canvases[0].canvas_size, len(canvases), concurrent=concurrent)) is None:
                self._changed.wait()
        try:
            return lane.run(canvases)
        finally:
            self._call()

    def _free(self, lane: "CpuLane") -> None:
        with self._changed:
            self._taken.remove(lane)
            self._changed.notify_all()


class CpuLane:
    """See `model.runtime.session.Lane`."""

    def __init__(self, session: Session, free: Callable[["CpuLane"], None]) -> None:
        self.session, self._free = session, free

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        try:
            pixels = [canvas.pixels for canvas in canvases]
            images = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)  # a single canvas is not copied
            sizes = np.array([canvas.size for canvas in canvases], np.int64)
            return self.session.run(None, {"images": images, "sizes": sizes}, run_options())
        finally:
            self._free(self)


def open_on_cpu(model: bytes, threads: int) -> ort.InferenceSession:
    """Open a session of any shape. Raises ONNX Runtime's own exceptions."""
    return open_session(model, session_options(threads), [CPU])


def cpu_runtime(
    model: bytes, wide: ort.InferenceSession, resize: ResizePolicy, *, threads: int, runs_at_once: int | None
) -> CpuRuntime:
    """Make the runtime of a file that is open as `wide` on all `threads`.

    A second session holds the weights once more for a gain of some percent, so `runs_at_once` is by default 1 for a
    file over 64 MiB, else 2.
    """
    if runs_at_once is None:
        runs_at_once = RUNS_AT_ONCE if len(model) <= LARGE_MODEL_BYTES else 1
    if threads == 1 or runs_at_once == 1:
        return CpuRuntime(wide, resize)
    return CpuRuntime(wide, resize, narrow=open_on_cpu(model, max(1, threads + 1 - runs_at_once)), lanes=runs_at_once)
