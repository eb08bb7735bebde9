"""Observation of a server under attack: a good client, a probe, and its memory."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil

from tests.support.serving import ServerProcess, picture

SETTLED = 200 * 2**20
"""Bytes that allocators may keep."""


def memory(process: psutil.Process) -> int:
    """Bytes of the service and its children, each shared page counted once."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += each.memory_full_info().pss
    return total


@dataclass
class Watch:
    """Observations of a good client and a probe, and the memory, during an attack."""

    server: ServerProcess
    highest: int = 0
    slowest_answer: float = 0
    slowest_probe: float = 0

    def look(self, until: threading.Event) -> None:
        process = psutil.Process(self.server.process.pid)
        with httpx.Client(base_url=self.server.url, timeout=60) as client:
            while not until.is_set():
                self.highest = max(self.highest, memory(process))
                started = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                probed = time.perf_counter()
                good = picture(90, 60, kind="JPEG")
                answer = client.post("/detect", content=good, headers={"Content-Type": "image/jpeg"})
                assert answer.status_code == 200, answer.text
                self.slowest_probe = max(self.slowest_probe, probed - started)
                self.slowest_answer = max(self.slowest_answer, time.perf_counter() - probed)


@contextlib.contextmanager
def watched(server: ServerProcess) -> Iterator[Watch]:
    watch, over = Watch(server), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(watch.look, over)
        try:
            yield watch
        finally:
            over.set()
        looking.result(120)


def ask(server: ServerProcess, image: bytes, accept: str = "application/json", query: str = "") -> int:
    headers = {"Content-Type": "application/octet-stream", "Accept": accept}
    return httpx.post(f"{server.url}/detect?{query}", content=image, headers=headers, timeout=120).status_code
