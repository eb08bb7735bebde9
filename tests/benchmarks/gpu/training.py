"""The section `train`: `python -m training train` on drawn pictures, seconds of a step by precision.

The steps are the command's own, with its loading of pictures, validation and checkpoints around them; what is reported
are the seconds that metrics.jsonl says, of the steps after the first few.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.runtime.cores import available_cores
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, significant, timed

SETTLE_STEPS = 4
STEPS = 20
FLAGS = ("--log-every", "1", "--evaluate-every", "0", "--no-pretrained-backbone", "--learning-rate", "0.001",
         "--warmup-steps", "10")  # fmt: skip
SMALL = ("--backbone", "resnet18", "--backbone-width", "0.25", "--fpn-channels", "16", "--head-channels", "16",
         "--head-convs", "1", "--shorter-side", "128")  # fmt: skip


def train(plan: Plan, report: Report) -> None:
    report.table("precision", "images a step", "s a step", "of it waiting for pictures, s", "images/s", "first step, s",
                 "loss, first and last", "s of the whole command")  # fmt: skip
    batch, steps, workers = (2, SETTLE_STEPS + 1, 0) if plan.quick else (8, STEPS, min(12, available_cores()))
    flags = ("--device", plan.device, "--batch-size", batch, "--steps", steps, "--workers", workers, *FLAGS)
    if plan.quick:
        flags += SMALL
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        _training("demo", "--out", data, "--images", 4 * batch, "--validation-images", 2)
        for precision in ("fp32",) if plan.quick else ("bf16", "fp32", "fp16"):
            run = Path(folder) / precision
            command = partial(_training, "train", "--data", data, "--out", run, "--precision", precision, *flags)
            report.attempt([precision, batch], partial(_steps, run, command, batch))
    report.note("fp32 convolves in TF32 on a GPU: torch's default")


def _steps(run: Path, command: Callable[[], None], batch: int) -> list[Any]:
    _, whole = timed(command)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "step_seconds" in line]
    settled = steps[SETTLE_STEPS:]
    waiting = statistics.median(line["data_seconds"] for line in settled)
    seconds = waiting + statistics.median(line["step_seconds"] for line in settled)
    losses = [line["classification_loss"] + line["box_loss"] for line in (steps[0], steps[-1])]
    return [significant(seconds), significant(waiting), significant(batch / seconds), steps[0]["step_seconds"],
            [significant(loss) for loss in losses], round(whole, 1)]  # fmt: skip


def _training(*arguments: object) -> None:
    command = [sys.executable, "-m", "training", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"training {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
