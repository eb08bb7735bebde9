"""The memory budget of requests: one total, from the container's limit, and its parts."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.core.refusals import Refusal

SHARE_OF_LIMIT = 0.5
"""Share of this process's memory limit; the rest is for the idle service, the model and its runs."""
BYTES_PER_DECODER = 512 * 2**20
MIN_DECODERS = 2
"""Decoders that count at least, so that one picture of 50 million pixels fits."""


class MemoryFull(Refusal):
    """Requests hold too many bytes at once: send the request again later."""

    retry_after_seconds = 1


@dataclass(frozen=True)
class Budget:
    """Bytes that all requests may hold together, in parts. A request that needs more than its part is taken alone."""

    total: int

    @classmethod
    def of(cls, decode_threads: int, limit: int | None = None) -> "Budget":
        """Make the budget. `limit`: bytes that this process may have [the container's or the machine's]."""
        by_limit = int(SHARE_OF_LIMIT * (memory_limit() if limit is None else limit))
        return cls(min(by_limit, max(MIN_DECODERS, decode_threads) * BYTES_PER_DECODER))

    @property
    def bodies(self) -> int:
        """Bytes of bodies that arrive, or wait to be decoded and answered."""
        return self.total // 8

    @property
    def answers(self) -> int:
        """Bytes of requested drawings, and of answers that their clients have not read yet."""
        return self.total // 8

    @property
    def canvases(self) -> int:
        """Bytes of canvases decoded ahead of the device."""
        return self.total // 32

    @property
    def decoding(self) -> int:
        """Bytes of pictures being decoded or drawn."""
        return self.total - self.bodies - self.answers - self.canvases


class HeldBytes:
    """Bytes of one kind that requests hold, at most `limit`. For the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def change(self, count: int) -> None:
        """Hold so many more, or fewer."""
        self.taken += count

    def hold_until_done(self, future: "asyncio.Future[Any]", count: int) -> None:
        """Hold so many more until the future is done."""
        self.change(count)
        future.add_done_callback(lambda _: self.change(-count))

    def check(self, more: int = 0) -> None:
        """Raise MemoryFull if so many more do not fit."""
        if self.taken + more > self.limit:
            raise MemoryFull(f"requests hold {self.taken} of the {self.limit} bytes that they may hold")


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may have: its container's limit, at most the machine's memory."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            return min(machine, int(text))
    return machine
