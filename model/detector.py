"""An .onnx file that detects: loaded, verified, run by ONNX Runtime. Needs no torch.

CanvasImage, one or a batch of one canvas size --Detector.run--> Candidates, one for each, in canvas pixels

The file is read once: what `sha256` names is what runs. CUDA is never left silently: not when the model is opened (see
`fell_back`), and not when a run fails.
"""

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnxruntime as ort

from model.image import to_canvas, to_original
from model.metadata import InvalidModel, ModelMetadata, ResizePolicy
from model.not_onnx import what_is_wrong
from model.runtime.cores import available_cores
from model.runtime.cpu import AnyShape, open_on_cpu
from model.runtime.cuda import BYTES_PER_PIXEL, FixedShapes, InputShape, open_on_cuda, padded_batch, preload_cuda
from model.runtime.session import CPU, CUDA, DeviceUnavailable, has_cuda_build
from model.suppress import suppress
from model.types import Candidates, CanvasImage, Detections, Pixels

__all__ = ["Detector", "Device", "DeviceUnavailable", "InferenceFailed", "available_cores"]

Device = Literal["auto", "cpu", "cuda"]
FailureKind = Literal["oom", "cuda", "other"]
DEFAULT_GPU_MEMORY_BYTES = 12 * 2**30
"""Leaves a card of 16 GiB some air."""
COMMON_SIZES = ((1200, 1200), (1200, 1600), (1600, 1200), (1200, 1800), (1800, 1200), (1080, 1920), (1920, 1080))
"""(height, width) of pictures whose canvases `warm_up` runs: 1:1, 4:3, 3:2, 16:9, both ways."""
RUNS_AT_ONCE = 2
LARGE_MODEL_BYTES = 64 * 2**20
SHORT_RUN_SECONDS = 0.02
"""On a CPU, beside runs shorter than this the pauses in which threads wake and Python works count."""
CONTRACT = (
    "images uint8 [batch, height, width, 3] and sizes int64 [batch, 2] in, boxes float32 [batch, candidates, 4], "
    "scores float32 [batch, candidates] and labels int64 [batch, candidates] out"
)

logger = logging.getLogger(__name__)


class Lane:
    """A permit for one run: `Detector.free_lane` gives it, the run with it ends it."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared


class InferenceFailed(RuntimeError):
    """A run raised, or answered with numbers that are not finite."""

    kind: FailureKind = "other"
    """oom: the device's memory did not suffice. cuda: the device or its libraries failed."""
    fatal: bool = False
    """The device's context is lost: no later run of this process can succeed."""

    @classmethod
    def because(cls, error: Exception) -> Self:
        """Read off ONNX Runtime's message: its exceptions carry nothing else."""
        failure = cls(f"inference failed: {_one_line(error)}")
        failure.kind = _kind(str(error))
        code = re.search(r"CUDA failure (\d+)", str(error))
        failure.fatal = code is not None and int(code[1]) in STICKY_CUDA_ERRORS
        return failure


# Of cudaError_t, those after which every call fails: uncorrectable ECC, invalid PTX of a lost device, peer and context
# lost (214, 220, 226, 709), traps and bad addresses (700, 702, 710, 714-719), no device and unknown (46, 100, 999).
STICKY_CUDA_ERRORS = frozenset({46, 100, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})


class Detector:
    """An open file. `run` is thread-safe; on CUDA one batch runs at a time, another caller's is uploaded meanwhile.

    Raises InvalidModel and DeviceUnavailable when built, InferenceFailed from run, detect and warm_up.
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
        runs_at_once: int | None = 1,
    ) -> None:
        """`threads` for one inference on the CPU [the cores available]; `gpu_memory_limit_bytes` [12 GiB] bounds an
        estimate, see FixedShapes; `runs_at_once` side by side, see `free_lane` [None: 2, but on a CPU 1 for a file
        over 64 MiB: a second session takes the weights' memory once more, for a gain of some percent]."""
        if device == "cuda" and not has_cuda_build():
            raise DeviceUnavailable("this ONNX Runtime is built without CUDA: install retinaserve[gpu] and no [cpu]")
        model = _read(path)
        self.path, self.device_requested = path, device
        self._threads = threads or available_cores()
        self.sha256 = hashlib.sha256(model).hexdigest()
        session = _open_verified(path, model, self._threads)
        self.metadata = _metadata(path, session)
        self.provider, self.fell_back = CPU, False
        self._run_batch: AnyShape | FixedShapes = AnyShape(session)
        self._for_short_runs: Callable[[], ort.InferenceSession] | None = partial(
            open_on_cpu, model, self._threads, short_runs=True
        )
        if device != "cpu" and has_cuda_build():
            self._move_to_cuda(model, gpu_memory_limit_bytes or DEFAULT_GPU_MEMORY_BYTES)
        self._run_beside = self._open_beside(model, runs_at_once) if self.provider == CPU else None
        self._lanes: list[Lane] = []
        self.lanes = RUNS_AT_ONCE if self._run_beside is not None or self.provider == CUDA else 1

    def _open_beside(self, model: bytes, runs_at_once: int | None) -> AnyShape | None:
        """What runs of a crowd share on a CPU; None: they take turns."""
        if runs_at_once is None:
            runs_at_once = RUNS_AT_ONCE if len(model) <= LARGE_MODEL_BYTES else 1
        if self._threads == 1 or runs_at_once == 1:
            return None
        return AnyShape(open_on_cpu(model, max(1, self._threads + 1 - runs_at_once)))  # each run's caller computes, too

    def _move_to_cuda(self, model: bytes, memory_limit_bytes: int) -> None:
        def open_session(shape: InputShape) -> ort.InferenceSession:
            return open_on_cuda(model, shape, memory_limit_bytes)

        preload_cuda()
        on_cuda = FixedShapes(
            open_session,
            memory="cuda",
            weight_bytes=len(model),
            limit_bytes=memory_limit_bytes,
            bytes_per_pixel=BYTES_PER_PIXEL[self.metadata.precision],
        )
        try:
            on_cuda([blank_canvas(COMMON_SIZES[1], self.metadata.resize)])
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            if self.device_requested == "cuda":
                raise DeviceUnavailable(f"{self.path} cannot run on CUDA: {_one_line(error)}") from error
            logger.warning("CUDA cannot be used, %s runs on the CPU: %s", self.path, _one_line(error))
            self.fell_back = True
        else:
            self.provider, self._run_batch = CUDA, on_cuda
            self._for_short_runs = None

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> Lane | None:
        """A lane for a batch of `count` such canvases, taken; None: all are. `concurrent`: another run is under way, or
        more wait than this batch takes."""
        shared = self.provider == CUDA or (concurrent and self._run_beside is not None)
        if self._lanes and not (shared and len(self._lanes) < self.lanes and all(lane.shared for lane in self._lanes)):
            return None
        self._lanes.append(Lane(shared=shared))
        return self._lanes[-1]

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        """`call` when a lane became free other than by the end of a run with it."""

    def run(self, canvases: Sequence[CanvasImage], lane: Lane | None = None) -> list[Candidates]:
        """One answer per canvas, in order; all canvases have one canvas_size. The lane is free when it returns."""
        assert len({canvas.canvas_size for canvas in canvases}) == 1, "a batch holds canvases of one size"
        beside = self._run_beside if lane is not None and lane.shared else None
        run_batch = beside or self._run_batch
        try:
            boxes, scores, labels = run_batch(canvases)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise InferenceFailed.because(error) from error
        finally:
            if lane is not None:
                with contextlib.suppress(ValueError):  # warm-up's own
                    self._lanes.remove(lane)
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            raise InferenceFailed("the network's answer is not finite")
        return [Candidates(*row) for row in zip(boxes, scores, labels, strict=True)]

    def warm_up(self, max_batch_size: int = 1) -> None:
        """Run blank canvases, so that the first real picture finds plans made: on the CPU a small one, and a whole
        one where that takes little; on CUDA the common ones, alone and in the batches up to `max_batch_size` that get
        sessions of their own, as many of them as the memory limit holds."""
        if isinstance(self._run_batch, AnyShape):
            self._warm_up_cpu(blank_canvas(COMMON_SIZES[1], self.metadata.resize))
            return
        batches = common_batches(self.metadata.resize, max_batch_size)
        if without := sum(not self._warm(batch) for batch in batches):
            logger.warning(
                "%d of the %d common canvases and batch sizes have no room beside the others and will start slowly: "
                "a larger gpu_memory_limit_bytes or a smaller max_batch_size helps",
                without,
                len(batches),
            )

    def _warm_up_cpu(self, blank: CanvasImage) -> None:
        """A quarter of the canvas tells what is broken; where it takes long, waiting for the whole would bring nothing.
        Where it does not, the whole tells if runs are short, for which the session is opened anew."""
        seconds = self._seconds(_quarter(blank, self.metadata.resize))
        if seconds < 10 * SHORT_RUN_SECONDS:
            seconds = min(self._seconds(blank) for _ in range(2))
        if self._for_short_runs is not None and seconds < SHORT_RUN_SECONDS:
            self._run_batch = AnyShape(self._for_short_runs())
            self.run([blank])
        if self._run_beside is not None:
            self.run([_quarter(blank, self.metadata.resize)], Lane(shared=True))
        self._for_short_runs = None  # it holds the file's bytes

    def _seconds(self, canvas: CanvasImage) -> float:
        started = time.perf_counter()
        self.run([canvas])
        return time.perf_counter() - started

    def _warm(self, batch: Sequence[CanvasImage]) -> bool:
        """False: there is no room for its session beside those that are open."""
        assert isinstance(self._run_batch, FixedShapes)
        if not self._run_batch.has_room(len(batch), *batch[0].canvas_size):
            return False
        self.run(batch)
        return True

    def detect(
        self,
        image: Pixels,
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        label_ids: Collection[int] | None = None,
    ) -> Detections:
        """The objects of one upright RGB picture, in its pixels; None means the file's metadata decides."""
        metadata = self.metadata
        canvas = to_canvas(image, metadata.resize)
        [candidates] = self.run([canvas])
        detections = suppress(
            candidates,
            score_threshold=metadata.score_threshold if score_threshold is None else score_threshold,
            nms_threshold=metadata.nms_threshold if nms_threshold is None else nms_threshold,
            max_detections=metadata.max_detections if max_detections is None else max_detections,
            label_ids=label_ids,
        )
        return to_original(detections, canvas)


def blank_canvas(size: tuple[int, int], resize: ResizePolicy) -> CanvasImage:
    """Of a black picture of this (height, width)."""
    return to_canvas(np.zeros((*size, 3), np.uint8), resize)


def _quarter(canvas: CanvasImage, resize: ResizePolicy) -> CanvasImage:
    """A blank one of half the sides, in whole divisors."""
    height, width = (max(1, side // 2 // resize.divisor) * resize.divisor for side in canvas.canvas_size)
    return CanvasImage.uniform((height, width))


def common_batches(resize: ResizePolicy, max_batch_size: int) -> list[list[CanvasImage]]:
    """Blank ones, small batches first: one for each common canvas and each number of images that gets a session."""
    canvases = {canvas.canvas_size: canvas for canvas in (blank_canvas(size, resize) for size in COMMON_SIZES)}
    batch_sizes = sorted({padded_batch(count) for count in range(1, max_batch_size + 1)})
    return [[canvas] * min(count, max_batch_size) for count in batch_sizes for canvas in canvases.values()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error


def _open_verified(path: Path, model: bytes, threads: int | None) -> ort.InferenceSession:
    try:
        session = open_on_cpu(model, threads)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise InvalidModel(f"{path} {what_is_wrong(model, _one_line(error))}") from error
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
    """Names, types and ranks; the input's axes by name, since CUDA sessions fix them by name."""
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


def _one_line(error: Exception) -> str:
    return " ".join(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).split())


def _kind(message: str) -> FailureKind:
    if re.search(r"out of memory|failed to allocate|ALLOC_FAILED|bad_alloc|CUDA failure 2:", message, re.IGNORECASE):
        return "oom"
    return "cuda" if re.search(r"CUDA|CUDNN|CUBLAS", message) else "other"
