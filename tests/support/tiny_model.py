"""A small, fast .onnx file that keeps the detector's contract, for tests that need no trained network.

Its answers are a function of the picture: the valid part is divided into 4 × 4 cells, and each cell's mean colour makes
the cell's box, score and label (weights drawn from `seed`). Each box has a slightly smaller twin of the same label with
0.9 times its score, so that NMS has something to drop. The remaining candidates are absent (score -1).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from model.metadata import Label, ModelMetadata, Precision, ResizePolicy

SHAPES = (Label(1, "circle"), Label(2, "square"), Label(4, "triangle"))
SMALL = ResizePolicy(shorter_side=64, longest_side=106, divisor=32)
GRID = 4
CANDIDATES = 5000

GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
tiny (uint8[batch,height,width,3] images, int64[batch,2] sizes)
  => (float[batch,5000,4] boxes, float[batch,5000] scores, int64[batch,5000] labels) {
    planes = Transpose<perm=[0,3,1,2]>(images)
    colours = Cast<to=1>(planes)
    heights, widths = Split<axis=1, num_outputs=2>(sizes)
    shape = Shape(images)
    canvas_height = Gather(shape, one)
    canvas_width = Gather(shape, two)

    row = Range(zero, canvas_height, one)
    row_times_grid = Mul(row, grid)
    row_cell = Div(row_times_grid, heights)
    row_cells = Unsqueeze(row_cell, minus_one)
    row_is_in = Equal(row_cells, cell_index)
    row_share = Cast<to=1>(row_is_in)
    row_sum = ReduceSum(row_share, ones)
    row_count = Max(row_sum, unit)
    row_mean = Div(row_share, row_count)
    row_weights_t = Unsqueeze(row_mean, ones)
    row_weights = Transpose<perm=[0,1,3,2]>(row_weights_t)

    column = Range(zero, canvas_width, one)
    column_times_grid = Mul(column, grid)
    column_cell = Div(column_times_grid, widths)
    column_cells = Unsqueeze(column_cell, minus_one)
    column_is_in = Equal(column_cells, cell_index)
    column_share = Cast<to=1>(column_is_in)
    column_sum = ReduceSum(column_share, ones)
    column_count = Max(column_sum, unit)
    column_mean = Div(column_share, column_count)
    column_weights = Unsqueeze(column_mean, ones)

    row_means = MatMul(row_weights, colours)
    cell_means = MatMul(row_means, column_weights)
    cell_means_flat = Reshape(cell_means, cells_shape)
    cell_colours_255 = Transpose<perm=[0,2,1]>(cell_means_flat)
    cell_colours = Div(cell_colours_255, white)

    weighted = MatMul(cell_colours, weight)
    logits = Add(weighted, bias)
    probabilities = Sigmoid(logits)
    cell_scores = ReduceMax<keepdims=0>(probabilities, minus_one)
    best = ArgMax<axis=-1, keepdims=0>(probabilities)
    cell_labels = Gather(label_ids, best)

    green = Gather<axis=2>(cell_colours, ones)
    shrink_by = Mul(green, half)
    shrink = Sub(unit, shrink_by)
    extent = Mul(half_extent, shrink)
    twin_extent = Mul(extent, twin)
    unit_boxes = Add(centre, extent)
    unit_twins = Add(centre, twin_extent)
    all_unit_boxes = Concat<axis=1>(unit_boxes, unit_twins)
    corner = Concat<axis=1>(widths, heights, widths, heights)
    corner_f = Cast<to=1>(corner)
    scale = Unsqueeze(corner_f, ones)
    all_boxes = Mul(all_unit_boxes, scale)

    twin_scores = Mul(cell_scores, twin_score)
    all_scores = Concat<axis=1>(cell_scores, twin_scores)
    all_labels = Concat<axis=1>(cell_labels, cell_labels)
    boxes = Pad(all_boxes, absent_boxes)
    present_scores = Identity(all_scores)
    scores = Pad(present_scores, absent, minus_unit)
    labels = Pad(all_labels, absent)
}
"""

NAN_ON_BLACK = """
    brightness = ReduceSum(cell_colours, one_two)
    unity = Div(brightness, brightness)
    unity_row = Squeeze(unity, two_1d)
    present_scores = Mul(all_scores, unity_row)
"""

FAIL_ON_WHITE = """
    darkest_each = ReduceMin<keepdims=0>(cell_colours, one_two)
    darkest = ReduceMax<keepdims=0>(darkest_each)
    is_white = Greater(darkest, nearly_one)
    out_of_range = Cast<to=7>(is_white)
    factor = Gather(single, out_of_range)
    present_scores = Mul(all_scores, factor)
"""


def write_tiny_model(
    path: Path,
    *,
    name: str = "tiny",
    labels: Sequence[Label] = SHAPES,
    resize: ResizePolicy = SMALL,
    seed: int = 0,
    precision: Precision = "fp32",
    nan_on_black: bool = False,
    fail_on_white: bool = False,
) -> ModelMetadata:
    """Write the file; another `seed` or other `labels` give other answers.

    Two faults can be built in: NaN in answer to a black picture; ONNX Runtime raises if a white one is in the batch.
    """
    metadata = ModelMetadata(
        name=name, labels=tuple(labels), architecture="4x4 colours", precision=precision, resize=resize
    )
    onnx.save(tiny_graph(metadata, seed, nan_on_black, fail_on_white), path)
    return metadata


def tiny_graph(
    metadata: ModelMetadata, seed: int, nan_on_black: bool = False, fail_on_white: bool = False
) -> onnx.ModelProto:
    text, identity = GRAPH, "    present_scores = Identity(all_scores)\n"
    if nan_on_black:
        text = text.replace(identity, NAN_ON_BLACK)
    if fail_on_white:
        text = text.replace(identity, FAIL_ON_WHITE)
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for key, value in constants([label.class_id for label in metadata.labels], seed).items():
        if key in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    onnx.helper.set_model_props(model, metadata.to_props())
    onnx.checker.check_model(model, full_check=True)
    return model


def constants(label_ids: Sequence[int], seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    edges = np.arange(GRID, dtype=np.float32) / GRID
    ymin, xmin = (corner.ravel() for corner in np.meshgrid(edges, edges, indexing="ij"))
    centre = np.stack([xmin, ymin, xmin, ymin], axis=1)[None] + np.float32(0.5 / GRID)
    absent = CANDIDATES - 2 * GRID * GRID
    return {
        "zero": 0, "one": 1, "two": 2, "grid": GRID,
        "ones": [1], "minus_one": [-1], "two_1d": [2], "one_two": [1, 2],
        "cell_index": np.arange(GRID).reshape(1, 1, GRID),
        "cells_shape": [0, 3, GRID * GRID],
        "unit": np.float32(1), "minus_unit": np.float32(-1), "half": np.float32(0.5), "white": np.float32(255),
        "weight": rng.normal(0, 5, (3, len(label_ids))).astype(np.float32),
        "bias": rng.normal(-1, 1, len(label_ids)).astype(np.float32),
        "label_ids": np.array(label_ids, np.int64),
        "centre": centre,
        "half_extent": np.array([-1, -1, 1, 1], np.float32) * np.float32(0.5 / GRID),
        "twin": np.float32(0.9), "twin_score": np.float32(0.9),
        "absent_boxes": [0, 0, 0, 0, absent, 0], "absent": [0, 0, 0, absent],
        "nearly_one": np.float32(0.999), "single": np.ones(1, np.float32),
    }  # fmt: skip
