"""An .onnx file that detects: loaded, verified, run by ONNX Runtime. Needs no torch."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from model.metadata import ModelMetadata
from model.types import Candidates, CanvasImage, Detections, Pixels

Device = Literal["auto", "cpu", "cuda"]
PRETRAINED = Path(__file__).parent / "pretrained" / "shapes.onnx"


class DeviceUnavailable(RuntimeError):
    """The device asked for cannot be used: no CUDA wheel, library, driver or GPU."""


class InferenceFailed(RuntimeError):
    """A run raised, or answered with numbers that are not finite."""

    kind: Literal["oom", "cuda", "other"]
    fatal: bool
    """The device's context is lost: no later run of this process can succeed."""


class Detector:
    """An open file. `run` is thread-safe; on CUDA callers queue up, so use one thread per device.

    Raises InvalidModel (model.metadata) and DeviceUnavailable when built, InferenceFailed from run, detect, warm_up.
    """

    path: Path
    metadata: ModelMetadata
    sha256: str
    """Hex digest of the bytes that were loaded."""
    device_requested: Device
    provider: str
    """ONNX Runtime's name of what computes: "CPUExecutionProvider", "CUDAExecutionProvider"."""
    fell_back: bool
    """`auto` found a GPU build of ONNX Runtime but could not use CUDA, and the CPU computes."""

    def __init__(
        self,
        path: Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        gpu_memory_limit_bytes: int | None = None,
    ) -> None:
        raise NotImplementedError

    def run(self, canvases: Sequence[CanvasImage]) -> list[Candidates]:
        """One answer per canvas, in order; all canvases have one canvas_size (see CanvasImage)."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Run the common canvases once, so that the first real picture finds plans and memory made."""
        raise NotImplementedError

    def detect(
        self,
        image: Pixels,
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        label_ids: Collection[int] | None = None,
    ) -> Detections:
        """The objects of one upright RGB picture, original pixels; None means the file's metadata decides."""
        raise NotImplementedError


def available_cores() -> int:
    """Cores this process may use: affinity and cgroup quota, at least 1."""
    raise NotImplementedError
