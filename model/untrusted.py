"""Checks of an .onnx file before anything interprets it: its hash, and that no node holds a graph.

A model is a program. With loops and branches (Loop, If, Scan, SequenceMap: nodes with a graph as an attribute) it may
never end. A detector has none, so a file with one is refused. The protobuf is read as far as these checks need:
https://protobuf.dev/programming-guides/encoding/, field numbers from onnx/onnx.proto.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from model.metadata import InvalidModel
from model.not_onnx import what_is_wrong

GRAPH, FUNCTIONS = 7, 25
"""Field numbers of ModelProto."""
GRAPH_NODE, FUNCTION_NODE = 1, 7
NODE_OPERATOR, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_GRAPHS = (6, 11)
"""Field numbers of AttributeProto's g and graphs."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""
MAX_VARINT_BYTES = 10
ORT_FORMAT = b"ORTM"
"""Mark of a file in ONNX Runtime's own format, which is not protobuf."""


class _Malformed(Exception):
    """The bytes are not protobuf."""


def read_model(path: Path, sha256: str | None = None) -> tuple[bytes, str]:
    """Return the file's bytes and their SHA-256. InvalidModel: it cannot be read, is another file, has control flow."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
    found = hashlib.sha256(model).hexdigest()
    if sha256 is not None and found != sha256:
        raise InvalidModel(f"{path} has sha256 {found}; {sha256} is asked for")
    try:
        operator = next(_with_graphs(memoryview(model)), None)
    except _Malformed as error:
        raise InvalidModel(f"{path} {what_is_wrong(model, 'protobuf parsing failed')}") from error
    if operator is not None:
        raise InvalidModel(f"{path} has control flow ({operator!r}), which could run for ever: a detector has none")
    return model, found


def _with_graphs(model: memoryview) -> Iterator[str]:
    """Yield the operators of the nodes that hold a graph."""
    if model[4:8] == ORT_FORMAT:
        raise _Malformed
    for field, value in _fields(model):
        if field in (GRAPH, FUNCTIONS):
            wanted = GRAPH_NODE if field == GRAPH else FUNCTION_NODE
            for inner, node in _fields(value):
                if inner == wanted and _has_graph(node):
                    yield _operator(node)


def _has_graph(node: memoryview) -> bool:
    attributes = (value for field, value in _fields(node) if field == NODE_ATTRIBUTE)
    return any(field in ATTRIBUTE_GRAPHS for attribute in attributes for field, _ in _fields(attribute))


def _operator(node: memoryview) -> str:
    return next(
        (bytes(value).decode("utf-8", "replace") for field, value in _fields(node) if field == NODE_OPERATOR), ""
    )


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (field number, value) of each field; the value of a number is empty."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire_type, start = tag & 7, position
        if wire_type == VARINT:
            _, position = _varint(message, position)
            start = position
        elif wire_type == BYTES:
            length, start = _varint(message, position)
            position = start + length
        elif wire_type in (FIXED64, FIXED32):
            start = position = position + (8 if wire_type == FIXED64 else 4)
        else:
            raise _Malformed
        if position > len(message):
            raise _Malformed
        yield (tag & 0xFFFFFFFF) >> 3, message[start:position]  # 32 bits, as protobuf reads tags


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number that begins there, and the position of its end."""
    value = 0
    for number, byte in enumerate(message[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, position + number + 1
    raise _Malformed
