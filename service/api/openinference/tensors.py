"""The protocol's tensors, and their values for detections.

For n pictures with at most m detections each, the shapes are [n] and [n, m], for boxes [n, m, 4]; pictures with fewer
detections are padded. Values are those of `/detect`: boxes xyxy in pixels of the upright picture, best score first.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import to_json

from service.api.schemas import detection_list, timing_ms
from service.core.job import Detected, Job

INPUT: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [-1]}
"""The input. UINT8 [height, width, 3] is read as well, but the protocol's metadata holds one type."""
HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Output:
    datatype: str
    inner_shape: list[int]
    """Shape for each picture; -1 is the number of its detections."""
    padding: list[Any]
    """Padding value for each detection that a picture has fewer."""


OUTPUTS: Mapping[str, Output] = {
    "num_detections": Output("INT32", [], []),
    "boxes": Output("FP32", [-1, 4], [0, 0, 0, 0]),
    "scores": Output("FP32", [-1], [0]),
    "class_ids": Output("INT64", [-1], [-1]),
    "labels": Output("BYTES", [-1], [""]),
}
NUMBERS = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4"}


@dataclass(frozen=True)
class TensorReply:
    """One picture's part of the answer."""

    detected: Detected
    timing: dict[str, float]
    """Milliseconds by stage, and their total."""
    data: Mapping[str, bytes]
    """Values of each wanted output, binary or JSON without brackets; not padded."""


def as_tensors(detected: Detected, job: Job, *, outputs: Mapping[str, bool]) -> TensorReply:
    """Make the values of the wanted outputs. `outputs`: their names, and whether each is to be binary."""
    found = detection_list(detected)
    values: Mapping[str, list[Any]] = {
        "num_detections": [len(found)],
        "boxes": [side for each in found for side in each["box"].values()],
        "scores": [each["score"] for each in found],
        "class_ids": [each["class_id"] for each in found],
        "labels": [each["label"] for each in found],
    }
    data = {name: _encoded(values[name], OUTPUTS[name].datatype, binary) for name, binary in outputs.items()}
    return TensorReply(detected, timing_ms(detected), data)


def answer_of(
    replies: Sequence[TensorReply], outputs: Mapping[str, bool], members: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """Make the body of an answer, and the length of its JSON; None: it is JSON alone. `members`: other members."""
    num_detections = max(len(reply.detected.detections) for reply in replies)
    tensors, behind = [], []
    for name, binary in outputs.items():
        output, data = OUTPUTS[name], _padded(replies, name, num_detections, binary)
        inner = [num_detections if size < 0 else size for size in output.inner_shape]
        head = to_json({"name": name, "datatype": output.datatype, "shape": [len(replies), *inner]})[:-1]
        if binary:
            behind.append(data)
            tensors.append(head + b',"parameters":{"binary_data_size":%d}}' % len(data))
        else:
            tensors.append(head + b',"data":[' + data + b"]}")
    body = to_json(members)[:-1] + b',"outputs":[' + b",".join(tensors) + b"]}"
    return (body + b"".join(behind), len(body)) if behind else (body, None)


def _padded(replies: Sequence[TensorReply], name: str, num_detections: int, binary: bool) -> bytes:
    """Join the values of all pictures, padded."""
    output = OUTPUTS[name]
    padding = _encoded(output.padding, output.datatype, binary) if output.padding else b""
    parts: list[bytes] = []
    for reply in replies:
        parts += [reply.data[name], *[padding] * (num_detections - len(reply.detected.detections))]
    return b"".join(parts) if binary else b",".join(filter(None, parts))


def _encoded(values: list[Any], datatype: str, binary: bool) -> bytes:
    if not binary:
        return to_json(values)[1:-1]
    if datatype != "BYTES":
        return np.array(values, NUMBERS[datatype]).tobytes()
    texts = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
