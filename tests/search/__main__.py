"""Look for the costliest file of each format: python -m tests.search [--seconds N] [--format NAME …] [--seed N]

Prints for each format the worst file found, by its time on the event loop, its CPU seconds and its memory, each as a
share of what is allowed, with the genes it is made of. Exit code 1: one is over its bound. `--keep DIR` writes them.
"""

import argparse
import sys
from pathlib import Path

from tests.search.climb import Found, search
from tests.search.cost import Meter
from tests.search.formats import formats

MAX_BYTES = 20 * 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each format [60]")
    parser.add_argument("--format", nargs="*", help="these alone [all]")
    parser.add_argument("--pixels", type=int, default=50_000_000, help="the largest picture [50 million]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write the worst files into this folder")
    options = parser.parse_args(arguments)
    over = 0
    for name, species in formats(options.pixels).items():
        if options.format and name not in options.format:
            continue
        with Meter(options.pixels) as meter:
            worst = search(species, meter, MAX_BYTES, options.seconds, options.seed)
        for kind, found in zip(("time", "memory", "claim"), worst, strict=True):
            over += found.cost.worst > 1
            print(_line(name, kind, found), flush=True)
            if options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{name}-{kind}").write_bytes(species.build(found.genes))
    return 1 if over else 0


def _line(name: str, kind: str, found: Found) -> str:
    cost, genes = found.cost, " ".join(f"{gene}={value}" for gene, value in found.genes.items())
    shares = f"time {cost.time:.2f} memory {cost.memory:.2f} claim {cost.claim:.2f}"
    return f"{name:5} worst {kind:6} {shares} of what is allowed, {found.size:,} bytes: {genes}"


if __name__ == "__main__":
    sys.exit(main())
