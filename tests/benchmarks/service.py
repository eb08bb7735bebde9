"""The service compared with a bare FastAPI one, on the same model and picture, and at twice its capacity.

    python -m tests.benchmarks.service [--seconds N] [--rounds N]
    RETINASERVE_RUNS_AT_ONCE=1 python -m tests.benchmarks.service
    python -m tests.benchmarks.service --beside CHECKOUT    # with another checkout's service in place of the bare one

Prints markdown tables. Clients run in this process, servers in their own; nothing else should run on the machine. The
two services take turns, so that a machine that becomes slower does so for both. The ratio is that of a round's two
measurements, and the median of the rounds counts. Overload is measured twice: with clients on the service's own cores,
which they share, and with half of the cores for each.
"""

import argparse
import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
import psutil
import uvloop
from PIL import Image

from model.detector import Detector
from model.image import decode_image, to_canvas
from tests.benchmarks.measuring import machine
from tests.support.faulty_models import write_slow_model
from tests.support.load import address, ask, blocks, encoded, free_ports, listens, request_head
from tests.support.serving import server_process, wait_until

CLIENTS = (1, 8, 64)
INFERENCE_SECONDS = 0.005
QUEUE_CAPACITY = 32
OVERLOAD = 2.0
REACH = {1: "≥ 0.97", 64: "≥ 1.1"}
PROBE_SECONDS = 0.1
WARM_UP_SHARE = 0.2
PICTURE = Image.open(io.BytesIO(blocks(106, 64, seed=1)))
IMAGES = {kind: encoded(PICTURE, kind, quality=90) for kind in ("JPEG", "PNG", "WEBP", "TIFF")}
"""A JPEG first, as most clients send: the others are decoded in a child process, which costs a millisecond."""
REQUESTS = {kind: request_head(len(image)) + image for kind, image in IMAGES.items()}
CASES = (*(("JPEG", clients) for clients in CLIENTS), *((kind, n) for kind in ("PNG", "WEBP", "TIFF") for n in (1, 8)))
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass
class Latencies:
    """Seconds of each answer, by its status."""

    seconds: float
    """Duration of the measurement."""
    by_status: dict[int, list[float]] = field(default_factory=dict)
    exchanges: int = 0
    """Answers of any time, the warm-up too."""
    cpu_seconds: float = 0
    """CPU time of the server for these exchanges."""

    def note(self, status: int, latency: float) -> None:
        self.by_status.setdefault(status, []).append(latency)

    @property
    def throughput(self) -> float:
        return len(self.by_status.get(200, [])) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU time of the server for one exchange, milliseconds."""
        return self.cpu_seconds / self.exchanges * 1000

    def p99_ms(self, status: int = 200) -> float:
        taken = self.by_status.get(status, [])
        return float(np.percentile(taken, 99)) * 1000 if taken else float("nan")


@dataclass(frozen=True)
class Contender:
    url: str
    process_id: int

    def cpu_seconds(self) -> float:
        process = psutil.Process(self.process_id)
        times = [each.cpu_times() for each in (process, *process.children())]  # decoders are children
        return sum(each.user + each.system for each in times)


class Connection(asyncio.Protocol):
    """A keep-alive connection that costs the machine as little as possible: the server is on the same one."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answered: asyncio.Future[int] | None = None

    @classmethod
    async def to(cls, url: str) -> "Connection":
        _, connection = await asyncio.get_running_loop().create_connection(cls, *address(url))
        return connection

    async def exchange(self, request: bytes) -> int:
        """The answer's status. ConnectionError: none came, or one of unknown length."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not of its classes

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n") + 4
        if head_end < 4 or self._answered is None or self._answered.done():
            return
        length = CONTENT_LENGTH.search(self._received, 0, head_end)
        if length is None:  # Ray's proxy answers so before an application is there
            self._answered.set_exception(ConnectionError("an answer that does not tell its length"))
        elif len(self._received) >= head_end + int(length[1]):
            status = int(self._received[9:12])
            self._received.clear()
            self._answered.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError(f"closed before an answer: {error}"))


async def closed_loop(url: str, clients: int, seconds: float, request: bytes = REQUESTS["JPEG"]) -> Latencies:
    """Each client asks again as soon as it has its answer."""
    measured = Latencies(seconds)
    begin = time.perf_counter() + seconds * WARM_UP_SHARE
    end = begin + seconds

    async def client() -> None:
        connection = await Connection.to(url)
        while (started := time.perf_counter()) < end:
            status = await connection.exchange(request)
            answered = time.perf_counter()
            measured.exchanges += 1
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
        status = await connection.exchange(REQUESTS["JPEG"])
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
def bare_process(model: Path) -> Iterator[Contender]:
    [port] = free_ports(1)
    with subprocess.Popen([sys.executable, "-m", "tests.benchmarks.bare", str(model), str(port)]) as process:
        try:
            wait_until(lambda: process.poll() is not None or listens(f"http://127.0.0.1:{port}"))
            assert process.poll() is None, "the bare service does not start"
            yield Contender(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.kill()


def write_model(path: Path) -> float:
    """Write a model whose inference takes about INFERENCE_SECONDS here; what it takes in truth."""
    seconds, multiplications = 0.0, 1
    while seconds < INFERENCE_SECONDS * 0.9 and multiplications < 64:
        write_slow_model(path, multiplications)
        detector = Detector(path, device="cpu")
        canvas = to_canvas(decode_image(IMAGES["JPEG"]), detector.metadata.resize)
        seconds = median_seconds(lambda detector=detector, canvas=canvas: detector.run([canvas]))  # type: ignore[misc]
        multiplications += 1
    return seconds


def median_seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return median(taken[10:])


def measure(contender: Contender, kind: str, clients: int, seconds: float) -> Latencies:
    before = contender.cpu_seconds()
    measured = uvloop.run(closed_loop(contender.url, clients, seconds, REQUESTS[kind]))
    measured.cpu_seconds = contender.cpu_seconds() - before
    return measured


def service_of(checkout: Path) -> Sequence[str]:
    """Return Python's arguments that run this checkout's service, whose children then use its code too."""
    run = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    return "-c", run, str(checkout.resolve()), "-m", "service"


def compare(ours: Contender, bare: Contender, other: str, seconds: float, rounds: int) -> str:
    """Both services in turns."""
    taken: dict[tuple[str, int], tuple[list[Latencies], list[Latencies]]] = {case: ([], []) for case in CASES}
    for number in range(rounds):
        for (kind, clients), (our_rounds, bare_rounds) in taken.items():
            turns = [(ours, our_rounds), (bare, bare_rounds)]
            for contender, measured in turns if number % 2 else turns[::-1]:
                measured.append(measure(contender, kind, clients, seconds))
    head = (
        f"| picture | clients | service, images/s | {other} | ratio | lowest to highest | reach | service, p99 ms "
        f"| {other} | service, CPU ms an image | {other} |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    return "\n".join([head, *(comparison(*case, *both) for case, both in taken.items())])


def comparison(kind: str, clients: int, ours: Sequence[Latencies], bare: Sequence[Latencies]) -> str:
    """A row of the table."""
    assert all(set(each.by_status) == {200} for each in (*ours, *bare)), (
        "some were refused, or too few --seconds for one"
    )
    ratios = [our.throughput / other.throughput for our, other in zip(ours, bare, strict=True)]
    throughputs = [median(each.throughput for each in rounds) for rounds in (ours, bare)]
    p99s = [median(each.p99_ms() for each in rounds) for rounds in (ours, bare)]
    cpus = [median(each.cpu_ms for each in rounds) for rounds in (ours, bare)]
    cells = [
        kind,
        str(clients),
        *(f"{value:.1f}" for value in throughputs),
        f"{median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        REACH.get(clients, "") if kind == "JPEG" else "",
        *(f"{value:.1f}" for value in p99s),
        *(f"{value:.2f}" for value in cpus),
    ]
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Overload:
    """One round at a multiple of the rate that as many clients as places get."""

    capacity: float
    """Images/s, the mean of before and after."""
    measured: Latencies
    probes: list[float]
    """Seconds of each /healthz."""

    @property
    def asked(self) -> float:
        return sum(map(len, self.measured.by_status.values())) / self.measured.seconds

    @property
    def bound_ms(self) -> float:
        """The queue, at the time that one image takes."""
        return QUEUE_CAPACITY / self.capacity * 1000


def overload(url: str, seconds: float, rounds: int, times: float = OVERLOAD) -> list[Overload]:
    """Capacity, and so many times as much, in turns."""
    assert ask(url, "/readyz", method="GET").status == 200

    def capacity() -> float:
        return uvloop.run(closed_loop(url, QUEUE_CAPACITY, seconds)).throughput

    before, taken = capacity(), list[Overload]()
    for _ in range(rounds):
        measured, probes = uvloop.run(open_loop(url, times * before, seconds))
        after = capacity()
        taken.append(Overload((before + after) / 2, measured, probes))
        before = after
    return taken


OVERLOAD_REACH = {
    "goodput, of capacity": "≥ 95 %",
    "answers": "200 and 429",
    "p99 of the accepted": "the row above",
    "p99 of the refused": "< 50 ms",
    "`/healthz`, p99 and worst": "< 100 ms",
}


def overload_column(taken: Sequence[Overload]) -> dict[str, str]:
    """A column of the table, by row."""
    goodputs = [each.measured.throughput / each.capacity for each in taken]
    statuses = sorted(set().union(*(each.measured.by_status for each in taken)))
    counts = {status: sum(len(each.measured.by_status.get(status, [])) for each in taken) for status in statuses}
    return {
        "capacity, images/s": f"{median(each.capacity for each in taken):.1f}",
        "asked, of capacity": f"{median(each.asked / each.capacity for each in taken):.2f} ×",
        "goodput, of capacity": f"{median(goodputs):.1%} ({min(goodputs):.1%} to {max(goodputs):.1%})",
        "answers": ", ".join(f"{status}: {count}" for status, count in counts.items()),
        "queue × time of one": f"{median(each.bound_ms for each in taken):.0f} ms",
        "p99 of the accepted": f"{median(each.measured.p99_ms() for each in taken):.0f} ms",
        "p99 of the refused": f"{median(each.measured.p99_ms(429) for each in taken):.1f} ms",
        "`/healthz`, p99 and worst": f"{median(np.percentile(each.probes, 99) for each in taken) * 1000:.1f} ms, "
        f"{max(max(each.probes) for each in taken) * 1000:.1f} ms",
    }


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """This thread, and the processes that it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def overload_table(folder: Path, model: Path, seconds: float, rounds: int) -> str:
    places = ("--queue-capacity", str(QUEUE_CAPACITY))
    with server_process(folder, *places, model_path=model) as ours:
        columns = {"clients on the same cores": overload_column(overload(ours.url, seconds, rounds))}
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half:
        with on_cores(cores[:half]), contextlib.ExitStack() as running:
            alone_ms = write_model(model) * 1000  # as slow with fewer cores
            ours = running.enter_context(server_process(folder, *places, model_path=model))
            with on_cores(cores[half:]):
                column = overload_column(overload(ours.url, seconds, rounds))
        columns[f"on others: {half} for the service, one image alone {alone_ms:.1f} ms"] = column
    head = f"| at twice capacity | {' | '.join(columns)} | reach |\n|---|{'---:|' * len(columns)}---|"
    rows = [
        [row, *(column[row] for column in columns.values()), OVERLOAD_REACH.get(row, "")]
        for row in next(iter(columns.values()))
    ]
    return "\n".join([head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement [10]")
    parser.add_argument("--rounds", type=int, default=5, help="of both, in turns [5]")
    parser.add_argument(
        "--beside", type=Path, metavar="CHECKOUT", help="compare with its service, and leave overload out"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "slow.onnx"
        seconds = write_model(model)
        print(
            f"{machine()}; medians of {given.rounds} interleaved rounds of {given.seconds:g} s, "
            f"`python -m tests.benchmarks.service`; inference of one image alone: {seconds * 1000:.1f} ms\n",
            flush=True,
        )
        roomy = ("--queue-capacity", str(max(CLIENTS)))
        with server_process(folder, *roomy, model_path=model) as ours, contextlib.ExitStack() as stack:
            contender = Contender(ours.url, ours.process.pid)
            if given.beside:
                program = service_of(given.beside)
                that = stack.enter_context(server_process(folder, *roomy, model_path=model, program=program))
                print(compare(contender, Contender(that.url, that.process.pid), "that", given.seconds, given.rounds))
                return
            bare = stack.enter_context(bare_process(model))
            print(compare(contender, bare, "bare", given.seconds, given.rounds), end="\n\n", flush=True)
        print(overload_table(folder, model, given.seconds, given.rounds))


if __name__ == "__main__":
    main()
