"""The plan of a run: what is measured, for how long, and on which files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.metadata import ResizePolicy

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Plan:
    device: Literal["cpu", "cuda"]
    models: Path
    """Folder of what the section `models` makes and the others run."""
    canvases: tuple[tuple[int, int], ...]
    """(height, width); the first is the one that most sections are about."""
    batches: tuple[int, ...]
    """Batch sizes: a lone picture, a full batch, and larger ones."""
    clients: tuple[int, ...]
    picture: tuple[int, int]
    """(width, height) of the JPEG that clients send; its canvas is the first."""
    resize: ResizePolicy
    matrix: int
    """Side of the matrices multiplied for the peak."""
    seconds: float
    """Least duration of each measurement."""
    quick: bool

    @property
    def serving_batch(self) -> int:
        return self.batches[1]

    @property
    def precision(self) -> Precision:
        """Precision that serves on the device; a CPU has no half-precision arithmetic."""
        return "fp16" if self.device == "cuda" else "fp32"

    def model_file(self, precision: Precision) -> Path:
        return self.models / f"{precision}.onnx"

    def model_bytes(self, precision: Precision | None = None) -> bytes:
        return self.model_file(precision or self.precision).read_bytes()


FULL = Plan(
    device="cuda",
    models=Path(),
    canvases=((800, 1088), (1088, 800)),
    batches=(1, 8, 32),
    clients=(1, 8, 32, 128),
    picture=(1280, 960),
    resize=ResizePolicy(),
    matrix=8192,
    seconds=0.6,
    quick=False,
)
QUICK = Plan(
    device="cuda",
    models=Path(),
    canvases=((128, 192), (192, 128)),
    batches=(1, 2, 4),
    clients=(2,),
    picture=(192, 128),
    resize=ResizePolicy(shorter_side=128, longest_side=224),
    matrix=256,
    seconds=0.05,
    quick=True,
)
