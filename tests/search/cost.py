"""The cost of one file to the service, in shares of its bounds: time on the event loop, CPU seconds, decoding memory.

A process decodes as the service's children do, under the same limits, and measures itself; it is replaced when it dies.
"""

import ctypes
import multiprocessing
import os
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from model.image import InvalidImage, decode_image, decode_soon, to_canvas
from model.metadata import ResizePolicy
from service.core import engine
from service.core.decoders import LEAST_BYTES, LEAST_SECONDS, SECONDS_PER_PIXEL
from service.core.engine import COPIES
from tests.support.serving import FAULT

CLAIM_SECONDS = 0.1
"""Time that reading a claim may take from the event loop."""
SOON_SECONDS = 2.0
"""CPU seconds that may pass in a thread of the service: about a second, on a slow core."""
SLACK_BYTES = 64 * 2**20
"""Memory that allocators keep and tables take, beside what is planned for a picture."""


@dataclass(frozen=True)
class Cost:
    """All are shares of what is allowed."""

    claim: float
    time: float
    memory: float

    @property
    def worst(self) -> float:
        return max(self.claim, self.time, self.memory)


class Meter:
    """Measures files, one after the other, in a process of its own."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def cost(self, data: bytes) -> Cost:
        if self._process is None or not self._process.is_alive():
            spawn = multiprocessing.get_context("spawn")
            self._ours, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_measure, args=(theirs, self._max_pixels), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._ours.send_bytes(data)
            cost: Cost = self._ours.recv()
        except (EOFError, ConnectionError):  # killed by its limit of CPU seconds, or broken: neither is allowed
            self._process.join()
            return Cost(0, float("inf"), 0)
        return cost


def _measure(connection: Connection, max_pixels: int) -> None:
    if FAULT in os.environ:
        from tests.support.faulty_service import put_in

        put_in(os.environ[FAULT])
    at_rest = _status("VmSize")
    while True:
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)  # as the service, whose limit is the picture's own
        data = connection.recv_bytes()
        started = time.thread_time()
        claim = engine.claim_of(bytearray(data))
        claim_seconds = time.thread_time() - started
        pixels = claim.pixels_allowed(max_pixels)
        planned = claim.decode_bytes(max_pixels) + COPIES * len(data)
        allowed_seconds = LEAST_SECONDS + SECONDS_PER_PIXEL * pixels
        _limit(resource.RLIMIT_AS, at_rest + planned + LEAST_BYTES)
        _limit(resource.RLIMIT_CPU, ceil(time.process_time() + allowed_seconds))
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, started = _status("VmRSS"), time.process_time()
        is_soon = _decode(data, pixels)
        seconds = time.process_time() - started
        memory = _status("VmHWM") - before
        allowed = SOON_SECONDS if is_soon else allowed_seconds
        connection.send(Cost(claim_seconds / CLAIM_SECONDS, seconds / allowed, memory / (planned + SLACK_BYTES)))


def _limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.RLIM_INFINITY))


def _decode(data: bytes, pixels: int) -> bool:
    """As the engine does; whether in a thread of the service."""
    try:
        image = decode_soon(data, max_pixels=pixels)
    except InvalidImage:
        return True
    with suppress(InvalidImage, MemoryError):
        to_canvas(decode_image(data, max_pixels=pixels) if image is None else image, ResizePolicy())
    return image is not None


def _status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    sys.exit(f"no {name} in /proc/self/status")
