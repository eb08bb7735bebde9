"""An .onnx file that detects: loaded, verified, run by ONNX Runtime. Needs no torch.

CanvasImage, one or a batch of one canvas size --Detector.run--> Candidates, one for each, in canvas pixels

The file is read once, so the bytes that `sha256` names are those that run. `model.runtime` chooses the device. It never
leaves CUDA silently: neither when the model is opened (see `fell_back`) nor when a run fails.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.image import to_canvas, to_original
from model.metadata import InvalidModel, ModelMetadata
from model.not_onnx import what_is_wrong
from model.runtime import Device, open_runtime
from model.runtime.cores import available_cores
from model.runtime.cpu import open_on_cpu
from model.runtime.session import DeviceUnavailable, Lane, is_out_of_memory, one_line
from model.suppress import suppress
from model.tiles import Tiling, detect_in_tiles
from model.types import Candidates, CanvasImage, Detections, Pixels
from model.untrusted import read_model

__all__ = ["Detector", "Device", "DeviceUnavailable", "InferenceFailed", "Lane", "available_cores"]

FailureKind = Literal["oom", "cuda", "other"]
CONTRACT = (
    "images uint8 [batch, height, width, 3] and sizes int64 [batch, 2] in, boxes float32 [batch, candidates, 4], "
    "scores float32 [batch, candidates] and labels int64 [batch, candidates] out"
)


class InferenceFailed(RuntimeError):
    """A run raised, or its outputs are not finite."""

    kind: FailureKind = "other"
    """Kind of failure. oom: the device's memory did not suffice. cuda: the device or its libraries failed."""
    fatal: bool = False
    """True: the device's context is lost, and no later run of this process can succeed."""

    @classmethod
    def because(cls, error: Exception) -> Self:
        """Make the error of an ONNX Runtime exception, from its message, the only information in it."""
        failure = cls(f"inference failed: {one_line(error)}")
        failure.kind = _kind(error)
        code = re.search(r"CUDA failure (\d+)", str(error))
        failure.fatal = code is not None and int(code[1]) in STICKY_CUDA_ERRORS
        return failure


# Of cudaError_t, those after which every call fails: uncorrectable ECC, invalid PTX of a lost device, peer and context
# lost (214, 220, 226, 709), traps and bad addresses (700, 702, 710, 714-719), no device and unknown (46, 100, 999).
STICKY_CUDA_ERRORS = frozenset({46, 100, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})


class Detector:
    """An open file. Thread-safe.

    Raises InvalidModel and DeviceUnavailable when built, InferenceFailed from run, detect and warm_up.
    """

    path: Path
    metadata: ModelMetadata
    sha256: str
    """Hex digest of the bytes that were loaded."""
    device_requested: Device
    provider: str
    """ONNX Runtime's execution provider: "CPUExecutionProvider", "CUDAExecutionProvider"."""
    fell_back: bool
    """True: `auto` found a GPU build of ONNX Runtime but could not use CUDA, so the CPU computes."""
    tf32: bool
    """True: the file is fp32, and CUDA computes its convolutions with 10 bits of mantissa."""
    lanes: int
    """Batches that may be on the device at once."""
    batch_size: int
    """Images of a batch beyond which the device gains nothing."""

    def __init__(
        self,
        path: Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        gpu_memory_limit_bytes: int | None = None,
        runs_at_once: int | None = 1,
        sha256: str | None = None,
    ) -> None:
        """Open a file.

        threads                 of one inference on the CPU [the cores available]
        gpu_memory_limit_bytes  of all models of the process [0.8 of the free memory at the first]
        runs_at_once            number of lanes [2; on a CPU 1 for a file over 64 MiB, because a second session holds
                                the weights once more, for a gain of some percent]
        sha256                  the file's hash [any], compared before anything interprets it"""
        model, self.sha256 = read_model(path, sha256)
        self.path, self.device_requested = path, device
        threads = threads or available_cores()
        session = _open_verified(path, model, threads)
        self.metadata = _metadata(path, session)
        self._runtime, self.fell_back = open_runtime(
            model,
            session,
            self.metadata,
            device=device,
            threads=threads,
            gpu_memory_limit_bytes=gpu_memory_limit_bytes,
            runs_at_once=runs_at_once,
        )
        self.provider, self.lanes = self._runtime.provider, self._runtime.lanes
        self.batch_size = self._runtime.batch_size
        self.tf32 = self._runtime.tf32 and self.metadata.precision == "fp32"

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> Lane | None:
        """Take a lane for `count` canvases of this (height, width), if one is free now. See Runtime.free_lane."""
        return self._runtime.free_lane(canvas_size, count, concurrent=concurrent)

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        """Have `call` called, on any thread, whenever a lane becomes free by other means than the end of its run."""
        self._runtime.when_lane_freed(call)

    def run(self, canvases: Sequence[CanvasImage], lane: Lane | None = None) -> list[Candidates]:
        """Return the candidates of each canvas, in order; all canvases have one canvas_size. Frees the lane, or waits
        for one if none is given."""
        assert len({canvas.canvas_size for canvas in canvases}) == 1, "a batch holds canvases of one size"
        try:
            outputs = (self._runtime if lane is None else lane).run(canvases)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise InferenceFailed.because(error) from error
        return _candidates(outputs)

    def warm_up(self, max_batch_size: int = 1) -> None:
        """Run blank canvases, so that the first picture does not wait for plans. Uses no lane of the caller's."""
        try:
            for outputs in self._runtime.warm_up(max_batch_size):
                _candidates(outputs)
        except InferenceFailed:
            raise
        except Exception as error:  # as in run
            raise InferenceFailed.because(error) from error

    def detect(
        self,
        image: Pixels,
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        label_ids: Collection[int] | None = None,
        tiling: Tiling | None = None,
    ) -> Detections:
        """Detect objects in one upright RGB picture, in its pixels. For None the file's metadata has the value.

        `tiling`: detect in its windows too, for objects that are small in a large picture.
        """
        metadata = self.metadata
        score_threshold = metadata.score_threshold if score_threshold is None else score_threshold
        nms_threshold = metadata.nms_threshold if nms_threshold is None else nms_threshold
        max_detections = metadata.max_detections if max_detections is None else max_detections
        if tiling is not None:
            return detect_in_tiles(
                image, tiling, metadata.resize, self.run, score_threshold=score_threshold, nms_threshold=nms_threshold,
                max_detections=max_detections, label_ids=label_ids, batch_size=self.batch_size,
            )  # fmt: skip
        canvas = to_canvas(image, metadata.resize)
        [candidates] = self.run([canvas])
        detections = suppress(
            candidates, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=max_detections,
            label_ids=label_ids,
        )  # fmt: skip
        return to_original(detections, canvas)


def _candidates(outputs: Sequence[NDArray[Any]]) -> list[Candidates]:
    """Make candidates of each row of a graph's outputs. InferenceFailed: a number is not finite."""
    boxes, scores, labels = outputs
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise InferenceFailed("the network's answer is not finite")
    return [Candidates(*row) for row in zip(boxes, scores, labels, strict=True)]


def _open_verified(path: Path, model: bytes, threads: int) -> ort.InferenceSession:
    try:
        session = open_on_cpu(model, threads)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise InvalidModel(f"{path} {what_is_wrong(model, one_line(error))}") from error
    if not _keeps_contract(session):
        came = ", ".join(f"{node.name} {node.type} {node.shape}" for node in _inputs_and_outputs(session))
        raise InvalidModel(f"{path} has {came}; a detector has {CONTRACT}")
    return session


def _metadata(path: Path, session: ort.InferenceSession) -> ModelMetadata:
    try:
        return ModelMetadata.from_props(session.get_modelmeta().custom_metadata_map)
    except InvalidModel as error:
        raise InvalidModel(f"{path}: {error}") from error


def _inputs_and_outputs(session: ort.InferenceSession) -> list[Any]:
    return [*session.get_inputs(), *session.get_outputs()]


def _keeps_contract(session: ort.InferenceSession) -> bool:
    """Check names, types and ranks; the input's axes by name, since CUDA sessions fix them by name."""
    found = {node.name: (node.type, node.shape) for node in _inputs_and_outputs(session)}
    if list(found) != ["images", "sizes", "boxes", "scores", "labels"]:
        return False
    boxes_type, boxes_shape = found["boxes"]
    return (
        found["images"] == ("tensor(uint8)", ["batch", "height", "width", 3])
        and found["sizes"] == ("tensor(int64)", ["batch", 2])
        and (boxes_type, len(boxes_shape), boxes_shape[-1]) == ("tensor(float)", 3, 4)
        and (found["scores"][0], len(found["scores"][1])) == ("tensor(float)", 2)
        and (found["labels"][0], len(found["labels"][1])) == ("tensor(int64)", 2)
    )


def _kind(error: Exception) -> FailureKind:
    if is_out_of_memory(error):
        return "oom"
    return "cuda" if re.search(r"CUDA|CUDNN|CUBLAS", str(error)) else "other"
