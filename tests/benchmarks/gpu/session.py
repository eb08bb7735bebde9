"""Bare sessions of ONNX Runtime, without the runtime that serves: there an option or a graph is seen alone."""

import itertools
from collections import Counter
from functools import cache, partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.image import decode_image
from model.runtime.cores import available_cores
from model.runtime.cuda_session import CudaOptions, InputShape, _provider_options, preload_cuda
from model.runtime.session import CPU, CUDA
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import timed
from tests.benchmarks.measuring import photo

GUESS = CudaOptions(prefer_nhwc=True, fuse_conv_bias=True)
MEMORY_LIMIT_BYTES = 70 * 2**30
ELEMENT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


class Bound:
    """A session of fixed sizes whose inputs and outputs stay on the device.

    `shape` fixes the free dimensions of a detector's graph; None: the graph has none. The inputs are photographs, and
    noise where they are no pictures. Opening it takes `open_seconds`, its first run, which plans the convolutions,
    `plan_seconds`.
    """

    def __init__(
        self,
        model: bytes,
        plan: Plan,
        shape: InputShape | None = None,
        cuda: CudaOptions = GUESS,
        *,
        pattern: bool = False,
        shared_arena: bool = False,
    ) -> None:
        """`pattern`: it keeps one block for all its activations, beside the arena of its first run. `shared_arena`: it
        takes its memory from the process's one arena, where `share_arena` has made that."""
        self._memory, self._cuda = plan.device, cuda
        options = _session_options(plan, shape, pattern=pattern, shared_arena=shared_arena)
        self.session, self.open_seconds = timed(partial(self._open, model, options))
        self._binding = self.session.io_binding()
        self._options = self._run_options()
        self._unawaited = self._run_options()
        self._unawaited.add_run_config_entry("disable_synchronize_execution_providers", "1")
        values = {node.name: example(node, shape) for node in self.session.get_inputs()}
        self.inputs = {name: ort.OrtValue.ortvalue_from_numpy(value, self._memory, 0) for name, value in values.items()}
        self.outputs = {
            node.name: ort.OrtValue.ortvalue_from_shape_and_type(node.shape, ELEMENT_TYPES[node.type], self._memory, 0)
            for node in self.session.get_outputs()
        }
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self.plan_seconds = timed(self.run)[1]

    def _open(self, model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        if self._memory == "cpu":
            return ort.InferenceSession(model, options, providers=[CPU])
        preload_cuda()
        on_cuda = CUDA, _provider_options(self._cuda, MEMORY_LIMIT_BYTES)
        session = ort.InferenceSession(model, options, providers=[on_cuda, CPU], enable_fallback=0)
        if session.get_providers()[0] != CUDA:
            raise RuntimeError("the session is not on CUDA")
        return session

    def _run_options(self) -> ort.RunOptions:
        options = ort.RunOptions()
        options.log_severity_level = 4
        if self._cuda.capture_graph:
            options.add_run_config_entry("gpu_graph_id", "1")
        return options

    def run(self) -> None:
        """Returns when the outputs are there."""
        self.session.run_with_iobinding(self._binding, self._options)

    def launch(self) -> float:
        """The seconds until the host has given the device its work; returns when the outputs are there."""
        seconds = timed(partial(self.session.run_with_iobinding, self._binding, self._unawaited))[1]
        self._binding.synchronize_outputs()
        return seconds

    def best_scores(self, count: int = 100) -> NDArray[np.float32]:
        """The best scores of each picture, best first."""
        scores = self.outputs["scores"].numpy()
        return -np.sort(-scores.astype(np.float32), axis=1)[:, :count]

    def nodes(self) -> Counter[str]:
        """The number of nodes that each provider runs."""
        parts = self.session.get_provider_graph_assignment_info()
        return Counter(part.ep_name for part in parts for _ in part.get_nodes())


def _session_options(plan: Plan, shape: InputShape | None, *, pattern: bool, shared_arena: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1 if plan.device == "cuda" else available_cores()
    options.enable_mem_pattern = pattern
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.use_env_allocators", str(int(shared_arena)))
    for name, size in {} if shape is None else shape._asdict().items():
        options.add_free_dimension_override_by_name(name, size)
    return options


def example(node: ort.NodeArg, shape: InputShape | None) -> NDArray[Any]:
    """Make a value for a graph's input: photographs and their sizes, else noise."""
    if shape is not None and node.name == "images":
        return np.stack(photographs(*shape))
    if shape is not None and node.name == "sizes":
        return np.array([[shape.height, shape.width]] * shape.batch, np.int64)
    noise = np.random.default_rng(1).standard_normal(node.shape, np.float32)
    return noise.astype(ELEMENT_TYPES[node.type])


def photographs(count: int, height: int, width: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Make so many RGB pictures, a few of them again and again."""
    return list(itertools.islice(itertools.cycle(_few(height, width, seed)), count))


@cache
def _few(height: int, width: int, seed: int) -> list[NDArray[np.uint8]]:
    return [decode_image(photo(width, height, seed + number)) for number in range(4)]
