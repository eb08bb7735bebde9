"""fp32 ONNX -> int8 ONNX for CPUs: QDQ form, activations uint8, weights int8 for each output channel (U8S8).

The ranges of activations come from pictures of the data set at the served size. Only the network is quantised: nodes
before the first convolution and after the last stay fp32. With VNNI (servers' x86 since 2019, AMD's since Zen 4) this
is the fastest form on a CPU. Without VNNI the kernels add two products of 8 bits in 16 bits, where they can saturate: 2
× 255 × 127 does not fit, 2 × 255 × 63 does. `reduce_range` therefore gives weights 7 bits, which is exact on every CPU
and costs some precision on all. Without VNNI the gain in speed is smaller. int8 activations (S8S8) are slower on x86
and not offered.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from model.types import CanvasImage

QUANTISED_OPERATORS = ("Conv", "Relu", "Add", "MaxPool", "Resize")
Fp32Layers = Literal["none", "boxes", "outputs"]
FP32_LAYERS: Mapping[Fp32Layers, tuple[str, ...]] = {
    "none": (), "boxes": ("bbox_reg",), "outputs": ("bbox_reg", "cls_logits")
}  # fmt: skip
"""Layers that may stay fp32, by the names of their weights. The box layer's outputs do not fit 8 bits: in int8 it costs
the demo model 0.08 AP. The class layer takes most of the outputs' time, and costs 0.0015 AP in int8
(docs/benchmarks.md)."""


def quantise(
    model: onnx.ModelProto,
    canvases: Iterable[CanvasImage],
    *,
    fp32_layers: Fp32Layers = "boxes",
    reduce_range: bool = False,
) -> onnx.ModelProto:
    """Quantise the network of a model.

    fp32_layers   the layers that stay in fp32
    reduce_range  give weights 7 bits, for CPUs without VNNI
    """
    nodes = [node for node in network_nodes(model) if node.op_type in QUANTISED_OPERATORS]
    kept = FP32_LAYERS[fp32_layers]
    nodes = [node for node in nodes if not any(layer in name for name in node.input for layer in kept)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quant_pre_process(source, source, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            source,
            target,
            _Canvases(canvases),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED_OPERATORS),
            nodes_to_quantize=[node.name for node in nodes],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return with_shapes_of_what_is_stored(onnx.load(target))


def with_shapes_of_what_is_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let Shape nodes read the 8-bit tensor, not its floats, which ONNX Runtime would compute again for that (at each
    group norm, 2 % of a ResNet-50's time)."""
    stored = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Shape":
            node.input[0] = stored.get(node.input[0], node.input[0])
    return model


def network_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the convolutions and all nodes that they need, in order: the graph without selection and box decoding."""
    producers: Mapping[str, onnx.NodeProto] = {output: node for node in model.graph.node for output in node.output}
    waiting = [node for node in model.graph.node if node.op_type == "Conv"]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [producers[name] for name in node.input if name in producers]
    return [node for node in model.graph.node if node.name in found]


class _Canvases(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, canvases: Iterable[CanvasImage]) -> None:
        self._canvases: Iterator[CanvasImage] = iter(canvases)

    def get_next(self) -> dict[str, Any] | None:
        canvas = next(self._canvases, None)
        if canvas is None:
            return None
        return {"images": canvas.pixels[None], "sizes": np.array([canvas.size])}
