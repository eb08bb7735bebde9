"""How ONNX Runtime is asked to compute: sessions on the CPU and on CUDA, and which of them runs a batch.

On the CPU one session takes any shape. On CUDA a session keeps one plan of each convolution, for the last shape it saw,
and makes all of them again when the shape changes; so each shape gets a session of its own, and a batch is padded to
the next power of two to keep the shapes few.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.types import CanvasImage

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
HEAVY_OPERATORS = frozenset({"Conv", "FusedConv", "ConvInteger", "QLinearConv", "TopK"})
"""What must not end up on the CPU when CUDA is asked for."""
BYTES_PER_PIXEL = 1024
"""Activations and workspace of one canvas pixel: an estimate on the safe side for a ResNet-50 in fp32, not measured."""


class DeviceUnavailable(RuntimeError):
    """The device asked for cannot be used: no CUDA build, library, driver or GPU, or a model that CUDA cannot run."""


class InputShape(NamedTuple):
    """The names are those of the graph's free dimensions."""

    batch: int
    height: int
    width: int


class Session(Protocol):
    """What is used of ort.InferenceSession."""

    def run(self, output_names: None, input_feed: dict[str, Any]) -> list[NDArray[Any]]: ...


class AnyShape:
    """One session for every shape. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """The graph's outputs for the canvases, all of one size, as a batch."""
        images = np.stack([canvas.pixels for canvas in canvases])
        sizes = np.array([canvas.size for canvas in canvases], np.int64)
        return self._session.run(None, {"images": images, "sizes": sizes})


class FixedShapes:
    """A session for each input shape, opened when first needed; the least recently used are closed to keep the
    estimated memory within `limit_bytes`. Thread-safe, one batch at a time."""

    def __init__(self, open_session: Callable[[InputShape], Session], *, weight_bytes: int, limit_bytes: int) -> None:
        self._open_session = open_session
        self._weight_bytes = weight_bytes
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._slots: dict[InputShape, _Slot] = {}  # least recently used first

    def __call__(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """The graph's outputs for the canvases, all of one size, as a batch."""
        shape = InputShape(_next_power_of_two(len(canvases)), *canvases[0].canvas_size)
        with self._lock:
            try:
                outputs = self._slot(shape).run(canvases)
            except Exception:
                self._slots.clear()  # memory may be what was short, and plans are cheap to make again
                raise
        return [output[: len(canvases)] for output in outputs]

    def shapes(self) -> list[InputShape]:
        """Those with an open session, the least recently used first."""
        return list(self._slots)

    def _slot(self, shape: InputShape) -> "_Slot":
        slot = self._slots.pop(shape, None)
        if slot is None:
            self._make_room(self._bytes(shape))
            slot = _Slot(self._open_session(shape), shape)
        self._slots[shape] = slot
        return slot

    def _make_room(self, needed: int) -> None:
        while self._slots and sum(map(self._bytes, self._slots)) + needed > self._limit_bytes:
            del self._slots[next(iter(self._slots))]

    def _bytes(self, shape: InputShape) -> int:
        return self._weight_bytes + BYTES_PER_PIXEL * shape.batch * shape.height * shape.width


class _Slot:
    """A session and the input memory that its batches are laid into, again and again."""

    def __init__(self, session: Session, shape: InputShape) -> None:
        self._session = session
        self._images = np.zeros((*shape, 3), np.uint8)
        # Rows that no picture fills say that all of them is valid: an empty one could divide by zero.
        self._sizes = np.array([[shape.height, shape.width]] * shape.batch, np.int64)

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        for row, canvas in enumerate(canvases):
            self._images[row] = canvas.pixels
            self._sizes[row] = canvas.size
        return self._session.run(None, {"images": self._images, "sizes": self._sizes})


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def open_on_cpu(model: bytes, threads: int | None = None) -> ort.InferenceSession:
    """Raises ONNX Runtime's own exceptions."""
    options = _options(threads or available_cores())
    options.enable_mem_pattern = False  # patterns are kept for each shape, and shapes vary
    return _open(model, options, [CPU])


def preload_cuda() -> None:
    """Load CUDA and cuDNN from the wheels installed beside ours, once, before the first session on CUDA."""
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses; stdout belongs to results
        ort.preload_dlls()


def open_on_cuda(model: bytes, shape: InputShape, memory_limit_bytes: int) -> ort.InferenceSession:
    """A session for exactly this shape. DeviceUnavailable: CUDA cannot be used, or not for this model's operators."""
    options = _options(threads=1)
    for name, size in shape._asdict().items():
        options.add_free_dimension_override_by_name(name, size)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    cuda = {
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it takes, and never gives back
        "cudnn_conv_algo_search": "HEURISTIC",  # the default tries all of them, for each new shape
        "gpu_mem_limit": str(memory_limit_bytes),
    }
    session = _open(model, options, [(CUDA, cuda), CPU])
    if session.get_providers()[0] != CUDA:
        raise DeviceUnavailable("ONNX Runtime's own message on stderr says what is missing")
    if misplaced := HEAVY_OPERATORS & operators_on(session, CPU):
        raise DeviceUnavailable(f"CUDA cannot run this model's {', '.join(sorted(misplaced))}")
    return session


def operators_on(session: ort.InferenceSession, provider: str) -> frozenset[str]:
    """The kinds of node that `provider` runs, in a session opened with session.record_ep_graph_assignment_info."""
    parts = session.get_provider_graph_assignment_info()
    return frozenset(node.op_type for part in parts if part.ep_name == provider for node in part.get_nodes())


def has_cuda_build() -> bool:
    """ONNX Runtime was built for CUDA; whether CUDA works here, only opening a session tells."""
    return CUDA in ort.get_available_providers()


def _open(model: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    # With `enable_fallback` a run that fails on CUDA would move the session to the CPU for good, and say so to stdout.
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # an exception carries the same words
    # The model is given as bytes, and weights outside them would be looked for in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    return options


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, and its container's quota rounded down (throttling costs more than an
    idle core); at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cgroup_quota(cgroup: Path) -> float | None:
    """Cores, or None where there is no limit. Version 2 keeps both numbers in one file, version 1 in two."""
    unified, legacy = cgroup / "cpu.max", cgroup / "cpu"
    if unified.exists():
        quota, period = unified.read_text().split()
    elif (legacy / "cpu.cfs_quota_us").exists():
        quota, period = ((legacy / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
