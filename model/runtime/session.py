"""ONNX Runtime's sessions: how each is opened, whatever computes."""

import os
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


class DeviceUnavailable(RuntimeError):
    """The device asked for cannot be used: no CUDA build, library, driver or GPU, or a model that CUDA cannot run."""


class Session(Protocol):
    """What AnyShape uses of ort.InferenceSession."""

    def run(self, output_names: None, input_feed: dict[str, Any]) -> list[NDArray[Any]]: ...


def operators_on(session: ort.InferenceSession, provider: str) -> frozenset[str]:
    """The kinds of node that `provider` runs, in a session opened with session.record_ep_graph_assignment_info."""
    parts = session.get_provider_graph_assignment_info()
    return frozenset(node.op_type for part in parts if part.ep_name == provider for node in part.get_nodes())


def has_cuda_build() -> bool:
    """ONNX Runtime was built for CUDA; whether CUDA works here, only opening a session tells."""
    return CUDA in ort.get_available_providers()


def open_session(model: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    # With `enable_fallback` a run that fails on CUDA would move the session to the CPU for good, and say so to stdout.
    session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    session._model_bytes = None  # kept for the fallback: as much memory as the weights once more
    return session


def session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # an exception carries the same words
    # The model is given as bytes, and weights outside them would be looked for in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    return options
