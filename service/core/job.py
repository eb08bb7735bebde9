"""One picture on its way through the line, and its stopwatch.

A `Job` has *parts*, the canvases to run: one, or with tiles the whole picture and its windows. Windows are cut a few at
a time, when they are needed; after each few the job goes behind all others that wait. A job's encoded bytes, picture,
options and answer belong to the worker that has it. `state` and the fields below it belong to the line, and change only
under its lock, except those of cutting: `picture`, `picture_size`, `uncut` and `found`.
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
    """The answer was not ready in time, and no more work is begun for it. Try again when there is less load."""


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
    """Seconds by stage, without gaps: each lap begins where the last one ended."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    _last: float = 0

    def __post_init__(self) -> None:
        self._last = self._last or self.started

    def lap(self, stage: str, end: float | None = None) -> None:
        """Add the time since the last lap, up to `end` (time.perf_counter(), by default now), to this stage."""
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
    """One picture's detections, in original pixels."""

    detections: Detections
    original_size: tuple[int, int]
    model: LoadedModel
    watch: Stopwatch


Finish = Callable[[Detected, "Job"], Any]
"""Makes the answer out of the detections and, for a drawing, the job's picture; its result is the future's."""


class State(Enum):
    ENCODED = auto()
    DECODING = auto()
    READY = auto()
    """State of a job with parts that wait for the device."""
    RUNNING = auto()
    """State of a job whose remaining parts are all on the device."""
    RAN = auto()


@dataclass(eq=False)
class Part:
    """One canvas of a job: what batches are made of."""

    job: "Job"
    canvas: CanvasImage
    ready_at: float = 0
    """time.monotonic()"""
    alone: bool = False
    """True: its batch failed, so it is run again, first and by itself."""
    candidates: Candidates | None = None
    window: Window | None = None
    """The rectangle of the picture that it shows, if its job has tiles."""

    @property
    def group(self) -> tuple[LoadedModel, tuple[int, int]]:
        """The key of parts that may share a batch: model and canvas."""
        return self.job.model, self.canvas.canvas_size


@dataclass(eq=False)
class Job:
    data: bytearray
    """The encoded picture; empty once it is decoded, unless its answer is a drawing."""
    model: LoadedModel
    """The model that served when the job was admitted; a reload does not change it."""
    options: Options
    deadline: float
    """Time after which nobody waits, time.monotonic()."""
    watch: Stopwatch
    finish: Finish
    draws: bool
    """True: its answer is a drawing, which a decoder makes; the job keeps its place until then."""
    future: "asyncio.Future[Any]"
    canvases_left: int = 1
    """Canvases that have not run; until the picture is decoded, their number by the claimed size."""
    max_pixels: int = MAX_PIXELS
    """Most pixels that its reader may decode: those that its file claims, if allowed."""
    decode_bytes: int = 0
    """Most memory that decoding or drawing them takes."""
    drawing_bytes: int = 0
    """Memory for its answer, if that is a drawing."""

    state: State = State.ENCODED
    turn: int = 0
    """Its position in the line; the smallest goes first."""
    gone: bool = False
    """True: it failed, was cancelled or is late, and no more work is begun for it."""
    in_hand: int = 0
    """Work that workers have: its decoding, its drawing, or this many of its parts on the device."""
    parts: list[Part] = field(default_factory=list)
    """Parts that were cut last, in order."""
    parts_left: int = 0
    """Number of these parts that have not finished running."""
    picture: Pixels | None = None
    """The decoded picture, while windows are still to be cut from it."""
    picture_size: tuple[int, int] = (0, 0)
    """Its height and width, if the job has tiles."""
    uncut: deque[Window] = field(default_factory=deque)
    found: Found | None = None
    """The objects found in earlier windows."""

    def answer(self, result: Any) -> None:
        """Hand the answer to whoever waits, from any thread."""
        self.future.get_loop().call_soon_threadsafe(self._settle, self.future.set_result, result)

    def fail(self, error: BaseException) -> None:
        """Hand the error to whoever waits, from any thread."""
        self.future.get_loop().call_soon_threadsafe(self._settle, self.future.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], outcome: Any) -> None:
        """Set the future's result or error, on the event loop."""
        if not self.future.done():
            settle(outcome)
