"""A gate: a promise, and work in chunks that would break it. Finished chunks are kept, so that a killed run continues.

Each chunk has processes and files of its own, and depends on no other.
"""

import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.state import Chunk, State, now
from tests.support.serving import FAULT

Figures = Mapping[str, Any]
"""Numbers are summed over chunks; `most_…` and `least_…` are extremes; the rest is for a gate's own rows and plots."""
FAULT_CHARACTERS = 6000
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Work:
    """One chunk's share."""

    folder: Path
    first: int
    """Units that were done before it: a seed, so that no two chunks are alike."""
    count: int


@dataclass(frozen=True)
class Gate:
    name: str
    promise: str
    unit: str
    full: int
    """Units at scale 1."""
    step: int
    """Units of a chunk."""
    run: Callable[[Work], Figures]
    """Do the work. AssertionError: the promise is broken."""
    control: str
    """A fault of `tests.support.faulty_service`: a build with it has to fail."""
    control_units: int
    """Units that show it."""
    plot: Callable[[Sequence[Figures], Any], None] | None = None
    """Draw the figures of all chunks onto matplotlib's axes."""
    missing: Callable[[], str] = field(default=lambda: "")
    """Say what this machine lacks for it; empty: nothing."""

    def wanted(self, scale: float) -> int:
        return max(1, math.ceil(round(self.full * scale, 6)))


def complete(gate: Gate, state: State, scale: float, tell: Callable[[str], None]) -> None:
    """Run the remaining chunks of the gate, and keep each when it ends. A chunk with a fault is the last.

    The last is as long as the others, for in a shorter one, what a server keeps at first would look like growth.
    """
    wanted = gate.wanted(scale)
    while (done := state.units(gate.name)) < wanted and not state.faults(gate.name):
        chunk = measured(gate, done, min(gate.step, wanted))
        state.keep(chunk)
        tell(f"{gate.name}: {done + chunk.count:,} of {wanted:,} {gate.unit}, {chunk.seconds:.0f} s{_ending(chunk)}")


def check_control(gate: Gate, state: State, tell: Callable[[str], None]) -> None:
    """Run a chunk against the faulty build, unless the state has one."""
    if state.control(gate.name) is not None:
        return
    os.environ[FAULT] = gate.control
    try:
        chunk = measured(gate, 0, gate.control_units, control=gate.control)
    finally:
        del os.environ[FAULT]
    state.keep(chunk)
    tell(f"{gate.name}: the build with the fault {gate.control!r} {'is found' if chunk.found else 'IS NOT FOUND'}")


def measured(gate: Gate, first: int, count: int, control: str = "") -> Chunk:
    started, figures, fault = time.monotonic(), {"most_load_average_before": round(os.getloadavg()[0], 1)}, ""
    with tempfile.TemporaryDirectory(prefix=f"reliability-{gate.name}-") as folder:
        try:
            figures |= gate.run(Work(Path(folder), first, count))
        except Exception:  # whatever it is, the gate has not passed, and the report says why
            fault = shortened(traceback.format_exc().replace(f"{ROOT}/", ""))
    return Chunk(gate.name, first, count, time.monotonic() - started, figures, fault, control, *now())


def shortened(text: str) -> str:
    """Leave out the middle of a long one: what was raised stands before its message, which may be long, too."""
    return (
        text
        if len(text) <= FAULT_CHARACTERS
        else f"{text[: FAULT_CHARACTERS // 2]}\n…\n{text[-FAULT_CHARACTERS // 2 :]}"
    )


def _ending(chunk: Chunk) -> str:
    return f": FAILED\n{chunk.fault}" if chunk.fault else ""


def summed(parts: Sequence[Figures]) -> dict[str, float]:
    """The figures of all chunks as one."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, int | float):
                total[name] = _together(name, total[name], value) if name in total else value
    return total


def _together(name: str, one: float, other: float) -> float:
    if name.startswith("most_"):
        return max(one, other)
    return min(one, other) if name.startswith("least_") else one + other
