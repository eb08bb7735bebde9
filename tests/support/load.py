"""Clients that count, and what a server process holds: for tests of load, faults and leaks over real sockets.

Each `ask` is a connection of its own, so no answer is lost to a connection that the server just closed for idleness.
"""

import contextlib
import http.client
import io
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.serving import PNG

PATIENCE_SECONDS = 120
"""A request that takes longer hangs."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Message
    body: bytes


@dataclass(frozen=True)
class Footprint:
    """The resources that a process holds."""

    resident_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, process_id: int) -> "Footprint":
        process = psutil.Process(process_id)
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


class Scrape:
    """One reading of /metrics."""

    def __init__(self, url: str) -> None:
        families = text_string_to_metric_families(ask(url, "/metrics", method="GET").body.decode())
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, tuple(sorted(labels.items()))]

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric of one label, those that are not 0."""
        pairs = ((dict(labels)[label], value) for (sample, labels), value in self.samples.items() if sample == name)
        return {key: value for key, value in pairs if value}


def ask(
    url: str,
    path: str = "/detect",
    body: bytes | None = None,
    headers: Mapping[str, str] = PNG,
    *,
    method: str = "POST",
) -> Reply:
    """One request on a connection of its own."""
    with contextlib.closing(opened(url)) as connection:
        return exchange(connection, path, body, {"Connection": "close", **headers}, method=method)


def opened(url: str) -> http.client.HTTPConnection:
    """A connection for many requests; it opens itself anew when the server has closed it."""
    return http.client.HTTPConnection(*address(url), timeout=PATIENCE_SECONDS)


def exchange(
    connection: http.client.HTTPConnection,
    path: str = "/detect",
    body: bytes | None = None,
    headers: Mapping[str, str] = PNG,
    *,
    method: str = "POST",
) -> Reply:
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    return Reply(response.status, response.headers, response.read())


def address(url: str) -> tuple[str, int]:
    parts = httpx.URL(url)
    return parts.host, parts.port or 80


def connected(url: str) -> socket.socket:
    return socket.create_connection(address(url), timeout=PATIENCE_SECONDS)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]


def said(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def listens(url: str) -> bool:
    try:
        connected(url).close()
    except ConnectionRefusedError:
        return False
    return True


def request_head(length: int, path: str = "/detect", request_id: str = "") -> bytes:
    """The headers before a PNG of that many bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}"]
    lines += [f"X-Request-ID: {request_id or uuid.uuid4().hex}", "", ""]
    return "\r\n".join(lines).encode()


def blocks(width: int, height: int, seed: int) -> bytes:
    """A PNG of random colours, 8 × 6 of them: the tiny model answers each seed differently."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def constantly(clients: int, call: Callable[[int], object]) -> Iterator[None]:
    """Meanwhile `call(client)` again and again, from as many threads. Their first error is raised at the end."""
    done = threading.Event()
    errors: list[BaseException] = []

    def run(client: int) -> None:
        try:
            while not done.is_set():
                call(client)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        if errors:
            raise errors[0]  # whatever else failed because of it
    assert not any(thread.is_alive() for thread in threads), "a client hangs"


def agree(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> bool:
    """The same detections in the same order, their scores and boxes apart by float noise at most."""

    def names(detections: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
        return [(each["label"], each["class_id"]) for each in detections]

    def numbers(detections: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        return [[each["score"], *each["box"].values()] for each in detections]

    return names(found) == names(expected) and np.allclose(numbers(found), numbers(expected), rtol=0, atol=2e-3)
