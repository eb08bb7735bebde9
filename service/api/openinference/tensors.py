"""The tensors of the protocol: pictures in, padded detections out."""

from pydantic.config import JsonDict

INPUT: JsonDict = {"name": "image", "datatype": "BYTES", "shape": [-1]}
"""UINT8 [height, width, 3] is read as well; the protocol's metadata has room for one type."""
OUTPUTS: tuple[JsonDict, ...] = (
    {"name": "num_detections", "datatype": "INT32", "shape": [-1]},
    {"name": "boxes", "datatype": "FP32", "shape": [-1, -1, 4]},
    {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
    {"name": "class_ids", "datatype": "INT64", "shape": [-1, -1]},
    {"name": "labels", "datatype": "BYTES", "shape": [-1, -1]},
)
