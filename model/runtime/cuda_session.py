"""One session on CUDA, for exactly one input shape, and the memory that it reads and writes.

ONNX Runtime keeps one plan of each convolution, for the last shape it saw, and makes all of them again when the shape
changes: hence a session for each shape. `model.runtime.cuda` says which of them is open and which runs.
"""

import contextlib
import ctypes
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.runtime.session import CPU, CUDA, DeviceUnavailable, open_session, operators_on, session_options
from model.types import CanvasImage

logger = logging.getLogger(__name__)

HEAVY_OPERATORS = frozenset(
    {"Conv", "FusedConv", "ConvInteger", "QLinearConv", "TopK", "Gather", "GatherElements", "GatherND"}
)
"""Operators that must not end up on the CPU when CUDA is asked for. With every shape fixed, no Gather that is left
reads a mere shape, which ONNX Runtime would rightly do on the CPU."""
ELEMENT_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}
"""Types of the outputs that a detector, or a part of one, has."""

Memory = Literal["cpu", "cuda"]
"""ONNX Runtime's names of where inputs and outputs are; the first device of its kind."""


class InputShape(NamedTuple):
    """The names are those of the graph's free dimensions."""

    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class CudaOptions:
    """Options that only a card decides; the defaults by what an H200 did (docs/benchmarks.md)."""

    use_tf32: bool = True
    """fp32 convolutions and products by tensor cores, with 10 bits of mantissa."""
    prefer_nhwc: bool = True
    """Tensor cores want it: 1.2 times as fast."""
    fuse_conv_bias: bool = False
    """With NHWC alone; 1.1 times as fast in batches of 1, 1.3 in batches of 8. But each shape's plan takes 4 s, in
    which nothing else runs, instead of 0.3."""
    capture_graph: bool = False
    """Record a run's kernels once and replay them: 1.1 times as fast in batches of 1, no gain in larger ones. A replay
    writes where its recording did, so these sessions share no arena: in a shared one another session's weights might
    have come to lie there."""
    algorithm_search: Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"] = "HEURISTIC"
    """The choice of cuDNN's plans; ONNX Runtime's own default tries all of them, for each new shape."""


class Buffers:
    """Input and output memory of one session, at addresses that never change, for one batch at a time.

    `load`, `run`, `read`. Only `run` keeps the device busy; the copies of the other two go over a stream of their own
    and have arrived when they return. They hold Python's lock meanwhile, so on CUDA the host's side is page-locked,
    where ONNX Runtime offers that: 0.1 ms a picture rather than 0.4 (2.6 MB over PCIe 4, by its data sheet).
    """

    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, ort.OrtValue]
    """By name, in the graph's order."""

    def __init__(self, session: ort.InferenceSession, shape: InputShape, memory: Memory, number: int = 0) -> None:
        """`number` tells the buffers of one session apart. DeviceUnavailable: the outputs are not of fixed sizes."""
        self._session = session
        self.inputs = {
            "images": ort.OrtValue.ortvalue_from_shape_and_type((*shape, 3), np.uint8, memory),
            "sizes": ort.OrtValue.ortvalue_from_shape_and_type((shape.batch, 2), np.int64, memory),
        }
        kinds = {node.name: (_fixed_sizes(node), ELEMENT_TYPES[node.type]) for node in session.get_outputs()}
        self.outputs = {name: ort.OrtValue.ortvalue_from_shape_and_type(*kind, memory) for name, kind in kinds.items()}
        self._images = host_memory((*shape, 3), np.uint8, memory).numpy()  # on the same memory, which it keeps
        self._images[...] = 0
        # Rows that no picture fills say that all of them is valid: an empty one could divide by zero.
        self._sizes = np.array([[shape.height, shape.width]] * shape.batch, np.int64)
        self._answers = [host_memory(*kind, memory) for kind in kinds.values()] if page_locked(memory) else []
        self._binding = session.io_binding()
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options, self._shrinking = _run_options(memory, number), _run_options(memory, number)
        device = {"cpu": "cpu:0", "cuda": "gpu:0"}[memory]
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", device)

    def load(self, canvases: Sequence[CanvasImage]) -> None:
        """Lay the canvases into the first rows, and bring them to the device."""
        for row, canvas in enumerate(canvases):
            self._images[row] = canvas.pixels
            self._sizes[row] = canvas.size
        self.inputs["images"].update_inplace(self._images)
        self.inputs["sizes"].update_inplace(self._sizes)

    def run(self) -> None:
        """Return when the outputs are there. Raises ONNX Runtime's own exceptions."""
        self._session.run_with_iobinding(self._binding, self._options)

    def shrink_arena(self) -> None:
        """Give back what the arena holds and nothing uses: ONNX Runtime does so after a run, and if that fails too."""
        with contextlib.suppress(Exception):  # ONNX Runtime's exceptions have no base of their own
            self._session.run_with_iobinding(self._binding, self._shrinking)

    def read(self, count: int) -> list[NDArray[Any]]:
        """Return the outputs' first rows: copies, since the memory is used again."""
        outputs = list(self.outputs.values())
        if self._answers:
            ort.copy_tensors(outputs, self._answers)
            outputs = self._answers
        return [output.numpy()[:count].copy() for output in outputs]


def _run_options(memory: Memory, number: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.log_severity_level = 4  # as the session's
    if memory == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(number + 1))  # without capture it means nothing
    return options


def _fixed_sizes(node: ort.NodeArg) -> list[int]:
    if not all(isinstance(size, int) for size in node.shape):
        raise DeviceUnavailable(f"the output {node.name} {node.shape} is not of a fixed size")
    return list(node.shape)


def page_locked(memory: Memory) -> ort.OrtMemoryInfo | None:
    """Find the memory from which copies to the device are fastest, if ONNX Runtime lists a device that offers it."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA] if memory == "cuda" else []
    return devices[0].memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE) if devices else None


def host_memory(shape: Sequence[int], element_type: type[np.generic], memory: Memory) -> ort.OrtValue:
    """Memory of the host that `numpy()` shows, to copy to and from the device: page-locked where that is offered."""
    if (info := page_locked(memory)) is None:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type)
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, memory_info=info)


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
    else:
        if page_locked("cuda") is None:
            logger.info("no page-locked memory: ONNX Runtime finds no GPU in /sys")


def share_arena(limit_bytes: int) -> None:
    """Have all sessions on CUDA take their memory from one arena of at most so many bytes. Call before the first."""
    arena = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    same_as_requested = ort.OrtArenaCfg({"max_mem": limit_bytes, "arena_extend_strategy": 1})
    ort.create_and_register_allocator_v2(CUDA, arena, {"device_id": "0"}, same_as_requested)


def free_bytes() -> int | None:
    """Ask what is free on CUDA's device 0, of CUDA itself: NVML counts devices otherwise, and hidden ones too."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        library = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.split('.')[0]}")
    except OSError:
        return None
    return None if library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) else free.value


def open_on_cuda(
    model: bytes, shape: InputShape, memory_limit_bytes: int, cuda: CudaOptions = CudaOptions(), *, profile: str = ""
) -> ort.InferenceSession:
    """Open a session for exactly this shape. DeviceUnavailable: CUDA cannot be used, or not for these operators.

    `memory_limit_bytes` bounds an arena of its own, where none is shared. `profile`: where ONNX Runtime writes its
    times, a prefix.
    """
    options = fixed_shape_options(shape, threads=1)
    options.add_session_config_entry("session.use_env_allocators", str(int(not cuda.capture_graph)))
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
        "cudnn_conv_algo_search": cuda.algorithm_search,
        "gpu_mem_limit": str(memory_limit_bytes),
        "use_tf32": str(int(cuda.use_tf32)),
        "prefer_nhwc": str(int(cuda.prefer_nhwc)),
        "fuse_conv_bias": str(int(cuda.fuse_conv_bias)),
        "enable_cuda_graph": str(int(cuda.capture_graph)),
    }
