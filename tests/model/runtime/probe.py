"""A graph that shows what a session was given, and can be made to fail."""

import numpy as np
import onnx
import onnxruntime as ort

from model.runtime.cuda_session import InputShape, fixed_shape_options
from model.types import CanvasImage

PROBE = """
<ir_version: 10, opset_import: ["" : 18]>
probe (uint8[batch,height,width,3] images, int64[batch,2] sizes) => (float[batch] values, int64[batch,2] valid) {
    corner = Slice(images, from_one, to_one, axes)
    flat = Reshape(corner, row)
    values = Cast<to=1>(flat)
    black = Cast<to=7>(flat)
    is_fault = Equal(black, fault)
    out_of_range = Cast<to=7>(is_fault)
    zero_each = Gather(zero, out_of_range)
    zero_rows = Unsqueeze(zero_each, one)
    valid = Add(sizes, zero_rows)
}
"""
"""Answers with each row's first pixel and valid size; raises if a first pixel is 255."""


def probe() -> bytes:
    model = onnx.parser.parse_model(PROBE)
    values = {"from_one": [0, 0, 0], "to_one": [1, 1, 1], "axes": [1, 2, 3], "row": [-1], "fault": [255], "zero": [0]}
    for name, value in (values | {"one": [1]}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def loose_probe() -> bytes:
    """A graph whose output is of any size."""
    return onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        loose (uint8[batch,height,width,3] images, int64[batch,2] sizes) => (int64[2,some] places) {
            places = NonZero(sizes)
        }
        """
    ).SerializeToString()


def open_fixed(model: bytes, shape: InputShape) -> ort.InferenceSession:
    """As open_on_cuda does, on the CPU."""
    session = ort.InferenceSession(model, fixed_shape_options(shape, threads=1), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [*shape, 3]
    return session


def canvas(value: int, height: int = 64, width: int = 64, valid: tuple[int, int] = (50, 60)) -> CanvasImage:
    return CanvasImage(np.full((height, width, 3), value, np.uint8), valid, valid)
