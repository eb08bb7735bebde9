"""The child processes that decode pictures, with their bounds of time and memory.

Each worker that may decode has one child, started early. A child is killed and replaced at its picture's deadline, or
when nobody waits for the picture any more; a child that has died is replaced too. So no decode outlives its answer. A
child's output is checked before it is used.
"""

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal

import numpy as np
from pydantic import TypeAdapter

from model.image import InvalidImage, TooManyPixels, canvas_size
from model.metadata import ResizePolicy
from model.types import CanvasImage, Detections, Pixels
from service.core.decoder_process import MAX_ANSWER_BYTES, Answer, Drawing, Request, receive_into, receive_json, send
from service.core.job import DeadlineExceeded, Job
from service.drawing import PictureFormat
from service.metrics import DecoderMetrics

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
"""Longest time until a child is killed for which nobody waits."""
MEMORY_BYTES = 1200 * 2**20
"""Most memory of a decode above a child's rest: the largest legal picture of every format fits."""
MAX_DRAWING_BYTES = 512 * 2**20
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Settings by which a large picture's blocks go back to the system when they are freed (glibc would keep them in the
heap), no address space is reserved for each thread, and no child starts a thread for each core."""
LEAST_BYTES = 192 * 2**20
"""Memory that a picture of any size needs: code, tables, and values made of the encoded bytes."""
LEAST_SECONDS, SECONDS_PER_PIXEL = 5, 0.5e-6
"""CPU seconds of a decode: ten times what the slowest legal pictures take."""
DRAWING_TAKES = 2
"""Factor on the CPU seconds for a drawing; drawing 5,000 boxes onto the largest picture takes 7 s."""
KillReason = Literal["deadline", "cancelled", "cpu", "died"]
TOO_DEAR = "the decoder broke on this picture: it is damaged, or takes too much memory"
REFUSALS = {"died": TOO_DEAR, "cpu": "the picture takes more time to decode than one of its size should"}
ANSWER = TypeAdapter(Answer)


class Decoders:
    """Makes canvases and drawings of pictures. Thread-safe; as many at once as there are children."""

    def __init__(
        self,
        count: int,
        metrics: DecoderMetrics,
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """`memory_bytes`: what one decode may take."""
        self._count = count
        self._metrics = metrics
        self._memory_bytes = memory_bytes
        self._idle: SimpleQueue[_Child] = SimpleQueue()
        self._alive: set[_Child] = set()
        self._lock = threading.Lock()  # guards the set, and whether there shall be children
        self._closed = False
        metrics.processes.set_function(lambda: len(self._alive))

    def start(self) -> None:
        """Start the children. A request waits until its child is ready."""
        for _ in range(self._count):
            self._add()

    def close(self) -> None:
        """Kill all children; requests to them fail with InvalidImage."""
        with self._lock:
            self._closed = True
            for child in self._alive:
                child.kill()
            self._alive.clear()

    def canvas(self, job: Job, resize: ResizePolicy) -> CanvasImage:
        """Decode and resize the job's picture. Raises InvalidImage, TooManyPixels, DeadlineExceeded."""
        policy = resize.shorter_side, resize.longest_side, resize.divisor
        answer, payload = self._ask(job, self._request(job, resize=policy))
        height, width = answer.canvas_size
        if (height, width) != canvas_size(*answer.original_size, resize) or len(payload) != height * width * 3:
            raise InvalidImage("the decoder's answer makes no sense")
        _, resize_seconds = answer.seconds
        job.watch.lap("decode", time.perf_counter() - resize_seconds)
        job.watch.lap("preprocess")
        return CanvasImage(
            np.frombuffer(payload, np.uint8).reshape(height, width, 3), answer.valid_size, answer.original_size
        )

    def picture(self, job: Job) -> Pixels:
        """Decode the job's picture, without a resize. Raises what `canvas` raises."""
        answer, payload = self._ask(job, self._request(job))
        height, width = answer.original_size
        if height * width > job.max_pixels or len(payload) != height * width * 3 or not payload:
            raise InvalidImage("the decoder's answer makes no sense")
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3)

    def drawing(
        self, job: Job, detections: Detections, names: Mapping[int, str], picture_format: PictureFormat
    ) -> bytes:
        """Draw the detections onto the job's picture and encode it. Raises what `canvas` raises."""
        drawing = Drawing(
            detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(),
            {str(label): name for label, name in names.items()}, picture_format,
        )  # fmt: skip
        _, payload = self._ask(job, self._request(job, drawing=drawing))
        return bytes(payload)

    def _request(
        self, job: Job, *, resize: tuple[int, int, int] | None = None, drawing: Drawing | None = None
    ) -> Request:
        """Make a request with the memory and time that a picture of this claim may take."""
        memory_bytes = min(self._memory_bytes, job.decode_bytes + LEAST_BYTES)
        cpu_seconds = LEAST_SECONDS + SECONDS_PER_PIXEL * job.max_pixels
        if drawing is not None:
            cpu_seconds *= DRAWING_TAKES
        return Request(len(job.data), job.max_pixels, memory_bytes, cpu_seconds, resize, drawing)

    def _ask(self, job: Job, request: Request) -> tuple[Answer, bytearray]:
        child = self._idle_child()
        outcome = child.ask(request, job)
        if isinstance(outcome, str):
            self._replace(child, outcome)
            if outcome in REFUSALS:
                raise InvalidImage(REFUSALS[outcome])
            raise DeadlineExceeded("the picture was not decoded in time")
        answer, payload = outcome
        self._idle.put(child)
        if answer.kind == "too many pixels":
            raise TooManyPixels(answer.text)
        if answer.kind in ("invalid", "memory"):
            raise InvalidImage(answer.text or "the picture takes more memory than a decoder may have")
        return answer, payload

    def _replace(self, child: "_Child", reason: KillReason) -> None:
        child.kill()
        self._metrics.kills.labels(reason).inc()
        with self._lock:
            self._alive.discard(child)
        try:
            self._add()
        except OSError as error:  # no process or memory to be had now; who finds no child tries again
            logger.error("no decoder could be started in the place of one that was stopped (%s): %s", reason, error)

    def _idle_child(self) -> "_Child":
        with suppress(Empty):
            return self._idle.get_nowait()
        if len(self._alive) < self._count:
            self._add()
        return self._idle.get()

    def _add(self) -> None:
        with self._lock:
            if not self._closed:
                child = _Child(self._memory_bytes)
                self._alive.add(child)
                self._idle.put(child)


class _Child:
    """One process, and the socket to it. For one thread at a time."""

    def __init__(self, memory_bytes: int) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "service.core.decoder_process", str(theirs.fileno()), str(memory_bytes)]
            try:  # in a session of its own: a terminal's signals are for the service
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], start_new_session=True, env=os.environ | ENVIRONMENT
                )
            except OSError:
                self._connection.close()
                raise

    def ask(self, request: Request, job: Job) -> tuple[Answer, bytearray] | KillReason:
        """Return the child's answer, or the reason to kill it."""
        try:
            self._connection.settimeout(max(POLL_SECONDS, job.deadline - time.monotonic()))
            send(self._connection, request, job.data)
            if (reason := self._wait(job)) is not None:
                return reason
            answer = ANSWER.validate_python(receive_json(self._connection, MAX_ANSWER_BYTES, job.deadline))
            payload = bytearray(min(answer.size, MAX_DRAWING_BYTES + 1))
            if len(payload) <= MAX_DRAWING_BYTES and receive_into(self._connection, memoryview(payload), job.deadline):
                return answer, payload
        except TimeoutError:
            return "deadline"
        except (OSError, ValueError):
            pass
        return self._why_it_died()

    def _why_it_died(self) -> KillReason:
        """Say why it died, after it has closed its socket or sent nonsense."""
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(POLL_SECONDS) == -signal.SIGXCPU:
                return "cpu"
        return "died"

    def _wait(self, job: Job) -> KillReason | None:
        """Wait until the answer comes; return the reason if nobody needs it any more."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while not poll.poll(POLL_SECONDS * 1000):
            if job.gone:
                return "cancelled"
            if time.monotonic() >= job.deadline:
                return "deadline"
        return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
