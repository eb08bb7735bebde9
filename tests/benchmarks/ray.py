"""The cost of Ray: the service on Ray compared with the service without, on this machine.

    python -m tests.benchmarks.ray [--only TABLE] [--python FILE] [--model FILE.onnx] [--clients N ...] [--requests N]

Both run in one environment, which is made in the cache folder (or `--python`'s), with the same threads. In each round
each is started, warmed up, asked for the same pictures, and ended before the other starts. Clients send their next
request as soon as they have an answer. Prints markdown; nothing else should run on the machine.
"""

import argparse
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from model.detector import available_cores
from model.pretrained import PRETRAINED
from tests.benchmarks.compare import PEERS, Measured, Peer, measure, raw, server
from tests.benchmarks.measuring import add_cache_flag, command, environment, machine, mixed_photos, table
from tests.benchmarks.ray_batch import batch

ROOT = Path(__file__).parents[2]
ALONE = PEERS[0]
ON_RAY = Peer("Ray Serve", ("-m", "tests.benchmarks.peers.ray_service"), raw)


def python_with_ray(cache: Path) -> Path:
    """The Python of an environment with the service's requirements and Ray's, made where it is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return environment(cache, "service-on-ray", [*project["dependencies"], *extras["cpu"], *extras["ray"]])


def serve(given: argparse.Namespace, python: Path) -> str:
    """The table of Ray Serve: images a second and latencies through it and without it."""
    measured = {peer.name: {number: Measured() for number in given.clients} for peer in (ALONE, ON_RAY)}
    for _ in range(given.rounds):
        for peer in (ALONE, ON_RAY):
            with (
                tempfile.TemporaryDirectory(prefix="b", ignore_cleanup_errors=True) as folder,
                server(peer, python, given.model.absolute(), Path(folder)) as url,
            ):
                measure(url, peer, 1, 3)  # warms up
                for number in given.clients:
                    throughput, latencies = measure(url, peer, number, given.requests)
                    measured[peer.name][number].throughputs.append(throughput)
                    measured[peer.name][number].latencies += latencies
    rows = [serve_row(number, measured[ALONE.name][number], measured[ON_RAY.name][number]) for number in given.clients]
    head = [
        "Ray Serve, clients",
        "alone, images/s",
        "on Ray, images/s",
        "ratio",
        "alone, median ms",
        "on Ray, median ms",
    ]
    return table(head, rows)


def serve_row(clients: int, alone: Measured, on_ray: Measured) -> Sequence[object]:
    ratio = on_ray.throughput / alone.throughput
    speeds = [f"{each.throughput:.2f}" for each in (alone, on_ray)]
    return [clients, *speeds, f"{ratio:.3f}", *(f"{each.median_ms:.0f}" for each in (alone, on_ray))]


TABLES: dict[str, Callable[[argparse.Namespace, Path], str]] = {"serve": serve, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, help="one of the tables [all]")
    parser.add_argument("--python", type=Path, help="Python of an environment that has both [one in the cache]")
    parser.add_argument("--model", type=Path, default=PRETRAINED, help="what both serve [the demo model]")
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8), help="at once [1 8]")
    parser.add_argument("--requests", type=int, default=100, help="of each measurement, at least 2 a client [100]")
    parser.add_argument("--rounds", type=int, default=3, help="in which both take their turn [3]")
    add_cache_flag(parser)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    python = given.python or python_with_ray(given.cache)
    print(
        f"{machine()}; {given.model.name} on {available_cores()} threads, JPEGs of {len(mixed_photos())} sizes, "
        f"medians of {given.rounds} rounds; {command('tests.benchmarks.ray')}\n"
    )
    for name, make_table in TABLES.items():
        if given.only in (None, name):
            print(make_table(given, python), "\n", sep="")


if __name__ == "__main__":
    main()
