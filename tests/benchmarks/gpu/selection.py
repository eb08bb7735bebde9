"""The section `selection`: what comes after the network, the ways to compute it, and the copies around a run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from model.runtime.cuda_session import CudaOptions, InputShape, host_memory, page_locked
from tests.benchmarks.gpu.options import best_options
from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report, median_seconds, milliseconds
from tests.benchmarks.gpu.session import Bound

PER_CELL, NUM_CLASSES, TOP_K = 9, 80, 1000
Graph = tuple[list[onnx.NodeProto], list[Any], list[Any]]
"""Nodes; inputs and outputs as (name, type, shape)."""


def selection(plan: Plan, report: Report) -> None:
    best = best_options(report)
    stages(plan, report, best)
    report.table("batch", "way", "ms")
    for batch in plan.batches[:2]:
        for way, graph in ways(batch, cells(plan)).items():
            report.attempt([batch, way], partial(_way, plan, graph, best))
    copies(plan, report, best)


def stages(plan: Plan, report: Report, best: CudaOptions) -> None:
    """By graphs cut off earlier and earlier: profilers tell when a kernel was launched, not how long it took."""
    report.table("batch", "stage", "ms", "share of the run")
    whole = onnx.load(plan.model_file(plan.precision))
    parts = [cut(whole, network_outputs(whole)), cut(whole, top_k_outputs(whole)), whole]
    for batch in plan.batches[:2]:
        shape = InputShape(batch, *plan.canvases[0])
        sessions = [Bound(part.SerializeToString(), plan, shape, best) for part in parts]
        network, selected, run = median_seconds(plan.seconds, *(session.run for session in sessions))
        names = ("network", "top-k, with the maxima before and the gathers between", "decode, sigmoid, labels")
        for name, seconds in zip(names, (network, selected - network, run - selected), strict=True):
            report.add(batch, name, milliseconds(seconds), f"{seconds / run:.1%}")


def network_outputs(model: Any) -> list[str]:
    """The outputs of the ten output layers: what the convolutions make and no convolution reads."""
    from training.exchange.int8 import network_nodes

    nodes = network_nodes(model)
    read = {name for node in nodes for name in node.input}
    return [name for node in nodes for name in node.output if name not in read]


def top_k_outputs(model: Any) -> list[str]:
    return [name for node in model.graph.node if node.op_type == "TopK" for name in node.output]


def cut(model: Any, outputs: Sequence[str]) -> Any:
    """The part of the graph that makes these."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    wanted, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(reversed(kept))
    part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return part


def cells(plan: Plan) -> int:
    """The cells of P3."""
    height, width = plan.canvases[0]
    return (height // 8) * (width // 8)


def ways(batch: int, cells: int) -> dict[str, Graph]:
    """Maxima over the classes of P3, and top-k of rows as P3 and the five second stages have them."""
    half, anchors = TensorProto.FLOAT16, PER_CELL * cells
    logits = [("x", half, [batch, PER_CELL, NUM_CLASSES, cells])]
    maxima = [("y", half, [batch, PER_CELL, cells])]
    found: dict[str, Graph] = {
        "maxima of P3: ReduceMax": ([_reduce("x", "y", "axis2")], logits, maxima),
        "maxima of P3: MaxPool": (
            [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[NUM_CLASSES, 1], strides=[NUM_CLASSES, 1])],
            logits,
            [("y", half, [batch, PER_CELL, 1, cells])],
        ),
        "maxima of P3: Transpose, then ReduceMax of the last axis": (
            [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), _reduce("t", "y", "axis_last")],
            logits,
            maxima,
        ),
        "maxima of P3: Max of halves, then ReduceMax of 5": ([*_halves(), _reduce("m5", "y", "axis2")], logits, maxima),
        "logits of P3 to fp32 alone": (
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
            logits,
            [("y", TensorProto.FLOAT, logits[0][2])],
        ),
    }
    for rows, width in ((1, anchors), (4, anchors // 4), (1, TOP_K * NUM_CLASSES), (5, TOP_K * NUM_CLASSES)):
        keep = min(TOP_K, width)
        found[f"top {keep} of {rows} × {width}"] = (
            [helper.make_node("Constant", [], ["k"], value=_integers(keep)),
             helper.make_node("TopK", ["x", "k"], ["y", "i"])],
            [("x", half, [batch, rows, width])],
            [("y", half, [batch, rows, keep]), ("i", TensorProto.INT64, [batch, rows, keep])],
        )  # fmt: skip
    return found


def _reduce(source: str, target: str, axis: str) -> onnx.NodeProto:
    return helper.make_node("ReduceMax", [source, axis], [target], keepdims=0)


def _halves() -> list[onnx.NodeProto]:
    """80 classes to 40, 20, 10, 5."""
    nodes, left, name = [], NUM_CLASSES, "x"
    while left % 2 == 0:
        left //= 2
        nodes.append(helper.make_node("Split", [name], [f"a{left}", f"b{left}"], axis=2, num_outputs=2))
        name = f"m{left}"
        nodes.append(helper.make_node("Max", [f"a{left}", f"b{left}"], [name]))
    return nodes


def _integers(*values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64))


def _way(plan: Plan, graph: Graph, best: CudaOptions) -> list[float]:
    nodes, inputs, outputs = graph
    used = {name for node in nodes for name in node.input}
    axes = [
        helper.make_node("Constant", [], [name], value=_integers(value))
        for name, value in {"axis2": 2, "axis_last": -1}.items()
        if name in used
    ]
    given, made = ([helper.make_tensor_value_info(*each) for each in values] for values in (inputs, outputs))
    model = helper.make_model(
        helper.make_graph([*axes, *nodes], "way", given, made),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return [milliseconds(median_seconds(plan.seconds / 2, Bound(model.SerializeToString(), plan, None, best).run)[0])]


def copies(plan: Plan, report: Report, best: CudaOptions) -> None:
    report.table("batch", "copy", "ms", "MB")
    for batch in plan.batches[:2]:
        session = Bound(plan.model_bytes(), plan, InputShape(batch, *plan.canvases[0]), best)
        for name, (copy, size) in _copies(plan, session).items():
            report.attempt([batch, name], partial(_copied, plan, copy, size))
    report.note(f"page-locked memory is {'' if page_locked(plan.device) else 'not '}offered by ONNX Runtime")


def _copies(plan: Plan, session: Bound) -> dict[str, tuple[Callable[[], object], int]]:
    target, answers = session.inputs["images"], list(session.outputs.values())
    ordinary = target.numpy().copy()
    served = host_memory(ordinary.shape, np.uint8, plan.device).numpy()
    read = [each.numpy() for each in answers]
    size = sum(each.nbytes for each in read)
    found: dict[str, tuple[Callable[[], object], int]] = {
        "upload from ordinary memory": (partial(target.update_inplace, ordinary), ordinary.nbytes),
        "upload from memory as served": (partial(target.update_inplace, served), ordinary.nbytes),
        "lay into memory as served": (partial(np.copyto, served, ordinary), ordinary.nbytes),
        "read the answers to ordinary memory": (lambda: [each.numpy() for each in answers], size),
    }
    if page_locked(plan.device):
        hosts = [host_memory(each.shape, each.dtype.type, plan.device) for each in read]
        found["read the answers to memory as served"] = (partial(ort.copy_tensors, answers, hosts), size)
    return found


def _copied(plan: Plan, copy: Callable[[], object], size: int) -> list[float]:
    return [milliseconds(median_seconds(plan.seconds / 2, copy)[0]), round(size / 1e6, 2)]
