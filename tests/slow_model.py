"""The tiny model with idle work in it: inference takes as long as a test wants, the answers stay the same."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from model.metadata import ModelMetadata
from tests.tiny_model import SHAPES, SMALL, tiny_graph

SIDE = 512


def write_slow_model(path: Path, multiplications: int, *, name: str = "slow", seed: int = 0) -> ModelMetadata:
    """Write the file; each multiplication of two 512 × 512 matrices takes a core 3 to 10 ms."""
    metadata = ModelMetadata(name=name, labels=SHAPES, architecture="4x4 colours", resize=SMALL)
    model = tiny_graph(metadata, seed)
    graph = model.graph
    [pad] = (node for node in graph.node if list(node.output) == ["scores"])
    position = list(graph.node).index(pad)
    for node in reversed(idle_work("present_scores", "worked_scores", multiplications)):
        graph.node.insert(position, node)
    pad.input[0] = "worked_scores"
    for key, value in {
        "work_shape": np.array([SIDE, SIDE]),
        "work_weight": np.eye(SIDE, dtype=np.float32),
        "work_naught": np.float32(0),
    }.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return metadata


def idle_work(value: str, result: str, multiplications: int) -> list[onnx.NodeProto]:
    """Nodes after which `result` equals `value`. They start from it, or ONNX Runtime would fold them away."""
    nodes = [
        helper.make_node("ReduceMax", [value], ["work_scalar"], keepdims=0),
        helper.make_node("Expand", ["work_scalar", "work_shape"], ["work_0"]),
    ]
    nodes += [
        helper.make_node("MatMul", [f"work_{number}", "work_weight"], [f"work_{number + 1}"])
        for number in range(multiplications)
    ]
    return [
        *nodes,
        helper.make_node("ReduceMax", [f"work_{multiplications}"], ["work_end"], keepdims=0),
        helper.make_node("Mul", ["work_end", "work_naught"], ["work_nothing"]),
        helper.make_node("Add", [value, "work_nothing"], [result]),
    ]
