"""Hundreds of slow and rude clients at once: good requests are all served meanwhile, and all is freed after."""

import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.load import PNG, Footprint, Scrape, ask, blocks, connected, constantly, request_head, said
from tests.support.serving import ServerProcess, server_process, wait_until

pytestmark = pytest.mark.slow

IMAGE = blocks(90, 80, seed=1)
HEAD = request_head(len(IMAGE))
HALF_SENT, SILENT, SLOW_HEADERS, SLOW_BODIES, ABORTS = 200, 50, 50, 20, 20
HALF_BODY = bytes(4096)
UPLOAD_LIMIT = 2**20
LARGE_BYTES = 600_000
"""They have room beside the good requests' bodies, and none beside the half-sent ones."""
PLACES = 8 * ABORTS
"""In the queue: more than all that abort can take at once."""


def reset(connection: socket.socket) -> None:
    """Close it as a process that is killed does: by a RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    """Say that nothing more will be sent, and wait: the rest of the body never comes."""
    connection.shutdown(socket.SHUT_WR)
    said(connection)
    connection.close()


def opened(url: str, count: int, first_bytes: bytes = b"") -> list[socket.socket]:
    connections = [connected(url) for _ in range(count)]
    for connection in connections:
        connection.sendall(first_bytes)
    return connections


def drip(connections: Sequence[socket.socket]) -> None:
    """One byte a second on each, until the server has closed them all."""
    alive = list(connections)
    end = time.monotonic() + 100
    while alive:
        assert time.monotonic() < end, f"{len(alive)} of {len(connections)} may drip for ever"
        time.sleep(1)
        alive = [connection for connection in alive if takes_a_byte(connection)]


def takes_a_byte(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"a")
    except ConnectionError:
        return False
    return True


def abort_at_each_stage(url: str, count: int, leave: Callable[[socket.socket], None]) -> None:
    whole = HEAD + IMAGE
    for stage in (0, len(HEAD) // 2, len(HEAD), len(HEAD) + len(IMAGE) // 2, len(whole) - 1, len(whole)):
        for connection in opened(url, count, whole[:stage]):
            leave(connection)
    for connection in opened(url, count, whole):
        connection.recv(10)  # the answer has begun
        leave(connection)


def held(server: ServerProcess) -> Footprint:
    return Footprint.of(server.process.pid)


def is_as_before(server: ServerProcess, before: Footprint) -> bool:
    scrape = Scrape(server.url)
    idle = scrape("http_requests_in_flight") == 1 and scrape("retinaserve_queue_depth") == 0  # 1: this one
    now = held(server)
    return idle and now.descriptors <= before.descriptors and now.threads <= before.threads


def test_good_requests_are_all_served_among_rude_ones_and_everything_is_freed(tmp_path: Path) -> None:
    assert bear_rude_clients(tmp_path, upload_timeout_seconds=6) > 0


def bear_rude_clients(folder: Path, times: int = 1, upload_timeout_seconds: int = 10) -> int:
    """Serve good clients among `times` as many rude ones; how many good requests were."""
    served: list[bytes] = []

    def good(client: int) -> None:
        reply = ask(server.url, "/detect", IMAGE, PNG)
        assert reply.status == 200, reply.body
        served.append(reply.body)

    large = bytes(LARGE_BYTES * times)
    limits = ("--max-upload-bytes-in-flight", str(UPLOAD_LIMIT * times), "--queue-capacity", str(PLACES * times))
    flags = (*limits, "--upload-timeout-seconds", str(upload_timeout_seconds), "--threads", "1")
    with server_process(folder, *flags) as server:
        with constantly(4, good):
            wait_until(lambda: len(served) >= 100, 60)
        timeouts_before, before = timeouts(server), held(server)  # in this order: the scrape has a thread of its own

        with constantly(4, good):
            half_sent = opened(server.url, HALF_SENT * times, request_head(8192) + HALF_BODY)
            silent = opened(server.url, SILENT * times)
            slow_headers = opened(server.url, SLOW_HEADERS * times, b"POST /detect HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            slow_bodies = opened(server.url, SLOW_BODIES * times, request_head(1000))
            wait_until(lambda: ask(server.url, body=large).status == 429)
            assert ask(server.url, "/healthz", method="GET").status == 200
            count = len(served)
            drip([*slow_headers, *slow_bodies])
            assert {said(connection)[:12] for connection in half_sent} == {b"HTTP/1.1 408"}
            assert {said(connection) for connection in silent} == {b""}
            assert len(served) > count
            for connection in (*half_sent, *silent, *slow_headers, *slow_bodies):
                connection.close()
            abort_at_each_stage(server.url, ABORTS * times, reset)
            abort_at_each_stage(server.url, ABORTS * times, socket.socket.close)
            abort_at_each_stage(server.url, ABORTS * times, half_close)

        wait_until(lambda: is_as_before(server, before), 100)
        assert timeouts(server) - timeouts_before == times * (HALF_SENT + SLOW_BODIES)
        assert Scrape(server.url)("retinaserve_requests_total", outcome="error") == 0
        assert ask(server.url, body=large).status == 422, "bytes of uploads long gone are still counted"
    return len(served)


def timeouts(server: ServerProcess) -> float:
    return Scrape(server.url)("retinaserve_requests_total", outcome="timeout")
