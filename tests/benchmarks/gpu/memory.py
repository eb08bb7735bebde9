"""The section `memory`: what sessions and threads take of the card, and how long a new one takes."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from model.runtime.cuda_device import DEFAULT_OPTIONS
from model.runtime.cuda_session import InputShape, free_bytes, share_arena
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, milliseconds, timed
from tests.benchmarks.gpu.session import MEMORY_LIMIT_BYTES, Bound

THREADS = 8
HOWS: dict[str, dict[str, bool]] = {
    "a memory pattern in each": {"pattern": True},
    "no memory pattern": {},
    "one arena for all, no pattern, as served": {"shared_arena": True},
}


def memory(plan: Plan, report: Report) -> None:
    report.note(f"with {asdict(DEFAULT_OPTIONS)}; a session's weights are {len(plan.model_bytes()) / 1e6:.0f} MB")
    report.table("how", "shape", "MB more", "bytes per pixel, less weights", "s to open", "s to plan", "second run, ms")
    for how, given in HOWS.items():
        kept: list[Bound] = []
        if given.get("shared_arena") and plan.device == "cuda":
            share_arena(MEMORY_LIMIT_BYTES)
        for batch in plan.batches[:2]:
            for canvas in plan.canvases:
                shape = InputShape(batch, *canvas)
                open_one = partial(Bound, plan.model_bytes(), plan, shape, DEFAULT_OPTIONS, **given)
                report.attempt([how, "×".join(map(str, shape))], partial(_opened, plan, shape, open_one, kept))
    threads(plan, report)


def _opened(plan: Plan, shape: InputShape, open_one: Callable[[], Bound], kept: list[Bound]) -> Sequence[Any]:
    weights, before = plan.model_file(plan.precision).stat().st_size, used_bytes(plan)
    session = open_one()
    _, second = timed(session.run)
    kept.append(session)
    more = used_bytes(plan) - before
    per_pixel = (more - weights) / (shape.batch * shape.height * shape.width)
    return [round(more / 1e6), round(per_pixel), round(session.open_seconds, 2), round(session.plan_seconds, 2),
            milliseconds(second)]  # fmt: skip


def threads(plan: Plan, report: Report) -> None:
    report.table("first run of one session on a new thread", "ms", "MB more")
    session = Bound(plan.model_bytes(), plan, InputShape(plan.batches[0], *plan.canvases[0]), DEFAULT_OPTIONS)
    for number in range(THREADS):
        before = used_bytes(plan)
        taken: list[float] = []
        thread = threading.Thread(target=lambda taken=taken: taken.append(timed(session.run)[1]))
        thread.start()
        thread.join()
        report.add(number + 1, milliseconds(taken[0]), round((used_bytes(plan) - before) / 1e6))


def used_bytes(plan: Plan) -> int:
    """The card's memory in use by any process, less a constant; 0 where there is none."""
    return -(free_bytes() or 0) if plan.device == "cuda" else 0
