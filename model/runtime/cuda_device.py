"""The GPU that all models of the process share: a thread that runs, a thread that opens, and the memory budget.

- Streams, cuDNN handles and captured graphs belong to the thread that runs a session. So one thread makes all runs.
- A missing session opens on a second thread, one at a time; nothing else waits for it.
- Runs follow each other, so all sessions share one arena for activations, which counts once. Sessions beyond the budget
  are closed, the least recently used first.

The lock, `changed`, is never held while something is opened, copied, run or closed.
"""

import functools
import itertools
import queue
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

import onnxruntime as ort

from model.runtime.cuda_session import Buffers, CudaOptions, InputShape, Memory, free_bytes, preload_cuda, share_arena
from model.runtime.session import is_out_of_memory

BUDGET_SHARE = 0.8
DEFAULT_LIMIT_BYTES = 12 * 2**30
"""Budget on a card that does not report its free memory; leaves a card of 16 GiB some room."""
GRACE_SECONDS = 1
"""Time after opening in which a session that has not run yet is not closed for another."""
RUNS_TO_CAPTURE = 3
"""Runs after which ONNX Runtime has captured a graph."""
DEFAULT_OPTIONS = CudaOptions()
ResultT = TypeVar("ResultT")


class DaemonThread:
    """A thread that makes the given calls, in order; the process does not wait for it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[[], ResultT]) -> "Future[ResultT]":
        future: Future[ResultT] = Future()
        self._calls.put((function, future))
        return future

    def _work(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except Exception as error:  # its caller's
                future.set_exception(error)
            del function, future  # what they hold would live on until the next call


class ShapeSession:
    """A session for one input shape with its lanes' memory, from the first request for it. The device's lock guards it.

    asked → opening → open, or failed → closed
    """

    def __init__(self, shape: InputShape, fixed_bytes: int, activation_bytes: int) -> None:
        self.shape, self.fixed_bytes, self.activation_bytes = shape, fixed_bytes, activation_bytes
        self.state: Literal["asked", "opening", "open", "failed", "closed"] = "asked"
        self.error: Exception | None = None
        self.idle: list[Buffers] = []
        self.in_use = 0
        self.last_used = 0

    @property
    def holds_memory(self) -> bool:
        return self.state == "opening" or bool(self.idle) or self.in_use > 0

    def close(self) -> list[Buffers]:
        """Close it; return the objects to drop once the lock is free. A lane in use is dropped when its run ends."""
        self.state = "closed"
        dropped, self.idle = self.idle, []
        return dropped


class CudaDevice:
    """The first GPU: the thread that runs, the thread that opens, and the budget, shared by all models of the
    process."""

    def __init__(self, memory: Memory, limit_bytes: int, options: CudaOptions) -> None:
        """Make a device with a budget of `limit_bytes`. `memory` "cpu" is for tests."""
        self.memory, self.limit_bytes, self.options = memory, limit_bytes, options
        self.changed = threading.Condition()
        self.copies = threading.Lock()
        """Lock held by copies, and by captures, which another thread's copy would end."""
        self._sessions: weakref.WeakSet[ShapeSession] = weakref.WeakSet()  # a model that goes takes its own with it
        self._uses = itertools.count(1)
        self._runner, self._opener = DaemonThread("cuda_run"), DaemonThread("cuda_open")

    def run(self, buffers: Buffers) -> None:
        self._runner.submit(buffers.run).result()

    def fits(self, session: ShapeSession) -> bool:
        """Tell by the estimate whether it can be open besides the open ones. The caller holds the lock."""
        return self._bytes([*self._holding(), session]) <= self.limit_bytes

    def open_soon(
        self, session: ShapeSession, open_session: Callable[[InputShape], ort.InferenceSession], lanes: int,
        opened: Callable[[], None],
    ) -> None:  # fmt: skip
        """Open it on the opening thread, then call `opened`. The caller holds the lock."""
        self._sessions.add(session)
        self._opener.submit(partial(self._open, session, open_session, lanes, opened))

    def take(self, session: ShapeSession) -> Buffers | None:
        """Take idle memory of an open session; None: it failed. The caller holds the lock."""
        if session.state == "failed":
            return None
        session.last_used = next(self._uses)
        session.in_use += 1
        self.changed.notify_all()
        return session.idle.pop()

    def give_back(self, session: ShapeSession, buffers: Buffers) -> None:
        """The lock is held."""
        session.in_use -= 1
        if session.state == "open":
            session.idle.append(buffers)

    def close_failed(self, session: ShapeSession, error: Exception, buffers: Buffers | None) -> None:
        """Close the session that failed and, if memory was short, every idle one: new plans are cheap.

        The arena keeps its memory in pieces of the requested sizes, into which another canvas may not fit. So it is
        shrunk then, through the `buffers` whose run failed, or through any.
        """
        is_short = is_out_of_memory(error)
        with self.changed:
            idle = [each for each in self._sessions if each.state == "open" and not each.in_use]
            closing = [session, *(idle if is_short else [])]
            dropped = [each for closed in closing for each in closed.close()]
        buffers = buffers or (dropped[0] if dropped else None)
        del dropped
        if is_short and buffers is not None:
            self._runner.submit(buffers.shrink_arena).result()
        traceback.clear_frames(error.__traceback__)  # else the session lives as long as its error

    def _open(
        self, session: ShapeSession, open_session: Callable[[InputShape], ort.InferenceSession], lanes: int,
        opened: Callable[[], None],
    ) -> None:  # fmt: skip
        """Open the session, on the opening thread."""
        self._make_room(session)
        try:
            opening = open_session(session.shape)
            idle = self._runner.submit(partial(self._buffers, opening, session.shape, lanes)).result()
        except Exception as error:  # the boundary: it is raised by the lane that asks next
            with self.changed:
                session.state, session.error = "failed", error.with_traceback(None)  # its frames hold what was opened
                self.changed.notify_all()
        else:
            with self.changed:
                session.state, session.idle = "open", idle
                self.changed.notify_all()
        opened()

    def _make_room(self, session: ShapeSession) -> None:
        """Close other sessions until it fits besides the rest, or is alone; wait for those in use."""
        with self.changed:
            # Else two canvases that do not fit side by side could close each other's session, and neither ever run.
            self.changed.wait_for(
                lambda: self.fits(session) or all(each.last_used for each in self._holding()), GRACE_SECONDS
            )
            dropped = []
            while not self._fits_beside_open(session) and (others := self._holding("open")):
                dropped.append(min(others, key=lambda each: (each.in_use > 0, each.last_used)).close())
        del dropped
        with self.changed:
            self.changed.wait_for(lambda: self.fits(session) or not self._holding())
            session.state = "opening"

    def _fits_beside_open(self, session: ShapeSession) -> bool:
        return self._bytes([*self._holding("open"), session]) <= self.limit_bytes

    def _holding(self, state: str | None = None) -> list[ShapeSession]:
        return [each for each in self._sessions if each.holds_memory and state in (None, each.state)]

    def _bytes(self, sessions: Sequence[ShapeSession]) -> int:
        activations = [each.activation_bytes for each in sessions]
        shared = sum(activations) if self.options.capture_graph else max(activations)
        return shared + sum(each.fixed_bytes for each in sessions)

    def _buffers(self, session: ort.InferenceSession, shape: InputShape, lanes: int) -> list[Buffers]:
        """Make buffers on the running thread, to which bindings and captured graphs belong."""
        idle = [Buffers(session, shape, self.memory, number) for number in range(lanes)]
        if self.options.capture_graph:
            with self.copies:
                for buffers in idle:
                    buffers.load([])
                    for _ in range(RUNS_TO_CAPTURE):
                        buffers.run()
        return idle


@functools.cache
def first_gpu(limit_bytes: int | None, options: CudaOptions = DEFAULT_OPTIONS) -> CudaDevice:
    """Return the process's GPU, made at the first call. `limit_bytes` [0.8 of the free memory then]."""
    preload_cuda()
    if limit_bytes is None:
        free = free_bytes()
        limit_bytes = DEFAULT_LIMIT_BYTES if free is None else int(BUDGET_SHARE * free)
    share_arena(limit_bytes)
    return CudaDevice("cuda", limit_bytes, options)
