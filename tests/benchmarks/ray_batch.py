"""The batch job on Ray Data compared with `service detect` and the service: images a second, and starts separately.

Part of `python -m tests.benchmarks.ray`. A command takes some pictures, then twice as many. The additional time gives
its rate, and the rest of the first time is its start. Eight clients ask the service for as many pictures.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.compare import PEERS, ROOT, measure, server
from tests.benchmarks.measuring import mixed_photos, table

CLIENTS = 8
Timed = Callable[[int], float]
"""Seconds that so many pictures take."""


def batch(given: argparse.Namespace, python: Path) -> str:
    """The table of the batch job: its rate and that of `service detect`, over the service's."""
    contestants = {
        "service, 8 clients": partial(asked, given.model.absolute(), python),
        "service detect": partial(run, python, ("-m", "service", "detect"), given.model.absolute()),
        "cluster detect": partial(run, python, ("-m", "cluster", "detect"), given.model.absolute()),
    }
    pairs: Mapping[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(given.rounds):
        for name, seconds_of in contestants.items():
            pairs[name].append((seconds_of(given.requests), seconds_of(2 * given.requests)))
    [first, *_] = rates = {name: rate(given.requests, each) for name, each in pairs.items()}
    rows = [
        [name, f"{each:.2f}", f"{each / rates[first]:.3f}", f"{start(pairs[name]):.1f}"] for name, each in rates.items()
    ]
    rows[0][-1] = "–"
    return table(["batch", "images/s", "of the service", "start, s"], rows)


def rate(count: int, pairs: Sequence[tuple[float, float]]) -> float:
    """Images a second, without the start."""
    return count / statistics.median(twice - once for once, twice in pairs)


def start(pairs: Sequence[tuple[float, float]]) -> float:
    """Seconds of the start and the end."""
    return statistics.median(2 * once - twice for once, twice in pairs)


def asked(model: Path, python: Path, count: int) -> float:
    """The service, which is up already."""
    [alone, *_] = PEERS
    with (
        tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as folder,
        server(alone, python, model, Path(folder)) as url,
    ):
        measure(url, alone, 1, 3)  # warms up
        throughput, _ = measure(url, alone, CLIENTS, count)
    return count / throughput


def run(python: Path, command: Sequence[str], model: Path, count: int) -> float:
    """A command from its start to its end, over a folder of so many pictures."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        photos = mixed_photos()
        for number in range(count):
            (pictures / f"{number:06}.jpg").write_bytes(photos[number % len(photos)])
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        arguments = [str(pictures), "--out", str(Path(folder) / "out"), "--model", str(model)]
        started = time.perf_counter()
        subprocess.run(
            [python, *command, *arguments],
            check=True, cwd=ROOT, env=variables | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - started
