"""The sections `runtime` and `runtime_graph`: the runtime that serves, without JPEG, HTTP and NMS."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from model.image import decode_image, to_canvas
from model.runtime.cores import available_cores
from model.runtime.cuda import BYTES_PER_PIXEL, CudaRuntime
from model.runtime.cuda_device import DEFAULT_OPTIONS, CudaDevice, first_gpu
from model.runtime.cuda_session import CudaOptions, InputShape, fixed_shape_options, open_on_cuda
from model.runtime.session import CPU, open_session
from model.types import CanvasImage
from tests.benchmarks.gpu.memory import used_bytes
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, milliseconds, significant, timed
from tests.benchmarks.measuring import photo

SETTLE_RUNS = 3


def runtime(plan: Plan, report: Report) -> None:
    _busy_with(plan, report, DEFAULT_OPTIONS)


def runtime_graph(plan: Plan, report: Report) -> None:
    _busy_with(plan, report, replace(DEFAULT_OPTIONS, capture_graph=plan.device == "cuda"))


def _busy_with(plan: Plan, report: Report, options: CudaOptions) -> None:
    """Uploads, runs and reads, by as many threads as keep it busy; each lays its pictures in."""
    report.note(f"with {asdict(options)}")
    opened = open_runtime(plan, options)
    canvas = to_canvas(decode_image(photo(*plan.picture)), plan.resize)
    assert canvas.canvas_size == plan.canvases[0], "the clients' picture has another canvas than the benchmark"
    report.table("batch", "threads", "images/s", "ms per batch")
    answers = []
    for batch in plan.batches[:2]:
        answers.append(opened.run([canvas] * batch)[1][0])
        for threads in (1, 2, 3):
            report.attempt([batch, threads], partial(_busy, plan, opened, [canvas] * batch, threads))
    difference = np.abs(np.sort(answers[0])[-100:] - np.sort(answers[1])[-100:]).max()
    report.note(f"a lone picture's best scores and those in a batch differ by {difference:.2g} at most")
    before = used_bytes(plan)
    outputs, seconds = timed(lambda: list(opened.warm_up(plan.serving_batch)))
    report.note(f"warm-up of {len(outputs)} shapes in {seconds:.1f} s, {len(opened.shapes())} sessions are open; "
                f"{(used_bytes(plan) - before) / 1e9:.1f} GB more of the card")  # fmt: skip


def open_runtime(plan: Plan, options: CudaOptions) -> CudaRuntime:
    """As a service opens it; on a CPU the same machinery over sessions of the CPU."""
    model = plan.model_bytes()
    device = first_gpu(None, options) if plan.device == "cuda" else CudaDevice("cpu", 2**40, options)

    def open_shape(shape: InputShape) -> ort.InferenceSession:
        if plan.device == "cuda":
            return open_on_cuda(model, shape, device.limit_bytes, options)
        return open_session(model, fixed_shape_options(shape, available_cores()), [CPU])

    return CudaRuntime(
        open_shape, device, plan.resize, weight_bytes=len(model), bytes_per_pixel=BYTES_PER_PIXEL[plan.precision]
    )


def _busy(plan: Plan, opened: CudaRuntime, batch: Sequence[CanvasImage], threads: int) -> Sequence[Any]:
    for _ in range(SETTLE_RUNS):
        opened.run(batch)
    end = time.perf_counter() + 2 * plan.seconds

    def run(_: int) -> int:
        runs = 0
        while time.perf_counter() < end:
            opened.run(batch)
            runs += 1
        return runs

    with ThreadPoolExecutor(threads) as pool:
        runs, seconds = timed(lambda: sum(pool.map(run, range(threads))))
    return [significant(runs * len(batch) / seconds), milliseconds(seconds / runs)]
