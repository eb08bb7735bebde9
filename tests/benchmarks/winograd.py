"""`export --for cpu` beside the plain file and torchvision: ResNet-50 detectors in torchvision's layouts v1 and v2.

    python -m tests.benchmarks.winograd [--layouts v1 v2] [--rounds N] [--size WIDTH HEIGHT] [--cache DIR]

In turns: the plain file's session, the file for CPUs, torchvision eager from JPEG to detections. Random weights that
detect, one picture. Prints a markdown table; nothing else should run on the machine. A round takes about 5 s on two
cores; the models are made once, in the cache folder.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from model.detector import Detector, available_cores
from tests.benchmarks.cpu import torchvision_eager
from tests.benchmarks.measuring import (
    add_cache_flag,
    bare_session,
    command,
    interleaved,
    machine,
    model_inputs,
    photo,
    resnet50,
    table,
)


def measured(layout: str, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yield rows: measured, result, reach."""
    plain, for_cpu = (resnet50(options.cache, layout, made_for) for made_for in ("any", "cpu"))
    data = photo(*options.size)
    inputs = model_inputs(data, Detector(plain, device="cpu").metadata.resize)
    weights = options.cache / ("resnet50.pt" if layout == "v2" else f"resnet50-{layout}.pt")
    eager = torchvision_eager(weights, "_v2" if layout == "v2" else "")
    (ours, opened), (winograd, winograd_opened) = open_session(plain), open_session(for_cpu)
    runs = (functools.partial(session.run, None, inputs) for session in (ours, winograd))
    plain_seconds, seconds, eager_seconds = interleaved(options.rounds, *runs, lambda: eager(data))
    yield (
        f"{layout}: as fast as the plain session ({plain_seconds:.3f} s)",
        f"{plain_seconds / seconds:.2f} ×",
        "1.45",
    )
    yield (f"{layout}: as fast as torchvision eager ({eager_seconds:.3f} s)", f"{eager_seconds / seconds:.2f} ×", "1.9")
    scores = [np.sort(session.run(["scores"], inputs)[0]) for session in (ours, winograd)]
    yield f"{layout}: largest difference of scores, in order", f"{np.abs(scores[0] - scores[1]).max():.1e}", "1e-3"
    yield f"{layout}: seconds to open (plain {opened:.2f})", f"{winograd_opened:.2f}", ""
    sizes = [file.stat().st_size / 2**20 for file in (plain, for_cpu)]
    yield f"{layout}: file, MiB (plain {sizes[0]:.0f})", f"{sizes[1]:.0f}", ""
    held = [resident_mib(file, inputs) for file in (plain, for_cpu)]
    yield f"{layout}: memory after a run, MiB (plain {held[0]:.0f})", f"{held[1]:.0f}", ""


def open_session(file: Path) -> tuple[Any, float]:
    started = time.perf_counter()
    return bare_session(file), time.perf_counter() - started


def resident_mib(file: Path, inputs: dict[str, Any]) -> float:
    """Measure the memory of a process that has opened the file and run once."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "inputs.npz", **inputs)
        script = Path(__file__).parent / "session_memory.py"
        arguments = [sys.executable, script, file, str(available_cores()), Path(folder) / "inputs.npz"]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=("v1", "v2"), default=("v1", "v2"))
    parser.add_argument("--rounds", type=int, default=9, help="[9]")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(1280, 960), metavar=("WIDTH", "HEIGHT"), help="[1280 960]"
    )
    add_cache_flag(parser)
    options = parser.parse_args()
    flags = [flag for flag in ("avx2", "avx512f") if flag in Path("/proc/cpuinfo").read_text().split()]
    print(
        f"{machine()}, {' '.join(flags) or 'no AVX2'}; medians of {options.rounds} interleaved rounds, "
        f"{command('tests.benchmarks.winograd')}\n"
    )
    rows = [row for layout in options.layouts for row in measured(layout, options)]
    print(table(["measured", "result", "reach"], rows))


if __name__ == "__main__":
    main()
