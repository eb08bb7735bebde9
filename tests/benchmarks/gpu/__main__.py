"""The detector on this machine's GPU, compared with what else the same GPU can do.

    python -m tests.benchmarks.gpu --out FILE.jsonl --models DIR [--sections NAMES]
    python -m tests.benchmarks.gpu --out FILE.jsonl --models DIR --device cpu --quick    the same code on a CPU, to see
                                                                                         that it works
    python -m tests.benchmarks.gpu --show FILE.jsonl                                     its tables as markdown

Needs a GPU with its driver, and the extras gpu, training and dev; without a GPU it says so and exits with code 2.
The model is a ResNet-50 RetinaNet of 80 classes with random weights, exported as `training export` does: speed does
not depend on the weights. Nothing else should run on the machine.

Each section is a process of its own with a time limit, so that one that fails, hangs or loses the device takes no other
with it. Each result is a line of FILE.jsonl as soon as it is measured; FILE.log gets what went wrong. The most valuable
sections come first:

    machine       GPU, driver, libraries, commit               agree         detections on the GPU are the CPU's
    models        the files that the others run                agree_random  the same of the ResNet-50
    options       NHWC, fused bias, cuDNN's search             graph         a CUDA graph, captured and replayed
    selection     the stages, ways to select, copies           memory        of sessions and threads; time to open one
    runtime       the runtime that serves, without HTTP        runtime_graph the same with captured graphs
    service       POST /detect with many clients
    speed         canvases and batches with the best options   torch         the same weights in torch, the peak
    train         seconds of a training step                   compile       torch.compile's full search
    published     what others have measured elsewhere
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from model.runtime.cuda_session import preload_cuda
from model.runtime.session import has_cuda_build
from tests.benchmarks.gpu.against_torch import compile_section, torch_section
from tests.benchmarks.gpu.agreement import agree, agree_random
from tests.benchmarks.gpu.machine import machine, models
from tests.benchmarks.gpu.memory import memory
from tests.benchmarks.gpu.options import graph, options, speed
from tests.benchmarks.gpu.plan import FULL, QUICK, Plan
from tests.benchmarks.gpu.published import published
from tests.benchmarks.gpu.report import Report, lines, markdown
from tests.benchmarks.gpu.runtime import runtime, runtime_graph
from tests.benchmarks.gpu.selection import selection
from tests.benchmarks.gpu.service import service
from tests.benchmarks.gpu.training import train

SECTIONS: dict[str, tuple[int, Callable[[Plan, Report], None]]] = {
    "machine": (20, machine),
    "agree": (120, agree),
    "models": (120, models),
    "agree_random": (75, agree_random),
    "options": (100, options),
    "graph": (30, graph),
    "selection": (50, selection),
    "memory": (45, memory),
    "runtime": (40, runtime),
    "runtime_graph": (50, runtime_graph),
    "service": (110, service),
    "speed": (40, speed),
    "torch": (60, torch_section),
    "train": (60, train),
    "compile": (120, compile_section),
    "published": (10, published),
}
"""By name: the seconds a section may take on a GPU, and what it does."""
SLOWER_WITHOUT_GPU = 4


def run_section(name: str, given: argparse.Namespace, seconds: float) -> str | None:
    """Run it in a process of its own. Answers why it did not end well, or None."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--only", name, "--out", str(given.out)]
    command += ["--models", str(given.models), "--device", given.device, *(["--quick"] if given.quick else [])]
    log_path = given.out.with_suffix(".log")
    with log_path.open("ab") as log:
        start = log.tell()
        log.write(f"== {name}\n".encode())
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "stopped: the time was up"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started, a server, must not outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log_path.read_bytes()[start:].decode(errors="replace").splitlines()[1:]
    last = next((line for line in reversed(said) if line.strip()), "it said nothing")
    return None if code == 0 else f"failed (exit code {code}): {last[:300]}"


def run_sections(names: Iterable[str], given: argparse.Namespace) -> int:
    """Run them in order, and answer how many did not end well."""
    failures = 0
    for name in names:
        report = Report(given.out, name)
        limit = SECTIONS[name][0] * (SLOWER_WITHOUT_GPU if given.device == "cpu" else 1)
        started = time.monotonic()
        failure = run_section(name, given, limit)
        report.end(time.monotonic() - started, failure)
        failures += failure is not None
        print("\n".join(markdown(line for line in lines(given.out) if line["section"] == name)), flush=True)
    return failures


def why_no_gpu() -> str | None:
    if not has_cuda_build():
        return "this ONNX Runtime is built without CUDA: install the extra gpu, not cpu"
    preload_cuda()
    count = ctypes.c_int()
    try:
        error = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.split('.')[0]}").cudaGetDeviceCount(ctypes.byref(count))
    except OSError:
        return "CUDA's libraries are not installed"
    return None if count.value else f"CUDA finds no device (error {error})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="file of JSON lines that results are added to")
    what.add_argument("--show", type=Path, help="such a file, to print as markdown")
    parser.add_argument("--models", type=Path, default=Path(".bench/gpu"), help="folder for models [.bench/gpu]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, moments instead of seconds: shows no speed")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.sections = given.sections.split(",")
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    return given


def main() -> int:
    given = parse()
    if given.show:
        print("\n".join(markdown(lines(given.show))))
        return 0
    if given.only:
        plan = replace(QUICK if given.quick else FULL, device=given.device, models=given.models.absolute())
        SECTIONS[given.only][1](plan, Report(given.out, given.only))
        return 0
    if given.device == "cuda" and (reason := why_no_gpu()):
        print(f"no GPU to measure: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no section is left behind
    given.models.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return 1 if run_sections(given.sections, given) else 0


if __name__ == "__main__":
    sys.exit(main())
