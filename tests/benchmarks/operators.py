"""Milliseconds of each kind of operator and output shape in files, by ONNX Runtime's profile.

    python -m tests.benchmarks.operators FILE.onnx ... [--rounds N] [--size WIDTH HEIGHT] [--rows N]

The files take turns with one picture; medians. Prints a markdown table; nothing else should run on the machine.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime as ort

from model.detector import Detector, available_cores
from tests.benchmarks.measuring import command, machine, model_inputs, photo, table

Kind = tuple[str, str]
"""An operator's name, and the shape of its first output."""


def profiled(files: list[Path], rounds: int, size: tuple[int, int]) -> list[Counter[Kind]]:
    """Return milliseconds a run, by kind, of each file."""
    picture = photo(*size)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for number, file in enumerate(files):
            options = ort.SessionOptions()
            options.intra_op_num_threads = available_cores()
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / str(number))
            sessions.append(ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]))
        inputs = [model_inputs(picture, Detector(file, device="cpu").metadata.resize) for file in files]
        for _ in range(rounds + 1):
            for session, arrays in zip(sessions, inputs, strict=True):
                session.run(None, arrays)
        return [by_kind(json.loads(Path(session.end_profiling()).read_text()), rounds + 1) for session in sessions]


def by_kind(events: list[dict[str, Any]], runs: int) -> Counter[Kind]:
    """Sum the medians of the nodes of each kind, without the first run."""
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    nodes = len(kernels) // runs
    taken: Counter[Kind] = Counter()
    for number, event in enumerate(kernels[:nodes]):
        details = event["args"]
        [shape] = list(details["output_type_shape"][0].values()) if details["output_type_shape"] else [""]
        times = [again["dur"] for again in kernels[number + nodes :: nodes]]
        taken[details["op_name"], str(shape)] += statistics.median(times) / 1000
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.onnx")
    parser.add_argument("--rounds", type=int, default=9, help="[9]")
    parser.add_argument("--rows", type=int, default=30, help="the dearest kinds [30]")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(1280, 960), metavar=("WIDTH", "HEIGHT"), help="[1280 960]"
    )
    options = parser.parse_args()
    taken = profiled(options.files, options.rounds, tuple(options.size))
    dearest = sorted({kind for each in taken for kind in each}, key=lambda kind: -max(each[kind] for each in taken))
    rows = [(*kind, *(f"{each[kind]:.1f}" for each in taken)) for kind in dearest[: options.rows]]
    rows.append(("all", "", *(f"{each.total():.1f}" for each in taken)))
    print(f"{machine()}; medians of {options.rounds} turns, ms, {command('tests.benchmarks.operators')}\n")
    print(table(["operator", "output", *(file.name for file in options.files)], rows))


if __name__ == "__main__":
    main()
