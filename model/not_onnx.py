"""Error messages for files that ONNX Runtime does not load, which say what to do; its own are nearly always the
same."""

import re

from model.formats.signatures import name_of

_PLACE = re.compile(r"/\S+\.(cc|h|cpp):\d+ [^)]*\) ")
"""Source file, line and C++ signature at the beginning of some messages."""


def what_is_wrong(model: bytes, message: str) -> str:
    """Return the rest of a sentence that begins with the file's name. `message` is ONNX Runtime's, on one line."""
    if not model:
        return "is empty"
    if name := name_of(model):
        hint = "; `python -m training export` makes one of a checkpoint" if "PyTorch" in name else ""
        return f"is no ONNX file but {name}{hint}"
    message = _PLACE.sub("", message)
    if "external data" in message.lower() or "external tensors" in message.lower():
        return "keeps weights in another file (external data): export it as one file"
    if "is not a registered function/op" in message or "No opset import for domain" in message:
        return f"has operators that ONNX Runtime does not know: {message}"
    if "protobuf parsing failed" in message:
        return "is no ONNX file, or a damaged one: it cannot be parsed"
    return f"cannot be loaded by ONNX Runtime: {message}"
