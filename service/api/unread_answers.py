"""A deadline for answers that a client does not read: its connection is reset.

asyncio and uvloop hold unread bytes for as long as the client stays connected, and uvicorn sets no deadline.
"""

import asyncio
import fcntl
import logging
import sys
import termios

from service.core.memory import HeldBytes

logger = logging.getLogger(__name__)

LOOKS = 4
"""Checks within the timeout; the reset may be late by one of them."""


class AnswerWatch:
    """Watches the unsent bytes of one connection's transport, from `begin` until there are none."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, timeout_seconds: float, answers: HeldBytes
    ) -> None:
        """Watch one connection. `answers` counts the bytes not sent yet."""
        self._transport = transport
        self._loop = loop
        self._timeout_seconds = timeout_seconds
        self._next_look: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0
        self._answers = answers
        self._counted_bytes = 0
        self._taken_at = 0.0
        """Time at which the client was last seen to take a byte, loop.time()."""

    def begin(self) -> None:
        """Start watching, unless it does so already or nothing is left to send."""
        self.count()
        if self._next_look is None and self._transport.get_write_buffer_size():
            self._taken_at = self._loop.time()
            self._look_later()

    def count(self) -> None:
        """Count the unsent bytes."""
        self._change(self._transport.get_write_buffer_size())

    def _change(self, bytes_left: int) -> None:
        self._answers.change(bytes_left - self._counted_bytes)
        self._counted_bytes = bytes_left

    def end(self) -> None:
        self._change(0)
        if self._next_look is not None:
            self._next_look.cancel()

    def _look_later(self) -> None:
        self._next_look = self._loop.call_later(self._timeout_seconds / LOOKS, self._look)

    def _look(self) -> None:
        self._next_look = None
        self.count()
        held_bytes, now = self._transport.get_write_buffer_size(), self._loop.time()
        if not held_bytes:
            return
        unsent_bytes = held_bytes + self._bytes_in_kernel()
        if unsent_bytes != self._unsent_bytes:
            self._unsent_bytes, self._taken_at = unsent_bytes, now
        if now - self._taken_at >= self._timeout_seconds:
            logger.info("an answer is not read: given up with %d bytes left", unsent_bytes)
            self._transport.abort()
        else:
            self._look_later()

    def _bytes_in_kernel(self) -> int:
        """Count the bytes that the client has not acknowledged; they show progress before our own buffer does."""
        connection = self._transport.get_extra_info("socket").fileno()
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
