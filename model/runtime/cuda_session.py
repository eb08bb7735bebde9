"""One session on CUDA, for exactly one input shape, and the memory that it reads and writes.

ONNX Runtime keeps one plan of each convolution, for the last shape, and makes all plans again when the shape changes.
Therefore each shape has a session. `model.runtime.cuda` decides which of them are open and which one runs.
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
"""Operators that must not run on the CPU when CUDA is wanted. With every shape fixed, no remaining Gather reads a
shape, which ONNX Runtime would rightly do on the CPU."""
ELEMENT_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}
"""Output types of a detector, or of a part of one."""

Memory = Literal["cpu", "cuda"]
"""ONNX Runtime's names of the memory of inputs and outputs; the first device of its kind."""


class InputShape(NamedTuple):
    """Sizes of the graph's free dimensions, by their names."""

    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class CudaOptions:
    """Options whose best values depend on the card; the defaults are an H200's (docs/benchmarks.md)."""

    use_tf32: bool = True
    """Compute fp32 convolutions and products by tensor cores, with 10 bits of mantissa."""
    prefer_nhwc: bool = True
    """Use the NHWC layout, which tensor cores want: 1.2 times as fast."""
    fuse_conv_bias: bool = False
    """Fuse convolution and bias, with NHWC only: 1.1 times as fast in batches of 1, 1.3 in batches of 8. But each
    shape's plan takes 4 s instead of 0.3, and nothing else runs meanwhile."""
    capture_graph: bool = False
    """Record a run's kernels once and replay them: 1.1 times as fast in batches of 1, no gain in larger ones. A replay
    writes to the addresses of its recording, so these sessions share no arena, in which another session's weights might
    be there."""
    algorithm_search: Literal["HEURISTIC", "EXHAUSTIVE"] = "HEURISTIC"
    """Search for cuDNN's plans; ONNX Runtime's own default tries all of them, for each new shape."""


class Buffers:
    """Input and output memory of one session, at addresses that never change, for one batch at a time.

    Use `load`, `run` and `read`, in this order. Only `run` keeps the device busy. The copies of `load` and `read` use a
    stream of their own and are complete on return. They hold the GIL meanwhile, so on CUDA the host's memory is
    page-locked if ONNX Runtime offers that: 0.1 ms a picture instead of 0.4 (2.6 MB over PCIe 4, by its data sheet).
    """

    inputs: dict[str, ort.OrtValue]
    outputs: dict[str, ort.OrtValue]
    """Output memory by name, in the graph's order."""

    def __init__(self, session: ort.InferenceSession, shape: InputShape, memory: Memory, number: int = 0) -> None:
        """Allocate the memory. `number` tells a session's buffers apart. DeviceUnavailable: an output's size varies."""
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
        """Copy the canvases into the first rows, and to the device."""
        for row, canvas in enumerate(canvases):
            self._images[row] = canvas.pixels
            self._sizes[row] = canvas.size
        self.inputs["images"].update_inplace(self._images)
        self.inputs["sizes"].update_inplace(self._sizes)

    def run(self) -> None:
        """Run, and return when the outputs are complete. Raises ONNX Runtime's own exceptions."""
        self._session.run_with_iobinding(self._binding, self._options)

    def shrink_arena(self) -> None:
        """Free the arena's unused memory: ONNX Runtime does so after a run, even one that fails."""
        with contextlib.suppress(Exception):  # ONNX Runtime's exceptions have no base of their own
            self._session.run_with_iobinding(self._binding, self._shrinking)

    def read(self, count: int) -> list[NDArray[Any]]:
        """Return copies of the outputs' first rows; the memory is used again."""
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
    """Find page-locked memory, from which copies to the device are fastest, if ONNX Runtime lists a device with it."""
    devices = [device for device in ort.get_ep_devices() if device.ep_name == CUDA] if memory == "cuda" else []
    return devices[0].memory_info(ort.OrtDeviceMemoryType.HOST_ACCESSIBLE) if devices else None


def host_memory(shape: Sequence[int], element_type: type[np.generic], memory: Memory) -> ort.OrtValue:
    """Allocate memory of the host for copies to and from the device, readable by `numpy()`: page-locked if offered."""
    if (info := page_locked(memory)) is None:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type)
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, memory_info=info)


def padded_batch(count: int) -> int:
    """Return the next power of two."""
    return 1 << (count - 1).bit_length()


@functools.cache
def preload_cuda() -> None:
    """Load CUDA and cuDNN from the wheels installed beside ours, once, before the first session on CUDA.

    ONNX Runtime offers page-locked memory only for the devices of registered libraries, and its own CUDA library is not
    registered by default. A failure is only logged, because copies are merely slower without it.
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
    """Return the free bytes of CUDA's device 0, as CUDA reports them: NVML numbers devices in another way."""
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

    `memory_limit_bytes` bounds the session's own arena, if none is shared. `profile` is the prefix of the files to
    which ONNX Runtime writes its times.
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
    """Make options of a session of this shape alone, which records the provider of each node."""
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
