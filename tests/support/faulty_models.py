"""The tiny model with something in it: idle work that takes a time, or a fault that white pictures meet.

Its answers to all others stay the same. ONNX Runtime raising on white is in tests.support.tiny_model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from model.metadata import ModelMetadata
from tests.support.tiny_model import SHAPES, SMALL, tiny_graph

SIDE = 512
SCORES, LATER = "present_scores", "later_scores"


def write_slow_model(path: Path, multiplications: int, *, name: str = "slow", seed: int = 0) -> ModelMetadata:
    """Write the file; each multiplication of two 512 × 512 matrices takes a core 3 to 10 ms."""
    metadata = ModelMetadata(name=name, labels=SHAPES, architecture="4x4 colours", resize=SMALL)
    constants = {
        "work_shape": np.array([SIDE, SIDE]),
        "work_weight": np.eye(SIDE, dtype=np.float32),
        "work_naught": np.array(0, np.float32),
    }
    onnx.save(with_nodes(tiny_graph(metadata, seed), idle_work(multiplications), constants), path)
    return metadata


def with_nodes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """Put nodes that make LATER of SCORES between the scores and the output."""
    graph = model.graph
    [pad] = (node for node in graph.node if list(node.output) == ["scores"])
    position = list(graph.node).index(pad)
    for node in reversed(nodes):
        graph.node.insert(position, node)
    pad.input[0] = LATER
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def idle_work(multiplications: int) -> list[onnx.NodeProto]:
    """They start from the scores, or ONNX Runtime would fold them away."""
    nodes = [
        helper.make_node("ReduceMax", [SCORES], ["work_scalar"], keepdims=0),
        helper.make_node("Expand", ["work_scalar", "work_shape"], ["work_0"]),
    ]
    nodes += [
        helper.make_node("MatMul", [f"work_{number}", "work_weight"], [f"work_{number + 1}"])
        for number in range(multiplications)
    ]
    return [*nodes, *adding_nothing(f"work_{multiplications}")]


def write_nan_model(path: Path) -> ModelMetadata:
    """Write a tiny model whose scores for a white picture are NaN, its neighbours' in the batch are not."""
    metadata = ModelMetadata(name="nan", labels=SHAPES, architecture="4x4 colours", resize=SMALL)
    constants = {
        "nearly_white": np.array(0.999, np.float32),
        "but_batch": np.array([1, 2]),
        "last": np.array([2]),
        "full": np.array(1, np.float32),
    }
    onnx.save(with_nodes(tiny_graph(metadata, seed=0), nan_on_white(), constants), path)
    return metadata


def write_hanging_model(path: Path, *, on_white: bool = True) -> ModelMetadata:
    """Write a tiny model that comes back from a white picture, or from any other, after many minutes."""
    metadata = ModelMetadata(name="hanging", labels=SHAPES, architecture="4x4 colours", resize=SMALL)
    constants = {
        "nearly_white": np.array(0.999, np.float32),
        "large_side": np.array([4000 if on_white else 1]),
        "one_side": np.array([1 if on_white else 4000]),
        "work_naught": np.array(0, np.float32),
    }
    onnx.save(with_nodes(tiny_graph(metadata, seed=0), hang_on_white(), constants), path)
    return metadata


def nan_on_white() -> list[onnx.NodeProto]:
    """Scores times 0 / 0 if the picture is white, else times 1 / 1."""
    return [
        helper.make_node("ReduceMin", ["cell_colours", "but_batch"], ["darkest_cells"]),
        helper.make_node("Greater", ["darkest_cells", "nearly_white"], ["are_white"]),
        helper.make_node("Cast", ["are_white"], ["are_white_number"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", ["full", "are_white_number"], ["are_not_white"]),
        helper.make_node("Div", ["are_not_white", "are_not_white"], ["one_or_nan"]),
        helper.make_node("Squeeze", ["one_or_nan", "last"], ["one_or_nan_row"]),
        helper.make_node("Mul", [SCORES, "one_or_nan_row"], [LATER]),
    ]


def hang_on_white(multiplications: int = 500) -> list[onnx.NodeProto]:
    """Multiplications of two 4,000 × 4,000 matrices if the picture is white, else of two single numbers."""
    nodes = [
        helper.make_node("ReduceMin", ["cell_colours"], ["darkest_cell"], keepdims=0),
        helper.make_node("Greater", ["darkest_cell", "nearly_white"], ["all_white"]),
        helper.make_node("Where", ["all_white", "large_side", "one_side"], ["work_side"]),
        helper.make_node("Concat", ["work_side", "work_side"], ["work_shape"], axis=0),
        helper.make_node("Expand", ["darkest_cell", "work_shape"], ["work_0"]),
    ]
    nodes += [
        helper.make_node("MatMul", [f"work_{number}", "work_0"], [f"work_{number + 1}"])
        for number in range(multiplications)
    ]
    return [*nodes, *adding_nothing(f"work_{multiplications}")]


def adding_nothing(work: str) -> list[onnx.NodeProto]:
    """Nodes that add a nought to the scores, for which `work` has to be done."""
    return [
        helper.make_node("ReduceMax", [work], ["work_end"], keepdims=0),
        helper.make_node("Mul", ["work_end", "work_naught"], ["work_nothing"]),
        helper.make_node("Add", [SCORES, "work_nothing"], [LATER]),
    ]
