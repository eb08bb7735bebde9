"""The service compared with its alternatives: FastAPI, LitServe, BentoML, Ray Serve, PyTriton.

    python -m tests.benchmarks.compare [--model FILE.onnx | --resnet50] [--clients N ...] [--requests N] [--rounds N]

Each serves the same ONNX file with the same threads, by our own code for decoding and NMS (tests/benchmarks/peers/), in
a virtual environment of its own, which is made in the cache folder. In each round every server is started, warmed up,
asked for the same pictures by 1, 8 and 64 clients, and ended before the next one starts. Clients send their next
request as soon as they have an answer. A server that cannot be installed or started has its reason in the table. Prints
markdown; nothing else should run on the machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.detector import available_cores
from model.pretrained import PRETRAINED
from tests.benchmarks.measuring import (
    InstallFailed,
    add_cache_flag,
    command,
    environment,
    machine,
    mixed_photos,
    resnet50,
    table,
)
from tests.benchmarks.service import Connection
from tests.support.load import free_ports

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
PATIENCE_SECONDS = 1500
"""For one measurement; then the server is given up."""
BOUNDARY = "3f0a7c1e9d"
MODEL_PACKAGES = (
    "numpy==2.4.6", "onnxruntime==1.32.0", "opencv-python-headless==5.0.0.93", "pillow==13.0.0", "pydantic==2.14.3",
    "simplejpeg==1.9.0",
)  # fmt: skip
"""Packages of `model`, in the versions of constraints.txt."""


def raw(data: bytes) -> bytes:
    return _request("/detect", "Content-Type: image/jpeg", data)


def form(data: bytes) -> bytes:
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
    body = f"{part}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return _request("/detect", f"Content-Type: multipart/form-data; boundary={BOUNDARY}", body)


def triton(data: bytes) -> bytes:
    """A BYTES tensor of one element, by the binary data extension of Triton's HTTP API."""
    element = struct.pack("<I", len(data)) + data
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
    outputs = [{"name": "answer", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    headers = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}"
    return _request("/v2/models/detect/infer", headers, head + element)


def _request(path: str, headers: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True)
class Peer:
    name: str
    arguments: tuple[str, ...]
    """After `python`; PORT stands for the port."""
    request: Callable[[bytes], bytes]
    """The HTTP request with this JPEG, in the cheapest form that the server takes."""
    packages: tuple[str, ...] = ()
    """The server itself first; these besides and instead of MODEL_PACKAGES. None: our own environment."""
    setting: str = ""
    """How it is set up, for the table."""
    inferences: int = 1
    """At once, in processes that share the cores out."""


PEERS = (
    Peer(
        "retinaserve",
        ("-m", "service", "--port", "PORT", "--queue-capacity", "64", "--request-timeout-seconds", "600"),
        raw,
        setting="defaults, places for 64",
    ),
    Peer(
        "FastAPI",
        ("-m", "tests.benchmarks.peers.fastapi_server"),
        raw,
        ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
        "thread pool, inferences in turn",
    ),
    Peer(
        "LitServe, 1 worker",
        ("-m", "tests.benchmarks.peers.litserve_server", "1"),
        form,
        ("litserve==0.2.19", "python-multipart==0.0.34"),
        "1 worker of all threads",
    ),
    Peer(
        "LitServe, 2 workers",
        ("-m", "tests.benchmarks.peers.litserve_server", "2"),
        form,
        ("litserve==0.2.19", "python-multipart==0.0.34"),
        "2 workers, the threads shared out",
        inferences=2,
    ),
    Peer(
        "BentoML",
        ("-m", "bentoml", "serve", "tests.benchmarks.peers.bentoml_server:Service", "--port", "PORT",
         "--host", "127.0.0.1"),
        form,
        ("bentoml==1.4.39",),
        "1 worker of 2 threads, inferences in turn",
    ),
    Peer(
        "Ray Serve",
        ("-m", "tests.benchmarks.peers.ray_server"),
        raw,
        ("ray[serve]==2.60.0",),
        "1 replica, 100 ongoing, 2 threads, inferences in turn",
    ),
    Peer(
        "PyTriton",
        ("-m", "tests.benchmarks.peers.pytriton_server"),
        triton,
        ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "opencv-python-headless==4.11.0.86"),  # it wants numpy 1
        "2 instances, dynamic batcher without delay, inferences in turn",
    ),
)  # fmt: skip


class PeerFailed(RuntimeError):
    """It did not install, start or answer; the text says which and why."""


@dataclass
class Measured:
    """Measurements of one server at one number of clients, over all rounds."""

    throughputs: list[float] = field(default_factory=list)
    """Images per second, one for each round."""
    latencies: list[float] = field(default_factory=list)
    """Seconds, of every request."""

    @property
    def throughput(self) -> float:
        return float(np.median(self.throughputs))

    @property
    def median_ms(self) -> float:
        return float(np.median(self.latencies)) * 1000

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies, 99)) * 1000


def requirements_of(peer: Peer) -> tuple[str, ...]:
    own = {requirement.partition("==")[0] for requirement in peer.packages}
    shared = [requirement for requirement in MODEL_PACKAGES if requirement.partition("==")[0] not in own]
    return (*peer.packages, *shared)


def python_of(peer: Peer, cache: Path) -> Path:
    if not peer.packages:
        return Path(sys.executable)
    try:
        name = re.split(r"\W", peer.packages[0].removeprefix("nvidia-"))[0]
        return environment(cache, name, requirements_of(peer))
    except InstallFailed as error:
        raise PeerFailed(f"not installed: {error}") from error


@contextlib.contextmanager
def server(peer: Peer, python: Path, model: Path, folder: Path) -> Iterator[str]:
    """Start it; its address. All its processes are ended at the end. PeerFailed: it did not start."""
    [port] = free_ports(1)
    variables = {
        "BENCHMARK_MODEL": str(model),
        "BENCHMARK_PORT": str(port),
        "BENCHMARK_THREADS": str(max(1, available_cores() // peer.inferences)),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder),
        "DO_NOT_TRACK": "1",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",  # one port, as a client without a balancer has it
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # as its guide to performance advises
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RETINASERVE_MODEL": str(model),  # ours reads it
    }
    arguments = [str(port) if argument == "PORT" else argument for argument in peer.arguments]
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, *arguments], env=os.environ | variables, cwd=ROOT, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_answer(peer, process, url, log)
        yield url
    finally:
        end_session(process)


def end_session(process: "subprocess.Popen[bytes]", patience_seconds: float = 20) -> None:
    """Ask the server to end, then kill what is left of the session that it began."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_seconds)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()


def _wait_for_answer(peer: Peer, process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Until a picture is answered with 200, which no server does before its model is loaded."""
    request = peer.request(mixed_photos(1)[0])

    async def once() -> int:
        connection = await Connection.to(url)
        try:
            return await asyncio.wait_for(connection.exchange(request), START_SECONDS)
        finally:
            connection.close()

    last, end = "no connection", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if (status := asyncio.run(once())) == 200:
                return
            last = f"status {status}"
        except (OSError, EOFError, TimeoutError) as error:
            last = repr(error)
        time.sleep(0.2)
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise PeerFailed(f"not started: {last}; {' '.join(tail)[:200]}")


async def closed_loop(url: str, requests: Sequence[bytes], clients: int, count: int) -> tuple[float, list[float]]:
    """Send `count` requests, the given ones in turn, from so many clients: images per second, seconds of each.

    By number and not by time, so that every server answers the same pictures. PeerFailed: another answer than 200.
    """
    latencies: list[float] = []
    turns = iter(range(count))

    async def client() -> None:
        connection = await Connection.to(url)
        for turn in turns:
            started = time.perf_counter()
            status = await connection.exchange(requests[turn % len(requests)])
            latencies.append(time.perf_counter() - started)
            if status != 200:
                raise PeerFailed(f"answered {status} at {clients} clients")
        connection.close()

    started = time.perf_counter()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - started), latencies


def measure(url: str, peer: Peer, clients: int, count: int) -> tuple[float, list[float]]:
    requests = [peer.request(data) for data in mixed_photos()]
    try:
        return asyncio.run(closed_loop(url, requests, clients, max(count, 2 * clients)))
    except (OSError, EOFError, TimeoutError) as error:
        raise PeerFailed(f"broke at {clients} clients: {error!r}") from error


def compare(
    peers: Sequence[Peer], model: Path, cache: Path, clients: Sequence[int], count: int, rounds: int
) -> tuple[dict[str, dict[int, Measured]], dict[str, str]]:
    """Return the measurements, and each failed peer's reason; its answers until then still count."""
    measured = {peer.name: {number: Measured() for number in clients} for peer in peers}
    failed: dict[str, str] = {}
    for round_number in range(rounds):
        for peer in peers:
            if peer.name in failed:
                continue
            print(f"round {round_number + 1} of {rounds}: {peer.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as folder:
                try:
                    with server(peer, python_of(peer, cache), model, Path(folder)) as url:
                        measure(url, peer, 1, 3)  # warms up
                        for number in clients:
                            throughput, latencies = measure(url, peer, number, count)
                            measured[peer.name][number].throughputs.append(throughput)
                            measured[peer.name][number].latencies += latencies
                except Exception as error:  # whatever it is, the others' minutes shall not be lost
                    failed[peer.name] = str(error) or repr(error)
    return measured, failed


def report(
    peers: Sequence[Peer], clients: Sequence[int], measured: dict[str, dict[int, Measured]], failed: dict[str, str]
) -> str:
    """One row for each: throughput over the best of the others, p99, for each number of clients."""
    head = ["server", "set up"]
    for number in clients:
        head += [f"{number} client{'s' * (number > 1)}: images/s", "of the best", "p99, ms"]
    best = {
        number: max((row[number].throughput for row in measured.values() if row[number].throughputs), default=0)
        for number in clients
    }
    rows = []
    for peer in peers:
        row: list[object] = [peer.name, peer.setting]
        for number in clients:
            each = measured[peer.name][number]
            if each.throughputs:
                row += [f"{each.throughput:.2f}", f"{each.throughput / best[number]:.3f}", f"{each.p99_ms:.0f}"]
            else:
                row += ["–"] * 3
        rows.append(row)
    reasons = [f"{name}: {reason}" for name, reason in failed.items()]
    return "\n\n".join([table(head, rows), *reasons])


def versions(peers: Sequence[Peer]) -> str:
    return ", ".join(dict.fromkeys(peer.packages[0] for peer in peers if peer.packages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRETRAINED, help="what all serve [the demo model]")
    parser.add_argument("--resnet50", action="store_true", help="serve a ResNet-50 of random weights instead")
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8, 64), help="at once [1 8 64]")
    parser.add_argument("--requests", type=int, default=100, help="of each measurement, at least 2 a client [100]")
    parser.add_argument("--rounds", type=int, default=3, help="in which all take their turn [3]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="servers whose names begin so [all]")
    add_cache_flag(parser)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    peers = [
        peer for peer in PEERS if given.only is None or peer.name.lower().startswith(tuple(map(str.lower, given.only)))
    ]
    model = resnet50(given.cache) if given.resnet50 else given.model.absolute()
    measured, failed = compare(peers, model, given.cache, given.clients, given.requests, given.rounds)
    print(
        f"{machine()}; {model.name}, JPEGs of {len(mixed_photos())} sizes, medians of {given.rounds} rounds, p99 over "
        f"all of them; {versions(peers)}; {command('tests.benchmarks.compare')}\n"
    )
    print(report(peers, given.clients, measured, failed))


if __name__ == "__main__":
    main()
