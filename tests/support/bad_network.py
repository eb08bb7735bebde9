"""A TCP proxy that stands for a bad network where the kernel has no netem: latency, small pieces, stalls, resets.

What TCP makes of loss and reordering is what its reader sees of them: bytes that come late. A reset is a connection
that ends before its time.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.load import address


@dataclass(frozen=True)
class Weather:
    """Probabilities are for each piece of at most `piece_bytes`."""

    latency_seconds: float = 0.02
    piece_bytes: int = 1400
    stall_share: float = 0.02
    stall_seconds: float = 0.5
    reset_share: float = 0.005


@dataclass
class BadNetwork:
    url: str
    resets: int = 0


@contextlib.contextmanager
def bad_network(url: str, weather: Weather, seed: int = 0) -> Iterator[BadNetwork]:
    """Pass connections on to `url`, on a thread of its own."""
    loop, network, chance = asyncio.new_event_loop(), BadNetwork(""), random.Random(seed)

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ways at once; a reset ends both."""
        with contextlib.suppress(ConnectionError):
            there_reader, there = await asyncio.open_connection(*address(url))
            ways = [
                asyncio.create_task(flow(reader, there, weather, chance)),
                asyncio.create_task(flow(there_reader, writer, weather, chance)),
            ]
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            if any(way.exception() for way in done):
                network.resets += any(isinstance(way.exception(), Reset) for way in done)
                for each in (writer, there):
                    reset(each)
            for way in ways:
                way.cancel()
            there.close()
        writer.close()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(passed_on, "127.0.0.1", 0)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    network.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield network
    finally:
        asyncio.run_coroutine_threadsafe(ended(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def ended(server: asyncio.Server) -> None:
    """Stop listening, and cut off who is still connected."""
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Reset(Exception):
    """The weather ends this connection."""


async def flow(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, weather: Weather, chance: random.Random
) -> None:
    """Pass one direction on. Reset: its time has come."""
    while piece := await reader.read(chance.randint(1, weather.piece_bytes)):
        if chance.random() < weather.reset_share:
            raise Reset
        is_stall = chance.random() < weather.stall_share
        await asyncio.sleep(weather.stall_seconds if is_stall else weather.latency_seconds)
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close it by a RST."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
