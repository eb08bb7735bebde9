"""Weights as people have them: the usual dicts, prefixes and formats; and what is said where they cannot be read."""

import argparse
import json
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.exchange.weights_file import InvalidWeights, read_state

KNOWN = "head.cls_logits.bias"
STATE = {"body.conv.weight": torch.arange(6.0).reshape(2, 3), KNOWN: torch.tensor([1.5, -2.0])}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


CONTENTS: list[Callable[[], Any]] = [
    lambda: STATE,
    lambda: OrderedDict(STATE),
    lambda: {"model": STATE, "optimizer": {"state": {}}, "epoch": 25, "args": argparse.Namespace(lr=0.01, data="coco")},
    lambda: {"model": STATE, "model_ema": prefixed("module.")},
    lambda: {"state_dict": prefixed("model.") | {"metric.seen": torch.zeros(1)}, "pytorch-lightning_version": "2.4"},
    lambda: {"epoch": 3, "model_state_dict": prefixed("module.")},
    lambda: prefixed("module."),
    lambda: prefixed("_orig_mod.module."),
]


def same(state: dict[str, Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("content", CONTENTS)
def test_a_state_dict_is_found_where_trainings_leave_it(content: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "weights.pth")
    assert same(read_state(tmp_path / "weights.pth", KNOWN))


def safetensors(state: dict[str, Tensor], **changes: Any) -> bytes:
    """By the format's own description: length, JSON header, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in state.items():
        content = value.numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        header[name] |= changes
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(prefixed("module.")))
    assert same(read_state(tmp_path / "model.safetensors", KNOWN))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", safetensors(STATE)[:-3],
     safetensors(STATE, dtype="F4"), safetensors(STATE, data_offsets=[-8, 0]), safetensors(STATE, shape=[7])],
)  # fmt: skip
def test_a_damaged_safetensors_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(InvalidWeights, match=r"bad\.safetensors is no readable safetensors file") as error:
        read_state(tmp_path / "bad.safetensors", KNOWN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [(nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), ({"state_dict": STATE, "path": np.dtype("f4")}, "numpy")],
)
def test_what_holds_objects_is_refused_with_how_to_make_it_readable(content: Any, named: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "whole.pth")
    with pytest.raises(InvalidWeights, match="it holds objects") as error:
        read_state(tmp_path / "whole.pth", KNOWN)
    text = str(error.value)
    assert named in text and "\n" not in text and "\x1b" not in text
    assert "x = torch.load('whole.pth', weights_only=False); torch.save(x.state_dict() if hasattr" in text
