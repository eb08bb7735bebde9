"""The service beside a bare FastAPI one on the same model and picture, and at twice what it can do.

    python -m tests.benchmarks.service [--seconds N] [--rounds N]

Prints markdown tables. Clients run in this process, servers in their own; nothing else should run on the machine.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.detector import Detector
from model.image import decode_image, to_canvas
from tests.faulty_models import write_slow_model
from tests.load import address, ask, blocks, free_ports, listens, request_head
from tests.serving import server_process, wait_until

CLIENTS = (1, 8, 64)
INFERENCE_SECONDS = 0.005
QUEUE_CAPACITY = 32
OVERLOAD = 2.0
PROBE_SECONDS = 0.1
WARM_UP_SHARE = 0.2
IMAGE = blocks(106, 64, seed=1)
DETECT = request_head(len(IMAGE)) + IMAGE
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Latencies:
    """Seconds of each answer, by its status."""

    seconds: float
    """How long was measured."""
    by_status: dict[int, list[float]] = field(default_factory=dict)

    def note(self, status: int, latency: float) -> None:
        self.by_status.setdefault(status, []).append(latency)

    @property
    def throughput(self) -> float:
        return len(self.by_status.get(200, [])) / self.seconds

    def p99_ms(self, status: int = 200) -> float:
        taken = self.by_status.get(status, [])
        return float(np.percentile(taken, 99)) * 1000 if taken else float("nan")


class Connection:
    """A keep-alive connection that costs the machine as little as possible."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, url: str) -> "Connection":
        return cls(*await asyncio.open_connection(*address(url)))

    async def exchange(self, request: bytes) -> int:
        """The answer's status."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self._reader.readexactly(int(length[15:]))
        return int(head[9:12])

    def close(self) -> None:
        self._writer.close()


async def closed_loop(url: str, clients: int, seconds: float) -> Latencies:
    """Each client asks again as soon as it has its answer."""
    measured = Latencies(seconds)
    begin = time.perf_counter() + seconds * WARM_UP_SHARE
    end = begin + seconds

    async def client() -> None:
        connection = await Connection.to(url)
        while (started := time.perf_counter()) < end:
            status = await connection.exchange(DETECT)
            answered = time.perf_counter()
            if begin <= answered < end:
                measured.note(status, answered - started)
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return measured


async def open_loop(url: str, rate: float, seconds: float) -> tuple[Latencies, list[float]]:
    """Requests at a constant rate, whatever becomes of them; beside them the seconds that /healthz takes."""
    measured, probes = Latencies(seconds), list[float]()
    idle: list[Connection] = []
    begin = time.perf_counter() + seconds * WARM_UP_SHARE
    end = begin + seconds

    async def one(due: float) -> None:
        """From the moment it is due: a client that comes late does not make the server faster."""
        connection = idle.pop() if idle else await Connection.to(url)
        status = await connection.exchange(DETECT)
        if begin <= (answered := time.perf_counter()) < end:
            measured.note(status, answered - due)
        idle.append(connection)

    async def probe() -> None:
        connection = await Connection.to(url)
        while (started := time.perf_counter()) < end:
            await connection.exchange(HEALTH)
            probes.append(time.perf_counter() - started)
            await asyncio.sleep(PROBE_SECONDS)
        connection.close()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(probe())
        due = time.perf_counter()
        while due < end:
            tasks.create_task(one(due))
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    for connection in idle:
        connection.close()
    return measured, probes


@contextlib.contextmanager
def bare_process(model: Path) -> Iterator[str]:
    [port] = free_ports(1)
    with subprocess.Popen([sys.executable, "-m", "tests.benchmarks.bare", str(model), str(port)]) as process:
        try:
            wait_until(lambda: process.poll() is not None or listens(port))
            assert process.poll() is None, "the bare service does not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def write_model(path: Path) -> float:
    """Write a model whose inference takes about INFERENCE_SECONDS here; what it takes in truth."""
    seconds, multiplications = 0.0, 1
    while seconds < INFERENCE_SECONDS * 0.9 and multiplications < 64:
        write_slow_model(path, multiplications)
        detector = Detector(path, device="cpu")
        canvas = to_canvas(decode_image(IMAGE), detector.metadata.resize)
        seconds = median_seconds(lambda detector=detector, canvas=canvas: detector.run([canvas]))  # type: ignore[misc]
        multiplications += 1
    return seconds


def median_seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[10:])


def compare(ours: str, bare: str, seconds: float, rounds: int) -> str:
    """Both services in turns; the median round of each."""
    rows = []
    for clients in CLIENTS:
        taken: dict[str, list[Latencies]] = {ours: [], bare: []}
        for _ in range(rounds):
            for url, measured in taken.items():
                measured.append(asyncio.run(closed_loop(url, clients, seconds)))
        refused = sum(len(each.by_status) > 1 for each in taken[ours])
        assert not refused, "nothing may be refused here: queue_capacity is the number of clients"
        [our_rate, bare_rate] = [statistics.median(each.throughput for each in taken[url]) for url in (ours, bare)]
        [our_p99, bare_p99] = [statistics.median(each.p99_ms() for each in taken[url]) for url in (ours, bare)]
        rows.append(
            f"| {clients} | {our_rate:.1f} | {bare_rate:.1f} | {our_rate / bare_rate:.2f} × "
            f"| {our_p99:.1f} | {bare_p99:.1f} |"
        )
    head = "| clients | service, images/s | bare | ratio | service, p99 ms | bare |\n|---:|---:|---:|---:|---:|---:|"
    return "\n".join([head, *rows])


def overload(url: str, seconds: float) -> str:
    """Twice the rate that as many clients as places get."""
    assert ask(url, "/readyz", method="GET").status == 200
    capacity = asyncio.run(closed_loop(url, QUEUE_CAPACITY, seconds)).throughput
    measured, probes = asyncio.run(open_loop(url, OVERLOAD * capacity, seconds))
    bound = QUEUE_CAPACITY / capacity * 1000
    asked = sum(map(len, measured.by_status.values())) / seconds
    rows = [
        ("capacity, images/s", f"{capacity:.1f}"),
        ("asked, images/s", f"{asked:.1f} ({asked / capacity:.2f} × capacity)"),
        ("goodput", f"{measured.throughput:.1f} ({measured.throughput / capacity:.1%} of capacity)"),
        ("answers", ", ".join(f"{status}: {len(taken)}" for status, taken in sorted(measured.by_status.items()))),
        ("p99 of the accepted", f"{measured.p99_ms():.0f} ms (queue × time of one: {bound:.0f} ms)"),
        ("p99 of the refused", f"{measured.p99_ms(429):.1f} ms"),
        ("`/healthz`, p99 and worst", f"{np.percentile(probes, 99) * 1000:.1f} ms, {max(probes) * 1000:.1f} ms"),
    ]
    return "\n".join(["| at twice capacity | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement [10]")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison, in turns [3]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "slow.onnx"
        seconds = write_model(model)
        print(f"Inference of one image alone: {seconds * 1000:.1f} ms.\n")
        roomy = ("--queue-capacity", str(max(CLIENTS)))
        with server_process(folder, *roomy, model_path=model) as ours, bare_process(model) as bare:
            print(compare(ours.url, bare, given.seconds, given.rounds), end="\n\n", flush=True)
        with server_process(folder, "--queue-capacity", str(QUEUE_CAPACITY), model_path=model) as ours:
            print(overload(ours.url, given.seconds))


if __name__ == "__main__":
    main()
