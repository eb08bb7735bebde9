"""int8 export: what is quantised, in which form, and that the file still detects."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model.types import CanvasImage
from training.checkpoint import Checkpoint
from training.exchange.int8 import Fp32Layers, network_nodes, quantise, with_shapes_of_what_is_stored
from training.exchange.onnx_file import export


def graph() -> onnx.ModelProto:
    """A stem, two output layers under their own names, and an Add after one that belongs to box decoding."""
    rng = np.random.default_rng(0)
    weights = {
        "stem.weight": rng.normal(0, 0.5, (8, 3, 3, 3)),
        "head.cls_logits.weight": rng.normal(0, 0.5, (2, 8, 1, 1)),
        "head.bbox_reg.weight": rng.normal(0, 0.5, (4, 8, 1, 1)),
        "anchor": np.ones(1),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["pixels"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["pixels", "stem.weight"], ["features"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["features"], ["active"], "relu"),
        helper.make_node("Conv", ["active", "head.bbox_reg.weight"], ["deltas"], "boxes"),
        helper.make_node("Conv", ["active", "head.cls_logits.weight"], ["scores"], "classes"),
        helper.make_node("Add", ["deltas", "anchor"], ["boxes"], "decode"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])
    sizes = helper.make_tensor_value_info("sizes", TensorProto.INT64, ["batch", 2])
    boxes, scores = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("boxes", "scores"))
    initialisers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "tiny", [images, sizes], [boxes, scores], initialisers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def canvases() -> list[CanvasImage]:
    rng = np.random.default_rng(1)
    return [CanvasImage(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8), (32, 64), (32, 64)) for _ in range(4)]


def test_the_network_is_what_the_convolutions_need_and_no_more() -> None:
    names = [node.name for node in network_nodes(graph())]
    assert names == ["cast", "transpose", "stem", "relu", "boxes", "classes"]


def test_activations_are_uint8_and_weights_int8_for_each_output_channel() -> None:
    quantised = quantise(graph(), canvases(), fp32_layers="none")
    onnx.checker.check_model(quantised, full_check=True)
    stored = {tensor.name: tensor for tensor in quantised.graph.initializer}
    weights = stored["stem.weight_quantized"]
    assert weights.data_type == TensorProto.INT8
    assert list(stored["stem.weight_scale"].dims) == [8]
    activations = [node for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
    assert activations
    assert {stored[node.input[2]].data_type for node in activations} == {TensorProto.UINT8}


def test_reduced_range_leaves_weights_that_cannot_saturate_without_vnni() -> None:
    quantised = quantise(graph(), canvases(), fp32_layers="none", reduce_range=True)
    weights = [
        numpy_helper.to_array(each) for each in quantised.graph.initializer if each.data_type == TensorProto.INT8
    ]
    largest = max(int(np.abs(each.astype(int)).max()) for each in weights if each.ndim == 4)
    assert largest <= 64
    assert 2 * 255 * largest < 2**15


@pytest.mark.parametrize(
    ("fp32_layers", "quantised"),
    [("none", {"stem", "boxes", "classes"}), ("boxes", {"stem", "classes"}), ("outputs", {"stem"})],
)
def test_box_decoding_stays_fp32_and_so_do_the_layers_asked_for(fp32_layers: Fp32Layers, quantised: set[str]) -> None:
    model = quantise(graph(), canvases(), fp32_layers=fp32_layers)
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert makers["boxes"] == "Add"
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {node.name for node in convolutions if makers.get(node.input[1]) == "DequantizeLinear"} == quantised


def test_a_shape_is_asked_of_the_bytes_and_not_of_floats_made_for_it() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (uint8[n,3] stored, float[] scale, uint8[] zero) => (int64[2] shape, int64[2] other, float[n,3] values) {
            values = DequantizeLinear(stored, scale, zero)
            shape = Shape(values)
            twice = Add(values, values)
            other = Shape(twice)
        }""")
    with_shapes_of_what_is_stored(model)
    assert {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Shape"} == {
        "shape": "stored",
        "other": "twice",
    }


def test_int8_without_pictures_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--calibration"):
        export(Checkpoint(None, (), {}), tmp_path / "a.onnx", name="a", precision="int8")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
