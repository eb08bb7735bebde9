"""The sections `options`, `graph` and `speed`: what the CUDA provider's options, a captured graph and the batch do."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from model.runtime.cuda_session import CudaOptions, InputShape
from tests.benchmarks.gpu.machine import gigaflop
from tests.benchmarks.gpu.plan import Plan, Precision
from tests.benchmarks.gpu.report import Report, median_seconds, milliseconds, significant, timed
from tests.benchmarks.gpu.session import GUESS, Bound, photographs

PLAIN = CudaOptions(prefer_nhwc=False, fuse_conv_bias=False)
"""ONNX Runtime's own defaults, but for the search."""
VARIANTS = (
    PLAIN,
    replace(PLAIN, prefer_nhwc=True),
    GUESS,
    replace(GUESS, algorithm_search="EXHAUSTIVE"),
    replace(PLAIN, algorithm_search="EXHAUSTIVE"),
    PLAIN,  # again: what differs from the first time is noise
)
VARIED = ("prefer_nhwc", "fuse_conv_bias", "algorithm_search", "use_tf32")


def options(plan: Plan, report: Report) -> None:
    if plan.device == "cpu":
        report.note("these are options of CUDA: on a CPU all of them are the same session")
    report.table("precision", "batch", *VARIED, "s to open", "s to plan", "ms", "images/s", "over the first",
                 "largest score difference")  # fmt: skip
    for batch in (plan.serving_batch, plan.batches[0]):
        shape = InputShape(batch, *plan.canvases[0])
        first: list[tuple[float, Any]] = []
        for cuda in VARIANTS:
            report.attempt(_key(plan.precision, batch, cuda), partial(_measured, plan, shape, cuda, first))
    shape = InputShape(plan.serving_batch, *plan.canvases[0])
    first = []
    for cuda in (replace(PLAIN, use_tf32=False), PLAIN, replace(GUESS, use_tf32=False), GUESS):
        report.attempt(
            _key("fp32", plan.serving_batch, cuda), partial(_measured, plan, shape, cuda, first, precision="fp32")
        )


def _key(precision: str, batch: int, cuda: CudaOptions) -> list[Any]:
    return [precision, batch, *(getattr(cuda, name) for name in VARIED)]


def _measured(
    plan: Plan, shape: InputShape, cuda: CudaOptions, first: list[tuple[float, Any]], precision: Precision | None = None
) -> Sequence[Any]:
    """`first` gets the seconds and scores of the first that ran; the others are compared with them."""
    session = Bound(plan.model_bytes(precision), plan, shape, cuda)
    [seconds] = median_seconds(plan.seconds, session.run)
    scores = session.best_scores()
    first.append((seconds, scores))
    return [round(session.open_seconds, 2), round(session.plan_seconds, 2), milliseconds(seconds),
            significant(shape.batch / seconds), f"{first[0][0] / seconds:.3f}",
            significant(float(np.abs(scores - first[0][1]).max()), 2)]  # fmt: skip


def best_options(report: Report) -> CudaOptions:
    """The fastest of the section `options` in fp16 at the serving batch, among those that plan in no time; today's
    guess where it was not run."""
    rows = [row for table in report.tables("options") for row in table if isinstance(row.get("ms"), float)]
    rows = [row for row in rows if row["batch"] != 1 and row["precision"] == "fp16"]
    rows = [row for row in rows if row["algorithm_search"] == GUESS.algorithm_search]
    if not rows:
        return GUESS
    best = min(rows, key=lambda row: row["ms"])
    return CudaOptions(**{name: best[name] for name in VARIED})


def graph(plan: Plan, report: Report) -> None:
    """Launched: the host gives the device each kernel. Replayed: a captured graph gives it all of them at once."""
    best = best_options(report)
    report.note(f"with {asdict(best)}")
    report.table("batch", "ms launched", "of which the host launches", "ms replayed", "ratio", "host replays",
                 "largest score difference on other pictures", "first run on another thread, ms",
                 "200 replays beside uploads")  # fmt: skip
    for batch in plan.batches[:2]:
        report.attempt([batch], partial(_replayed, plan, InputShape(batch, *plan.canvases[0]), best))


def _replayed(plan: Plan, shape: InputShape, best: CudaOptions) -> Sequence[Any]:
    plain = Bound(plan.model_bytes(), plan, shape, best)
    captured = Bound(plan.model_bytes(), plan, shape, replace(best, capture_graph=plan.device == "cuda"))
    launched, replayed = median_seconds(plan.seconds, plain.run, captured.run)
    on_host = [float(np.median([session.launch() for _ in range(20)])) for session in (plain, captured)]
    other = np.stack(photographs(*shape, seed=9))  # a graph that replays old values shows here
    for session in (plain, captured):
        session.inputs["images"].update_inplace(other)
        session.run()
    difference = float(np.abs(plain.best_scores() - captured.best_scores()).max())
    elsewhere: list[float] = []
    thread = threading.Thread(target=lambda: elsewhere.append(timed(captured.run)[1]))
    thread.start()
    thread.join()
    return [milliseconds(launched), milliseconds(on_host[0]), milliseconds(replayed), f"{launched / replayed:.3f}",
            milliseconds(on_host[1]), significant(difference, 2), milliseconds(elsewhere[0]),
            _beside_uploads(captured, plain, other)]  # fmt: skip


def _beside_uploads(captured: Bound, other_session: Bound, images: Any) -> str:
    """Say whether replays work while another thread uploads."""
    done = threading.Event()

    def upload() -> None:
        while not done.is_set():
            other_session.inputs["images"].update_inplace(images)

    thread = threading.Thread(target=upload)
    thread.start()
    try:
        for _ in range(200 if captured.plan_seconds < 1 else 5):
            captured.run()
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        return f"failed: {error}"[:200]
    finally:
        done.set()
        thread.join()
    return "all came"


def speed(plan: Plan, report: Report) -> None:
    """The session alone: pictures are on the device, answers stay there."""
    best = best_options(report)
    report.note(f"with {asdict(best)}; pictures are on the device, answers stay there")
    report.table("canvas", "batch", "images/s", "ms per batch", "TFLOP/s")
    for height, width in plan.canvases:
        for batch in plan.batches:
            shape = InputShape(batch, height, width)
            report.attempt([f"{height}×{width}", batch], partial(_speed, plan, shape, best))


def _speed(plan: Plan, shape: InputShape, best: CudaOptions) -> Sequence[Any]:
    [seconds] = median_seconds(plan.seconds, Bound(plan.model_bytes(), plan, shape, best).run)
    rate = gigaflop(plan, shape.height, shape.width) * shape.batch / seconds / 1e3
    return [significant(shape.batch / seconds), milliseconds(seconds), significant(rate)]
