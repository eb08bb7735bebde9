"""A graph's 3x3 convolutions as Winograd's F(4x4, 3x3), in ordinary ONNX operators: for CPUs, on which ONNX Runtime has
no kernel of it.

ModelProto --to_winograd--> ModelProto that answers the same to float noise, for any batch and canvas

A tile of 4 x 4 outputs needs 6 x 6 inputs. In the transformed domain it is 36 products instead of 144 a channel pair,
and all tiles of a map share 36 matrix products. A transform is two products with a 6 x 6 or 4 x 6 matrix. So a layer
gains where it has many channels, for the products, and many tiles, for the weights that each product reads: they are 4
times as many. Layers between which nothing but a ReLU lies stay in channels-last order.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", §4.3.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MIN_CHANNELS = 256
"""In and out. On 2 cores with AVX-512 a layer was 1.87 times as fast with 256, 1.4 with 128, no faster with 64."""
MIN_TILES = 60
"""On the model's own canvas: P6 and P7 have less."""
TILE = 4
INPUT_TRANSFORM = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
)  # fmt: skip
WEIGHT_TRANSFORM = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # fmt: skip
OUTPUT_TRANSFORM = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
TO_CHANNELS_LAST, TO_CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
ONE_3X3 = {"kernel_shape": [3, 3], "strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "group": 1}
"""The attributes of the convolutions that are rewritten."""


def to_winograd(
    model: onnx.ModelProto,
    canvas: tuple[int, int],
    *,
    min_channels: int = MIN_CHANNELS,
    min_tiles: int = MIN_TILES,
) -> onnx.ModelProto:
    """A copy whose 3x3 convolutions of at least so many channels, in and out, are rewritten where a map has so many
    tiles on `canvas` (height, width). The model has no norms left that a convolution could hold."""
    model = copy.deepcopy(model)
    weights = {each.name: each for each in model.graph.initializer}
    strides = strides_of(model.graph)
    rewriting = _Rewriting()
    for node in model.graph.node:
        if node.op_type == "Conv" and _gains(node, weights, min_channels):
            tiles = math.prod(-(-side // (strides[node.input[0]] * TILE)) for side in canvas)
            if tiles >= min_tiles:
                rewriting.convolution(node, weights)
                continue
        rewriting.other(node)
    used = rewriting.nodes_used(model.graph)
    del model.graph.node[:]
    model.graph.node.extend(used)
    _replace_initializers(model.graph, rewriting.constants)
    return model


def strides_of(graph: onnx.GraphProto) -> Mapping[str, int]:
    """Input pixels a cell of each map, in each direction; 1 for what is no map.

    An upsampled map is as fine as what it is added to, so that a sum has its finest summand's.
    """
    strides = {each.name: 1 for each in graph.input}
    for node in graph.node:
        of_inputs = [strides[name] for name in node.input if strides.get(name)]
        stride = max(_attributes(node).get("strides", [1])) if node.op_type in ("Conv", "MaxPool") else 1
        coarse = node.op_type == "Resize"
        strides |= {name: 0 if coarse else stride * min(of_inputs, default=0) for name in node.output}
    return {name: stride or 1 for name, stride in strides.items()}


def _gains(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], min_channels: int) -> bool:
    attributes, weight = _attributes(node), weights.get(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT or list(weight.dims[2:]) != [3, 3]:
        return False
    if any(attributes.get(name, value) != value for name, value in ONE_3X3.items()) or "pads" not in attributes:
        return False
    is_explicit = attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    return is_explicit and bool(min(weight.dims[:2]) >= min_channels)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def transformed(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[K, C, 3, 3] -> [36, C, K], in float64 until the end."""
    num_out, num_in = weight.shape[:2]
    wide: NDArray[np.float64] = np.einsum(
        "ia,kcab,jb->ijck", WEIGHT_TRANSFORM, weight.astype(np.float64), WEIGHT_TRANSFORM
    )
    return wide.reshape(36, num_in, num_out).astype(np.float32)


class _Rewriting:
    """The nodes of the new graph, in order, and its new constants."""

    def __init__(self) -> None:
        self.constants: dict[str, NDArray[np.generic]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._channels_last: dict[str, str] = {}
        """The twin of a map, for the maps that have one."""

    def other(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Relu" and node.input[0] in self._channels_last:
            self._both_orders(self._node("Relu", [self._channels_last[node.input[0]]], node.output[0]), node.output[0])
        else:
            self._nodes.append(node)

    def convolution(self, node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> None:
        weight = node.input[1]
        num_out, num_in = weights[weight].dims[:2]
        if (name := f"{weight}.winograd") not in self.constants:
            self.constants[name] = transformed(numpy_helper.to_array(weights[weight]))
        image, prefix = self._in_channels_last(node.input[0]), node.output[0]
        size = self._node("Shape", [image], prefix, start=1, end=3)
        tiles, grid = self._tiles(image, size, prefix)
        products = self._node(
            "MatMul", [self._transform(tiles, INPUT_TRANSFORM, (36, -1, num_in), prefix), name], prefix
        )
        outputs = self._transform(products, OUTPUT_TRANSFORM, (), prefix)
        answer = self._joined(outputs, grid, size, num_out, prefix)
        if len(node.input) > 2 and node.input[2]:
            answer = self._node("Add", [answer, node.input[2]], prefix)
        self._both_orders(answer, node.output[0])

    def nodes_used(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Return those on which the graph's outputs depend."""
        needed, used = {each.name for each in graph.output}, []
        for node in reversed(self._nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                used.append(node)
        return used[::-1]

    def _in_channels_last(self, image: str) -> str:
        if image not in self._channels_last:
            self._channels_last[image] = self._node("Transpose", [image], image, perm=TO_CHANNELS_LAST)
        return self._channels_last[image]

    def _both_orders(self, channels_last: str, name: str) -> None:
        self._channels_last[name] = channels_last
        self._nodes.append(helper.make_node("Transpose", [channels_last], [name], perm=TO_CHANNELS_FIRST))

    def _tiles(self, image: str, size: str, prefix: str) -> tuple[str, str]:
        """[N, H, W, C] -> [36 N, rows, columns, C], the 6 x 6 inputs of each tile; and the values N, rows, columns."""
        missing = self._node("Mod", [self._node("Neg", [size], prefix), self._constant([TILE])], prefix)
        after = self._node("Add", [missing, self._constant([1])], prefix)
        pads = self._node("Concat", [self._constant([1, 1]), after], prefix, axis=0)
        padded = self._node("Pad", [image, pads, "", self._constant([1, 2])], prefix)
        ends = (-5, -4, -3, -2, -1, np.iinfo(np.int64).max)
        planes = [
            self._node("Slice", [padded, *map(self._constant, ([row, column], end, [1, 2], [TILE, TILE]))], prefix)
            for row, column in np.ndindex(6, 6)
            for end in [[ends[row], ends[column]]]
        ]
        return self._node("Concat", planes, prefix, axis=0), self._node("Shape", planes[:1], prefix, start=0, end=3)

    def _transform(self, values: str, matrix: NDArray[np.int64], shape: Sequence[int], prefix: str) -> str:
        """Multiply the first axis of 36 by `matrix` along its rows and along its columns."""
        factor = self._constant(matrix.astype(np.float32))
        by_row = self._node("MatMul", [factor, self._reshaped(values, (6, -1), prefix)], prefix)
        both = self._node("MatMul", [factor, self._reshaped(by_row, (len(matrix), 6, -1), prefix)], prefix)
        return self._reshaped(both, shape, prefix) if shape else both

    def _joined(self, outputs: str, grid: str, size: str, num_out: int, prefix: str) -> str:
        """[4, 4, N rows columns K] -> [N, H, W, K]"""
        channels = self._constant([num_out])
        by_tile = self._node("Concat", [self._constant([TILE, TILE]), grid, channels], prefix, axis=0)
        outputs = self._node("Reshape", [outputs, by_tile], prefix)
        outputs = self._node("Transpose", [outputs], prefix, perm=(2, 3, 0, 4, 1, 5))
        sides = self._node("Mul", [grid, self._constant([1, TILE, TILE])], prefix)
        whole = self._node("Concat", [sides, channels], prefix, axis=0)
        outputs = self._node("Reshape", [outputs, whole], prefix)
        return self._node("Slice", [outputs, self._constant([0, 0]), size, self._constant([1, 2])], prefix)

    def _reshaped(self, values: str, shape: Sequence[int], prefix: str) -> str:
        return self._node("Reshape", [values, self._constant(list(shape))], prefix)

    def _node(self, op_type: str, inputs: Sequence[str], prefix: str, **attributes: Any) -> str:
        output = f"{prefix}.winograd{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, values: Sequence[int] | NDArray[np.float32]) -> str:
        array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
        name = f"winograd.{array.dtype}.{'x'.join(map(str, array.shape))}.{array.ravel().tolist()}"
        self.constants[name] = array
        return name


def _replace_initializers(graph: onnx.GraphProto, new: Mapping[str, NDArray[np.generic]]) -> None:
    """Add the new ones, and drop those that nothing uses any more."""
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in new.items())
    used = {name for node in graph.node for name in node.input}
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    known = set(_names(graph))
    infos = [each for each in graph.value_info if each.name in known]
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.output
