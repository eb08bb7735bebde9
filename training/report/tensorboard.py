"""The figures of metrics.jsonl as TensorBoard events, in `RUN/tensorboard/`: `tensorboard --logdir runs` shows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Scalars:
    """Writes the entries of a run that starts, or goes on, after `first_step` steps; later events are hidden."""

    def __init__(self, out: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """All numbers of an entry but its step, under `train/` or, of an evaluation, `validation/`."""
        group = "validation" if "ap" in entry else "train"
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
