"""The interface to a device, `Runtime` and `Lane`, and the options of ONNX Runtime's sessions on any device.

A `Lane` is a permit for one batch. `Runtime.free_lane` takes it; its run releases it, also when it fails.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.image import to_canvas
from model.metadata import ResizePolicy
from model.types import CanvasImage

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
RUNS_AT_ONCE = 2
"""Default number of batches on a device at once. CUDA: one runs, one is uploaded. CPU: two share the cores."""
OUT_OF_MEMORY = re.compile(
    "out of memory|failed to allocate|smaller than requested bytes|ALLOC_FAILED|bad_alloc|CUDA failure 2:",
    re.IGNORECASE,
)


class Stopper:
    """Ends, from any thread, the runs of the thread that has entered it, such as a stuck warm-up.

    A run ends before its next node. An opening session cannot be stopped: ONNX Runtime checks no flag while it folds
    constants.
    """

    def __init__(self) -> None:
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4  # as the session's

    def stop(self) -> None:
        self._options.terminate = True

    def __enter__(self) -> None:
        _run_options.value = self._options

    def __exit__(self, *_: object) -> None:
        _run_options.value = None


_run_options = threading.local()


def run_options() -> ort.RunOptions | None:
    """Return the run options by which this thread's runs can be stopped, if it has entered a Stopper."""
    return getattr(_run_options, "value", None)


class DeviceUnavailable(RuntimeError):
    """The wanted device cannot be used: no CUDA build, library, driver or GPU, or a model that CUDA cannot run."""


class Lane(Protocol):
    """A batch's permit to be on the device."""

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """Return the graph's outputs, a row for each canvas, and free the lane; all canvases have one size.

        Raises ONNX Runtime's own exceptions, and frees the lane then too. Call once, on any thread.
        """


class Runtime(Protocol):
    """A model on its device. Thread-safe."""

    provider: str
    """ONNX Runtime's execution provider."""
    tf32: bool
    """True: convolutions of fp32 models run on tensor cores, with 10 bits of mantissa."""
    lanes: int
    """Batches that may be on the device at once."""
    batch_size: int
    """Images of a batch beyond which the device gains nothing, as far as is known."""

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> Lane | None:
        """Take a lane for `count` canvases of this (height, width), without opening or waiting for anything.

        `concurrent`: more batches run or wait. None: no lane is free, or the canvas has no session yet. The session is
        then requested, and `when_lane_freed` calls when it is open. If it cannot be opened, the lane's run raises.
        """

    def run(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """Wait for a lane and run on it, for callers without a lane."""

    def when_lane_freed(self, call: Callable[[], None]) -> None:
        """Have `call` called, on any thread, whenever a lane becomes free by other means than the end of its run."""

    def warm_up(self, max_batch_size: int) -> Iterator[list[NDArray[Any]]]:
        """Run a blank canvas at each step of the iterator, and yield what `run` returns."""


def blank_canvas(resize: ResizePolicy, size: tuple[int, int] = (1200, 1600)) -> CanvasImage:
    """Make the canvas of a black picture of this (height, width)."""
    return to_canvas(np.zeros((*size, 3), np.uint8), resize)


def is_out_of_memory(error: Exception) -> bool:
    """Tell by ONNX Runtime's message, the only information in its exceptions, whether memory did not suffice."""
    return OUT_OF_MEMORY.search(str(error)) is not None


def one_line(error: Exception) -> str:
    """Return ONNX Runtime's message on one line, without its prefix."""
    return " ".join(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).split())


def has_cuda_build() -> bool:
    """Tell whether ONNX Runtime was built for CUDA; only opening a session tells whether CUDA works."""
    return CUDA in ort.get_available_providers()


def operators_on(session: ort.InferenceSession, provider: str) -> frozenset[str]:
    """Return the operators that `provider` runs, in a session opened with session.record_ep_graph_assignment_info."""
    parts = session.get_provider_graph_assignment_info()
    return frozenset(node.op_type for part in parts if part.ep_name == provider for node in part.get_nodes())


def open_session(model: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    """Open a session that stays on its provider. Raises ONNX Runtime's own exceptions."""
    # With `enable_fallback` a run that fails on CUDA would move the session to the CPU for good, and say so to stdout.
    session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    session._model_bytes = None  # kept for the fallback: as much memory as the weights once more
    return session


def session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # a pattern for each shape is memory beside the arena's, and shapes vary
    options.log_severity_level = 4  # an exception carries the same words
    # The model is given as bytes, and weights outside them would be looked for in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    return options
