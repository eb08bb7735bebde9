"""CUDA: a session for each input shape, with two lanes each: one runs while the other is uploaded.

A batch is padded to the next power of two, to keep the number of shapes small. `model.runtime.cuda_device` holds what
the models of the process share, and `model.runtime.cuda_session` one session.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from model.metadata import ModelMetadata, Precision, ResizePolicy
from model.runtime.cuda_device import CudaDevice, ShapeSession, first_gpu
from model.runtime.cuda_session import Buffers, InputShape, open_on_cuda, padded_batch
from model.runtime.session import CUDA, RUNS_AT_ONCE, blank_canvas, is_out_of_memory
from model.types import CanvasImage

logger = logging.getLogger(__name__)

COMMON_SIZES = ((1200, 1200), (1200, 1600), (1600, 1200), (1200, 1800), (1800, 1200), (1080, 1920), (1920, 1080))
"""Sizes (height, width) of pictures whose canvases `warm_up` runs: 1:1, 4:3, 3:2, 16:9, landscape and portrait."""
BYTES_PER_PIXEL: Mapping[Precision, int] = {"fp32": 733, "fp16": 421, "int8": 733}
"""Bytes of activations per canvas pixel: the most that a ResNet-50's arena took, without cuDNN's workspace."""
BYTES_PER_COPIED_PIXEL = 3


class CudaRuntime:
    """See `model.runtime.session.Runtime`."""

    provider = CUDA
    batch_size = 8

    def __init__(
        self,
        open_session: Callable[[InputShape], ort.InferenceSession],
        device: CudaDevice,
        resize: ResizePolicy,
        *,
        weight_bytes: int,
        bytes_per_pixel: int,
        lanes: int = RUNS_AT_ONCE,
    ) -> None:
        self.lanes, self.tf32 = lanes, device.options.use_tf32
        self._open_session, self._device, self._resize = open_session, device, resize
        self._weight_bytes, self._bytes_per_pixel = weight_bytes, bytes_per_pixel
        self._sessions: dict[InputShape, ShapeSession] = {}  # the device's lock guards it and the next
        self._taken = 0
        self._call: Callable[[], None] = lambda: None

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> "CudaLane | None":
        with self._device.changed:
            return self._take(InputShape(padded_batch(count), *canvas_size))

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        shape = InputShape(padded_batch(len(canvases)), *canvases[0].canvas_size)
        with self._device.changed:
            while (lane := self._take(shape)) is None:
                self._device.changed.wait()
        try:
            return lane.run(canvases)
        finally:
            self._call()

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        self._call = call

    def warm_up(self, max_batch_size: int) -> Iterator[list[NDArray[Any]]]:
        """Run the common canvases, alone and in the batches up to `max_batch_size` that have sessions of their own, as
        many as the budget holds."""
        batches = common_batches(self._resize, max_batch_size)
        without = 0
        for batch in batches:
            if (outputs := self._warm(batch)) is None:
                without += 1
            else:
                yield outputs
        if without:
            logger.warning(
                "%d of the %d common canvases and batch sizes do not fit into the memory budget and will start slowly: "
                "a larger gpu_memory_limit_bytes or a smaller max_batch_size helps",
                without,
                len(batches),
            )

    def has_room(self, count: int, canvas_size: tuple[int, int]) -> bool:
        """Tell whether a batch of `count` canvases has a session, or gets one without closing another."""
        shape = InputShape(padded_batch(count), *canvas_size)
        with self._device.changed:
            return shape in self._open_shapes() or self._device.fits(self._new(shape))

    def shapes(self) -> list[InputShape]:
        """The shapes that have an open session, the least recently used first."""
        with self._device.changed:
            return self._open_shapes()

    def _warm(self, batch: Sequence[CanvasImage]) -> list[NDArray[Any]] | None:
        """Warm up one batch; None: the budget does not hold its session besides the open ones."""
        if not self.has_room(len(batch), batch[0].canvas_size):
            return None
        try:
            return self.run(batch)
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            if is_out_of_memory(error):
                return None
            raise

    def _open_shapes(self) -> list[InputShape]:
        sessions = [each for each in self._sessions.values() if each.state == "open"]
        return [each.shape for each in sorted(sessions, key=lambda each: each.last_used)]

    def _new(self, shape: InputShape) -> ShapeSession:
        pixels = shape.batch * shape.height * shape.width
        fixed_bytes = self._weight_bytes + self.lanes * BYTES_PER_COPIED_PIXEL * pixels
        return ShapeSession(shape, fixed_bytes, self._bytes_per_pixel * pixels)

    def _take(self, shape: InputShape) -> "CudaLane | None":
        """Take a lane of this shape. The caller holds the lock."""
        if self._taken == self.lanes:
            return None
        session = self._sessions.get(shape)
        if session is None or session.state == "closed":
            session = self._sessions[shape] = self._new(shape)
            self._device.open_soon(session, self._open_session, self.lanes, lambda: self._call())
        if session.state in ("asked", "opening"):
            return None
        self._taken += 1
        return CudaLane(self._device, session, self._device.take(session), self._end)

    def _end(self, session: ShapeSession, buffers: Buffers | None) -> None:
        with self._device.changed:
            self._taken -= 1
            if buffers is not None:
                self._device.give_back(session, buffers)
            self._device.changed.notify_all()


class CudaLane:
    """See `model.runtime.session.Lane`."""

    def __init__(
        self, device: CudaDevice, session: ShapeSession, buffers: Buffers | None,
        end: Callable[[ShapeSession, Buffers | None], None],
    ) -> None:  # fmt: skip
        self._device, self._session, self._buffers, self._end = device, session, buffers, end

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        try:
            if self._buffers is None:
                assert self._session.error is not None
                raise self._session.error
            with self._device.copies:
                self._buffers.load(canvases)
            self._device.run(self._buffers)
            with self._device.copies:
                return self._buffers.read(len(canvases))
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            self._device.close_failed(self._session, error, self._buffers)
            raise
        finally:
            self._end(self._session, self._buffers)
            self._buffers = None  # a closed session is dropped here, and not under the lock


def common_batches(resize: ResizePolicy, max_batch_size: int) -> list[list[CanvasImage]]:
    """Make blank batches, small ones first: one for each common canvas and each batch size that gets a session."""
    blanks = [blank_canvas(resize, size) for size in COMMON_SIZES]
    canvases = {canvas.canvas_size: canvas for canvas in blanks}
    batch_sizes = sorted({padded_batch(count) for count in range(1, max_batch_size + 1)})
    return [[canvas] * min(count, max_batch_size) for count in batch_sizes for canvas in canvases.values()]


def cuda_runtime(model: bytes, metadata: ModelMetadata, *, limit_bytes: int | None, lanes: int | None) -> CudaRuntime:
    """Make the runtime of a file on the first GPU, after a first run. Raises ONNX Runtime's own exceptions."""
    device = first_gpu(limit_bytes)

    def open_session(shape: InputShape) -> ort.InferenceSession:
        return open_on_cuda(model, shape, device.limit_bytes, device.options)

    runtime = CudaRuntime(
        open_session,
        device,
        metadata.resize,
        weight_bytes=len(model) * (2 if device.options.prefer_nhwc else 1),  # NHWC keeps both orders: 1.8 by count
        bytes_per_pixel=BYTES_PER_PIXEL[metadata.precision],
        lanes=lanes or RUNS_AT_ONCE,
    )
    runtime.run([blank_canvas(metadata.resize)])
    return runtime
