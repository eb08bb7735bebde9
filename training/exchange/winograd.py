"""A graph's 3x3 convolutions as Winograd's F(4x4, 3x3), in ordinary ONNX operators: for CPUs, on which ONNX Runtime has
no kernel of it.

ModelProto --to_winograd--> ModelProto that answers the same to float noise, for any batch and canvas

A tile of 4 x 4 outputs needs 6 x 6 inputs. In the transformed domain it is 36 products instead of 144 a channel pair,
and all tiles of a map share 36 matrix products. What is left is memory's: one gather of the inputs, and one product
with a 36 x 36 or 16 x 36 matrix for each transform. So a layer gains where it has many channels, for the products, and
many tiles, for the weights that each product reads: they are 4 times as many. A map between two layers, with nothing
but a ReLU on the way, stays as the first layer leaves it: the second one's gather knows that order.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", §4.3.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from training.exchange.winograd_functions import DOMAIN, functions

MIN_CHANNELS = 256
"""In and out. On 2 cores with AVX-512 a layer was 1.87 times as fast with 256, 1.4 with 128, no faster with 64."""
MIN_TILES = 20
"""On the model's own canvas: P7 has less. With 60 a ResNet-50 detector took 7 % longer."""
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
OF_INPUTS = np.kron(INPUT_TRANSFORM, INPUT_TRANSFORM)
OF_OUTPUTS = np.pad(np.kron(OUTPUT_TRANSFORM, OUTPUT_TRANSFORM), [(0, 1), (0, 0)])
"""Both directions at once; a last output of zeros is what the next layer reads beyond the map's edges."""
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
    return _inlined(model)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the calls of our functions by what they do."""
    version = next(each.version for each in model.opset_import if not each.domain)
    model.functions.extend(functions(version))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model = onnx.inliner.inline_local_functions(model)
    kept = [each for each in model.opset_import if each.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
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
    if any(name and name not in weights for name in node.input[2:]):
        return False  # the bias is laid out for the tiles here, so it has to be known
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


@dataclass(frozen=True)
class _Pixels:
    """The names of a map's rows of pixels, of the map's sizes, and of the rows that windows and the map itself take."""

    rows: str
    shape: str
    windows: str
    everywhere: str = ""
    """Known behind a convolution."""


class _Rewriting:
    """The nodes of the new graph, in order, and its new constants."""

    def __init__(self) -> None:
        self.constants: dict[str, NDArray[np.generic]] = {
            "winograd.inputs": OF_INPUTS.astype(np.float32),
            "winograd.outputs": OF_OUTPUTS.astype(np.float32),
        }
        self._nodes: list[onnx.NodeProto] = []
        self._pixels: dict[str, _Pixels] = {}
        """Maps as rows of pixels, by the names of the maps."""

    def other(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Relu" and node.input[0] in self._pixels:
            pixels = self._pixels[node.input[0]]
            self._as_map(replace(pixels, rows=self._node("Relu", pixels.rows)), node.output[0])
        else:
            self._nodes.append(node)

    def convolution(self, node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> None:
        name = f"{node.input[1]}.winograd"
        if name not in self.constants:
            self.constants[name] = transformed(numpy_helper.to_array(weights[node.input[1]]))
        pixels = self._as_pixels(node.input[0])
        rows = self._node("convolution", pixels.rows, pixels.windows, name, "winograd.inputs", "winograd.outputs")
        if len(node.input) > 2 and node.input[2]:
            bias = numpy_helper.to_array(weights[node.input[2]])
            name = f"{node.input[2]}.winograd"
            self.constants[name] = np.pad(np.tile(bias, (16, 1, 1)), [(0, 1), (0, 0), (0, 0)])
            rows = self._node("biased", rows, name)
        self._as_map(self._in_tiles(pixels, rows), node.output[0])

    def nodes_used(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Return those on which the graph's outputs depend."""
        needed, used = {each.name for each in graph.output}, []
        for node in reversed(self._nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                used.append(node)
        return used[::-1]

    def _as_pixels(self, name: str) -> "_Pixels":
        if name not in self._pixels:
            shape = self._node("Shape", name)
            windows = self._node("windows_of_map", shape)
            self._pixels[name] = _Pixels(self._node("pixels_of_map", name), shape, windows)
        return self._pixels[name]

    def _in_tiles(self, before: "_Pixels", rows: str) -> "_Pixels":
        if before.everywhere:
            return replace(before, rows=rows)
        windows, everywhere = (self._node(f"{part}_of_tiles", before.shape) for part in ("windows", "everywhere"))
        return _Pixels(rows, before.shape, windows, everywhere)

    def _as_map(self, pixels: "_Pixels", name: str) -> None:
        """Call the rows by the map's name, and make the map for others who read it."""
        self._pixels[name] = pixels
        self._nodes.append(helper.make_node("map_of_tiles", [pixels.rows, pixels.everywhere], [name], domain=DOMAIN))

    def _node(self, op_type: str, *inputs: str) -> str:
        output = f"winograd.{len(self._nodes)}.{op_type}"
        domain = "" if op_type in ("Relu", "Shape") else DOMAIN
        self._nodes.append(helper.make_node(op_type, inputs, [output], name=output, domain=domain))
        return output


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
