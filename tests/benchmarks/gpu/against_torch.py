"""The sections `torch` and `compile`: the same weights in torch, beside ONNX Runtime in one process and in turns.

torch gets what a careful user gives it: norms folded into the convolutions as the export folds them, fp16,
channels-last, cuDNN's search for the fastest kernels, a CUDA graph, and in `compile` its compiler's full search.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from model.runtime.cuda_session import CudaOptions, InputShape
from tests.benchmarks.gpu.options import best_options
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, median_seconds, milliseconds, significant
from tests.benchmarks.gpu.session import Bound, photographs

HEAD = ("batch", "engine", "images/s", "ms", "ONNX Runtime, ms", "its ratio", "largest score difference")


def torch_section(plan: Plan, report: Report) -> None:
    peak(plan, report)
    best = best_options(report)
    report.table(*HEAD)
    detector = folded_detector(plan)
    for batch in plan.batches:
        run = answering(plan, detector, batch)
        report.attempt([batch, "torch eager"], partial(_beside, plan, batch, run, best))
        if plan.device == "cuda":
            report.attempt([batch, "torch CUDA graph"], partial(_graph_beside, plan, batch, run, best))


def compile_section(plan: Plan, report: Report) -> None:
    import torch

    best = best_options(report)
    report.table(*HEAD)
    batch = plan.serving_batch
    detector = folded_detector(plan)
    mode: dict[str, str] = {"backend": "eager"} if plan.quick else {"mode": "max-autotune"}
    report.attempt(
        [batch, f"torch.compile, {mode}"],
        lambda: _beside(plan, batch, answering(plan, torch.compile(detector, dynamic=False, **mode), batch), best),  # type: ignore[call-overload]
    )


def folded_detector(plan: Plan) -> Any:
    """The module on the device, as fast as torch's user can have it without a compiler."""
    import torch

    from model.folding import fold_norms
    from training.checkpoint import build_detector, load_checkpoint
    from training.exchange.onnx_file import half_network

    torch.backends.cudnn.benchmark = True
    folded = fold_norms(build_detector(load_checkpoint(plan.models / "random.pt")))
    detector = (half_network(folded) if plan.precision == "fp16" else folded).to(plan.device).eval()
    detector.network.to(memory_format=torch.channels_last)
    return detector


def answering(plan: Plan, engine: Any, batch: int) -> Callable[[], Any]:
    """A run on pictures that are on the device; it ends with the device's work."""
    import torch

    height, width = plan.canvases[0]
    images = torch.from_numpy(np.stack(photographs(batch, height, width))).to(plan.device)
    sizes = torch.tensor([[height, width]] * batch, device=plan.device)

    def run() -> Any:
        with torch.inference_mode():
            outputs = engine(images, sizes)
        if plan.device == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return outputs

    return run


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the run."""
    import torch

    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return outputs

    return replay


def _graph_beside(plan: Plan, batch: int, run: Callable[[], Any], best: CudaOptions) -> Sequence[Any]:
    return _beside(plan, batch, captured(run), best)


def _beside(plan: Plan, batch: int, run: Callable[[], Any], best: CudaOptions) -> Sequence[Any]:
    session = Bound(plan.model_bytes(), plan, InputShape(batch, *plan.canvases[0]), best)
    theirs, ours = median_seconds(plan.seconds, run, session.run)
    scores = run()[1].float().cpu().sort(dim=1, descending=True).values[:, :100].numpy()
    difference = float(np.abs(session.best_scores() - scores).max())
    assert difference < 0.1, f"these are not the same weights: scores differ by {difference:.3f}"
    return [significant(batch / theirs), milliseconds(theirs), milliseconds(ours), f"{theirs / ours:.3f}",
            significant(difference, 2)]  # fmt: skip


def peak(plan: Plan, report: Report) -> None:
    """The matrix product and the copy that this device reaches through torch."""
    import torch

    def timed_alone(action: Callable[[], Any]) -> float:
        def run() -> None:
            action()
            if plan.device == "cuda":
                torch.cuda.synchronize()

        return median_seconds(plan.seconds, run)[0]

    report.table("what", "reached")
    half = torch.float16 if plan.device == "cuda" else torch.float32
    one, other = (torch.randn(plan.matrix, plan.matrix, device=plan.device, dtype=half) for _ in range(2))
    seconds = timed_alone(lambda: one @ other)
    report.add(f"{plan.precision} product of {plan.matrix} × {plan.matrix}, TFLOP/s",
               significant(2 * plan.matrix**3 / seconds / 1e12))  # fmt: skip
    source = torch.randn(plan.matrix, 4 * plan.matrix, device=plan.device)
    target = torch.empty_like(source)
    seconds = timed_alone(lambda: target.copy_(source))
    report.add("copy on the device, read and written, TB/s", significant(2 * source.nbytes / seconds / 1e12))
