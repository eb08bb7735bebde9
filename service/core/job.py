"""One picture on its way through the line, and its stopwatch.

A `Job` has *parts*, the canvases to run: one, or with tiles the whole picture and its windows, which are cut when they
are needed, a few at a time; after each few the job goes behind all that wait. Its encoded bytes, its picture, its
options and its answer belong to whoever works on it; `state` and all below it belong to the line, and change under its
lock alone, but for what is cut: `picture`, `picture_size`, `uncut` and `found`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from model.image import MAX_PIXELS
from model.tiles import Found, Tiling, Window
from model.types import Candidates, CanvasImage, Detections, Pixels
from service.core.store import LoadedModel


class DeadlineExceeded(Exception):
    """The answer was not there in time; work not begun by then is not done. Try again when there is less load."""


@dataclass(frozen=True)
class Options:
    """The options of one request."""

    score_threshold: float
    nms_threshold: float
    max_detections: int
    label_ids: Collection[int] | None = None
    tiling: Tiling | None = None


@dataclass
class Stopwatch:
    """Seconds by stage. The stages touch: each lap begins where the last one ended."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    _last: float = 0

    def __post_init__(self) -> None:
        self._last = self._last or self.started

    def lap(self, stage: str, end: float | None = None) -> None:
        """Book the time since the last lap under this stage, up to `end` (time.perf_counter(); now)."""
        now = time.perf_counter() if end is None else end
        self.stages[stage] = self.stages.get(stage, 0) + now - self._last
        self._last = now

    def copy(self) -> "Stopwatch":
        return Stopwatch(self.started, dict(self.stages), self._last)

    @property
    def total(self) -> float:
        return self._last - self.started


@dataclass(frozen=True, eq=False)
class Detected:
    """One picture's outcome: detections in original pixels."""

    detections: Detections
    original_size: tuple[int, int]
    model: LoadedModel
    watch: Stopwatch


Finish = Callable[[Detected, "Job"], Any]
"""Makes the answer out of what was detected and, for a drawing, the job's picture; its result is the future's."""


class State(Enum):
    ENCODED = auto()
    DECODING = auto()
    READY = auto()
    """Parts of it wait for the device."""
    RUNNING = auto()
    """All parts of it that have not run are on the device."""
    RAN = auto()


@dataclass(eq=False)
class Part:
    """One canvas of a job: what batches are made of."""

    job: "Job"
    canvas: CanvasImage
    ready_at: float = 0
    """time.monotonic()"""
    alone: bool = False
    """A batch that held it failed: it is run again, first and by itself."""
    candidates: Candidates | None = None
    window: Window | None = None
    """The rectangle of the picture that it shows, where its job has tiles."""

    @property
    def group(self) -> tuple[LoadedModel, tuple[int, int]]:
        """Parts of one group may share a batch."""
        return self.job.model, self.canvas.canvas_size


@dataclass(eq=False)
class Job:
    data: bytearray
    """The encoded picture; empty once it is decoded, unless its answer is a drawing."""
    model: LoadedModel
    """Its own from the start: neither a reload nor a neighbour in the batch changes it."""
    options: Options
    deadline: float
    """time.monotonic() after which nobody waits."""
    watch: Stopwatch
    finish: Finish
    draws: bool
    """Its answer takes as long as a decode: it is made where pictures are decoded, and its place lasts until then."""
    future: "asyncio.Future[Any]"
    canvases_left: int = 1
    """Those that have not run; until the picture is decoded, by the size that it claims."""
    max_pixels: int = MAX_PIXELS
    """The most that its reader may decode: what its file claims, if that is allowed."""
    decode_bytes: int = 0
    """The most memory that decoding or drawing so many takes."""
    drawing_bytes: int = 0
    """Room for its answer, where that is a drawing."""

    state: State = State.ENCODED
    turn: int = 0
    """Its position in the line: of two that could go on, the smaller turn does."""
    gone: bool = False
    """Failed, cancelled or late: nothing more is begun for it."""
    in_hand: int = 0
    """Pieces of it that workers have: its decoding, its drawing, or this many of its parts on the device."""
    parts: list[Part] = field(default_factory=list)
    """Those that were cut last, in order."""
    parts_left: int = 0
    """The number of them that have not run yet, or run now."""
    picture: Pixels | None = None
    """Held while windows are to be cut from it."""
    picture_size: tuple[int, int] = (0, 0)
    """Its height and width, where the job has tiles."""
    uncut: deque[Window] = field(default_factory=deque)
    found: Found | None = None
    """The objects in the windows that were cut before."""

    def answer(self, result: Any) -> None:
        """Hand the answer to whoever waits, from any thread."""
        self.future.get_loop().call_soon_threadsafe(self._settle, self.future.set_result, result)

    def fail(self, error: BaseException) -> None:
        """Hand the error to whoever waits, from any thread."""
        self.future.get_loop().call_soon_threadsafe(self._settle, self.future.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], outcome: Any) -> None:
        """On the event loop."""
        if not self.future.done():
            settle(outcome)
