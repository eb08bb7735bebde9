"""The end of a run before its last step: SIGTERM, and diverging losses."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from training.loss.losses import Losses

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code 143, which shells report for a process that SIGTERM ended; --resume continues the run."""
STOPPED = "SIGTERM: stopped; --resume continues from the last checkpoint"
COMPARED_STEPS = 20
"""Steps whose mean loss is compared."""


class Terminated(Exception):
    """SIGTERM came, which clusters and `docker stop` send; the checkpoint is written."""


class TrainingDiverged(RuntimeError):
    """Losses or weights are NaN or infinite, or the losses grow; the text names the step."""

    def __init__(self, cause: str, last: Path) -> None:
        super().__init__(
            f"{cause}. The last good weights are in {last}, if a checkpoint was due; "
            f"a lower --learning-rate, more --warmup-steps or --gradient-clip may help."
        )


class StopRequest:
    """A flag that is set by SIGTERM. For the main thread."""

    def __init__(self) -> None:
        self.came = False
        self._interrupts = False

    @contextmanager
    def heeded(self) -> Iterator["StopRequest"]:
        """Handle SIGTERM within this context, and restore the old handler at its end."""
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the signal raise Terminated at once within this context, for work that can be discarded."""
        self._interrupts = True
        try:
            if self.came:
                raise Terminated(STOPPED)
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self._interrupts:
            raise Terminated(STOPPED)


@dataclass
class DivergenceCheck:
    """Raises TrainingDiverged when a loss is NaN or infinite, or when the mean of COMPARED_STEPS losses is `factor`
    times the first such mean."""

    factor: float
    last: Path
    """Checkpoint that the error names."""
    recent: list[float] = field(default_factory=list)
    first_mean: float | None = None

    def check(self, step: int, losses: Losses) -> None:
        total = losses.total.item()
        if not math.isfinite(total):
            classification, box = losses.classification.item(), losses.box.item()
            raise TrainingDiverged(
                f"step {step}: classification loss {classification:.4g}, box loss {box:.4g}", self.last
            )
        self.recent.append(total)
        if len(self.recent) < COMPARED_STEPS:
            return
        mean = sum(self.recent) / COMPARED_STEPS
        self.recent.clear()
        if self.first_mean is None:
            self.first_mean = mean
        elif self.factor and mean > self.factor * self.first_mean:
            cause = f"the mean loss of {COMPARED_STEPS} steps is {mean:.4g}, and began at {self.first_mean:.4g}"
            raise TrainingDiverged(f"step {step}: {cause}", self.last)
