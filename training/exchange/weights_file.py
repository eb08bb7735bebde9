"""Reading of common files of weights into a state dict on the network's own names.

The file may be a state dict, a checkpoint with a state dict in it (torchvision's reference training, Lightning and
others), or safetensors. Names may begin with `module.`, `model.` or more (DataParallel, Lightning, torch.compile).
Nothing in a file is executed: a file with more than tensors and plain values is refused, with the line of Python that
makes it readable.
"""

import argparse
import json
import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENTRIES = ("model", "state_dict", "model_state_dict", "net", "network", "weights", "model_ema", "ema")
"""Names of a state dict in a training checkpoint; the first that exists is used."""
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""Longest header, by the safetensors format's own limit."""


class InvalidWeights(ValueError):
    """The weights do not fit the architecture, or the labels do not fit the weights."""


def read_state(file: Path, known: str) -> dict[str, Tensor]:
    """Read the state dict. `known` is a name in it; a prefix before it is removed from all names.

    InvalidWeights: the file cannot be read, or holds no state dict.
    """
    try:
        content = _safetensors(file) if file.suffix == ".safetensors" else _torch(file)
    except OSError as error:
        raise InvalidWeights(f"{file} cannot be read: {error}") from error
    return without_prefix(_state_in(content, file), known)


def without_prefix(state: Mapping[str, Tensor], known: str) -> dict[str, Tensor]:
    """Keep the entries that have the prefix of `known`, without it."""
    prefix = next((name.removesuffix(known) for name in state if name.endswith(known)), "")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _state_in(content: Any, file: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and str(content.get("format", "")).startswith("retinaserve"):
        raise InvalidWeights(f"{file} is a checkpoint of ours already: evaluate, export and --init take it as it is")
    found = [content, *(content[name] for name in ENTRIES if name in content)] if isinstance(content, Mapping) else []
    for state in found:
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return state
    raise InvalidWeights(f"{file} is not a state dict, and holds none: save model.state_dict()")


def _torch(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values: the arguments of a training
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidWeights(f"{file} is not a readable state dict: {_advice(file)}") from error
    except (RuntimeError, EOFError) as error:
        raise InvalidWeights(f"{file} is not a readable state dict: {str(error).splitlines()[0]}") from error


def _advice(file: Path) -> str:
    """Say what cannot be read, and how to make a state dict of it if that is known."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # whatever the bytes lead the unpickler to
        return "it is damaged, or not a file of torch"
    others = [name for name in names if name != "argparse.Namespace"]
    return (
        f"it holds objects ({', '.join(others[:3])}); where you trust it and have their code: "
        f"x = torch.load({file.name!r}, weights_only=False); "
        "torch.save(x.state_dict() if hasattr(x, 'state_dict') else x['state_dict'], 'weights.pth')"
    )


def _safetensors(file: Path) -> dict[str, Tensor]:
    """Read safetensors: the header's length, the header in JSON, the tensors' bytes
    (huggingface.co/docs/safetensors)."""
    content = bytearray(file.read_bytes())
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > min(MAX_HEADER_BYTES, len(content) - 8):
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(content[8 : 8 + length])
        return {name: _tensor(content, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidWeights(f"{file} is no readable safetensors file: {error}") from error


def _tensor(content: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (begin, end) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
    count = math.prod(shape)
    if not 0 <= begin <= end <= len(content) - start or end - begin != count * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} are not {shape} of {entry['dtype']}")
    if not count:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin).reshape(shape).clone()
