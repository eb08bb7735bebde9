"""Sessions on CUDA, and which of them runs a batch.

A session keeps one plan of each convolution, for the last shape it saw, and makes all of them again when the shape
changes; so each shape gets a session of its own, and a batch is padded to the next power of two to keep the shapes few.

Each such session reads and writes memory of fixed addresses (`Lane`), and has two sets of it: while one thread's batch
runs, another thread's is laid in and uploaded. Nothing but the two calls of `FixedShapes` has to be made on two
threads for that; on one thread they follow each other.
"""

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.metadata import Precision
from model.runtime.session import CPU, CUDA, DeviceUnavailable, open_session, operators_on, session_options
from model.types import CanvasImage

logger = logging.getLogger(__name__)
HEAVY_OPERATORS = frozenset(
    {"Conv", "FusedConv", "ConvInteger", "QLinearConv", "TopK", "Gather", "GatherElements", "GatherND"}
)
"""What must not end up on the CPU when CUDA is asked for. With every shape fixed, no Gather that is left reads a mere
shape, which ONNX Runtime would rightly do on the CPU."""
BYTES_PER_PIXEL: Mapping[Precision, int] = {"fp32": 1024, "fp16": 512, "int8": 1024}
"""Activations and workspace of one canvas pixel: an estimate on the safe side for a ResNet-50, not measured."""
LANES = 2
"""One runs, one is filled."""
ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
"""Of the outputs that a detector, or a part of one, has."""

Memory = Literal["cpu", "cuda"]
"""ONNX Runtime's names of where a Lane's inputs and outputs are; the first device of its kind."""


class InputShape(NamedTuple):
    """The names are those of the graph's free dimensions."""

    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class CudaOptions:
    """What tests/benchmarks/gpu.py varies. The defaults are ONNX Runtime's own, until a measurement says otherwise."""

    use_tf32: bool = True
    """fp32 convolutions and products by tensor cores, with 10 bits of mantissa."""
    prefer_nhwc: bool = False
    fuse_conv_bias: bool = False
    capture_graph: bool = False
    """Record a run's kernels once and replay them: see CUDA graphs. Each Lane's runs are recorded apart."""


class FixedShapes:
    """A session for each input shape, opened when first needed; the least recently used are closed to keep the
    estimated memory within `limit_bytes`. Thread-safe: one batch at a time runs, and one more is uploaded meanwhile.
    """

    def __init__(
        self,
        open_session: Callable[[InputShape], ort.InferenceSession],
        *,
        memory: Memory,
        weight_bytes: int,
        limit_bytes: int,
        bytes_per_pixel: int = BYTES_PER_PIXEL["fp32"],
    ) -> None:
        self._open_session = open_session
        self._memory: Memory = memory
        self._weight_bytes = weight_bytes
        self._limit_bytes = limit_bytes
        self._bytes_per_pixel = bytes_per_pixel
        self._device = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._slots: dict[InputShape, _Slot] = {}  # least recently used first

    def __call__(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """The graph's outputs for the canvases, all of one size, as a batch."""
        shape = InputShape(padded_batch(len(canvases)), *canvases[0].canvas_size)
        try:
            with self._lane(shape) as lane:
                lane.load(canvases)
                with self._device:
                    lane.run()
                return lane.read(len(canvases))
        except Exception:
            with self._changed:
                self._slots.clear()  # memory may be what was short, and plans are cheap to make again
            raise

    def shapes(self) -> list[InputShape]:
        """Those with an open session, the least recently used first."""
        with self._changed:
            return list(self._slots)

    def has_room(self, count: int, height: int, width: int) -> bool:
        """A batch of `count` canvases has its session, or gets one without closing another's."""
        shape = InputShape(padded_batch(count), height, width)
        with self._changed:
            return shape in self._slots or self._bytes(shape) <= self._bytes_left()

    @contextlib.contextmanager
    def _lane(self, shape: InputShape) -> Iterator["Lane"]:
        """A lane of this shape's session, the caller's alone meanwhile."""
        with self._changed:
            while (slot := self._slot(shape)) is None or (lane := slot.take()) is None:
                self._changed.wait()
        try:
            yield lane
        finally:
            with self._changed:
                slot.give_back(lane)
                self._changed.notify_all()

    def _slot(self, shape: InputShape) -> "_Slot | None":
        """None: memory that it needs is in use, so wait for a change."""
        slot = self._slots.pop(shape, None)
        if slot is None:
            if not self._make_room(self._bytes(shape)):
                return None
            slot = _Slot(self._open_session(shape), shape, self._memory)
        self._slots[shape] = slot
        return slot

    def _make_room(self, needed: int) -> bool:
        """Close idle sessions until there is room, or none is left open. False: those that are left are in use."""
        for shape, slot in list(self._slots.items()):
            if needed <= self._bytes_left():
                break
            if slot.is_idle:
                del self._slots[shape]
        return needed <= self._bytes_left() or not self._slots

    def _bytes_left(self) -> int:
        return self._limit_bytes - sum(map(self._bytes, self._slots))

    def _bytes(self, shape: InputShape) -> int:
        return self._weight_bytes + self._bytes_per_pixel * shape.batch * shape.height * shape.width


class _Slot:
    """A session and its lanes."""

    def __init__(self, session: ort.InferenceSession, shape: InputShape, memory: Memory) -> None:
        self._idle = [Lane(session, shape, memory, number) for number in range(LANES)]

    @property
    def is_idle(self) -> bool:
        return len(self._idle) == LANES

    def take(self) -> "Lane | None":
        return self._idle.pop() if self._idle else None

    def give_back(self, lane: "Lane") -> None:
        self._idle.append(lane)


class Lane:
    """Input and output memory of one session, at addresses that never change, for one batch at a time.

    `load`, `run`, `read`. Only `run` keeps the device busy; the copies of the other two go over a stream of their own
    and have arrived when they return, so another lane's run goes on beside them. They hold Python's lock, though: on
    CUDA the pictures come from page-locked memory, where ONNX Runtime offers it, and take 0.1 ms each rather than 0.4
    (2.6 MB over PCIe 4, by its data sheet; not measured).
    """

    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, ort.OrtValue]
    """By name, in the graph's order."""

    def __init__(self, session: ort.InferenceSession, shape: InputShape, memory: Memory, number: int = 0) -> None:
        """`number` tells the lanes of one session apart. DeviceUnavailable: the outputs are not of fixed sizes."""
        self._session = session
        self._images = host_memory((*shape, 3), memory)
        # Rows that no picture fills say that all of them is valid: an empty one could divide by zero.
        self._sizes = np.array([[shape.height, shape.width]] * shape.batch, np.int64)
        self.inputs = {
            "images": ort.OrtValue.ortvalue_from_shape_and_type((*shape, 3), np.uint8, memory),
            "sizes": ort.OrtValue.ortvalue_from_shape_and_type((shape.batch, 2), np.int64, memory),
        }
        self.outputs = {
            node.name: ort.OrtValue.ortvalue_from_shape_and_type(_fixed_sizes(node), ELEMENT_TYPES[node.type], memory)
            for node in session.get_outputs()
        }
        self._binding = session.io_binding()
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4  # as the session's
        if memory == "cuda":
            self._options.add_run_config_entry("gpu_graph_id", str(number + 1))  # without capture it means nothing

    def load(self, canvases: Sequence[CanvasImage]) -> None:
        """Lay the canvases into the first rows, and bring them to the device."""
        for row, canvas in enumerate(canvases):
            self._images[row] = canvas.pixels
            self._sizes[row] = canvas.size
        self.inputs["images"].update_inplace(self._images)
        self.inputs["sizes"].update_inplace(self._sizes)

    def run(self) -> None:
        """Returns when the outputs are there. Raises ONNX Runtime's own exceptions."""
        self._session.run_with_iobinding(self._binding, self._options)

    def read(self, count: int) -> list[NDArray[Any]]:
        """The outputs' first rows: copies, since the memory is used again."""
        return [output.numpy()[:count].copy() for output in self.outputs.values()]


def _fixed_sizes(node: ort.NodeArg) -> list[int]:
    if not all(isinstance(size, int) for size in node.shape):
        raise DeviceUnavailable(f"the output {node.name} {node.shape} is not of a fixed size")
    return list(node.shape)


def host_memory(shape: Sequence[int], memory: Memory) -> NDArray[np.uint8]:
    """Zeros to fill and to copy from; for "cuda" page-locked, where ONNX Runtime lists a device that offers it."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA] if memory == "cuda" else []
    page_locked = devices[0].memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE) if devices else None
    if page_locked is None:
        return np.zeros(shape, np.uint8)
    value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, memory_info=page_locked)
    array: NDArray[np.uint8] = value.numpy()  # on the same memory, which it keeps
    array[...] = 0
    return array


def padded_batch(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@functools.cache
def preload_cuda() -> None:
    """Load CUDA and cuDNN from the wheels installed beside ours, once, before the first session on CUDA.

    ONNX Runtime offers page-locked memory for the devices of registered libraries only; its own CUDA library is not
    registered by itself. Without it copies are slower, no more, so that this fails is for the log.
    """
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses; stdout belongs to results
        ort.preload_dlls()
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ort.register_execution_provider_library(CUDA, str(library))
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        logger.info("no page-locked memory: %s", error)


def open_on_cuda(
    model: bytes, shape: InputShape, memory_limit_bytes: int, cuda: CudaOptions = CudaOptions(), *, profile: str = ""
) -> ort.InferenceSession:
    """A session for exactly this shape. DeviceUnavailable: CUDA cannot be used, or not for this model's operators.

    `profile`: where ONNX Runtime writes its times, a prefix.
    """
    options = fixed_shape_options(shape, threads=1)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    session = open_session(model, options, [(CUDA, _provider_options(cuda, memory_limit_bytes)), CPU])
    if session.get_providers()[0] != CUDA:
        raise DeviceUnavailable("ONNX Runtime's own message on stderr says what is missing")
    if misplaced := HEAVY_OPERATORS & operators_on(session, CPU):
        raise DeviceUnavailable(f"CUDA cannot run this model's {', '.join(sorted(misplaced))}")
    return session


def fixed_shape_options(shape: InputShape, threads: int) -> ort.SessionOptions:
    """For a session of this shape alone, which can be asked what runs where."""
    options = session_options(threads)
    for name, size in shape._asdict().items():
        options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _provider_options(cuda: CudaOptions, memory_limit_bytes: int) -> dict[str, str]:
    return {
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it takes, and never gives back
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all of them, for each new shape
        "gpu_mem_limit": str(memory_limit_bytes),
        "use_tf32": str(int(cuda.use_tf32)),
        "prefer_nhwc": str(int(cuda.prefer_nhwc)),
        "fuse_conv_bias": str(int(cuda.fuse_conv_bias)),
        "enable_cuda_graph": str(int(cuda.capture_graph)),
    }
