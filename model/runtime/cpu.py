"""Sessions on the CPU: one takes any shape. Of its threads one is the caller's own, so that callers side by side are
threads more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.runtime.cores import available_cores
from model.runtime.session import CPU, Session, open_session, session_options
from model.types import CanvasImage

SHORT_SPIN_MICROSECONDS = "200"


class AnyShape:
    """One session for every shape. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, canvases: Sequence[CanvasImage]) -> list[NDArray[Any]]:
        """The graph's outputs for the canvases, all of one size, as a batch."""
        pixels = [canvas.pixels for canvas in canvases]
        images = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)  # a single canvas is not copied
        sizes = np.array([canvas.size for canvas in canvases], np.int64)
        return self._session.run(None, {"images": images, "sizes": sizes})


def open_on_cpu(model: bytes, threads: int | None = None, *, short_runs: bool = False) -> ort.InferenceSession:
    """Raises ONNX Runtime's own exceptions.

    ONNX Runtime's threads stay awake for tens of milliseconds after a run, so that the next one finds its cores ready.
    With `short_runs` they soon sleep: beside runs of a few milliseconds they would hold cores that decoding and
    answering want.
    """
    options = session_options(threads or available_cores())
    if short_runs:
        options.add_session_config_entry("session.intra_op.spin_duration_us", SHORT_SPIN_MICROSECONDS)
    options.enable_mem_pattern = False  # patterns are kept for each shape, and shapes vary
    return open_session(model, options, [CPU])
