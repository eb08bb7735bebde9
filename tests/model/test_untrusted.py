"""Reasons to refuse a model file before anything interprets it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from model.detector import Detector
from model.metadata import InvalidModel
from model.pretrained import demo_model
from model.untrusted import read_model
from tests.support.tiny_model import write_tiny_model


def graph(name: str = "body") -> onnx.GraphProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [])
    return helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], name, [value], [value])


def loop(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["n", "t"], ["z"], body=graph()))


def branch(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("If", ["c"], ["z"], then_branch=graph(), else_branch=graph()))


def scan(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Scan", ["x"], ["z"], body=graph(), num_scan_inputs=1))


def graphs_of_another_domain(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Own", ["x"], ["z"], domain="com.microsoft", bodies=[graph(), graph()]))


def in_a_function(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Loop", ["n", "t"], ["z"], body=graph())]
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("own", "Spin", ["n", "t"], ["z"], nodes, opset))


@pytest.mark.parametrize("add", [loop, branch, scan, graphs_of_another_domain, in_a_function])
def test_control_flow_is_refused(tmp_path: Path, add: Callable[[onnx.ModelProto], None]) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    add(model)
    onnx.save(model, tmp_path / "a.onnx")
    for read in (read_model, Detector):
        with pytest.raises(InvalidModel, match=r"a\.onnx has control flow \('(Loop|If|Scan|Own)'\)"):
            read(tmp_path / "a.onnx")


def test_a_tag_of_more_than_32_bits_is_read_as_protobuf_reads_it(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "a.onnx")
    hidden = onnx.ModelProto()
    loop(hidden)
    tail = hidden.SerializeToString()
    assert tail[0] == 7 << 3 | 2
    wide = bytes([0x80 | tail[0], 0x80, 0x80, 0x80, 0x70])  # bits 32 to 34 are set
    (tmp_path / "a.onnx").write_bytes((tmp_path / "a.onnx").read_bytes() + wide + tail[1:])
    with pytest.raises(InvalidModel):
        read_model(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "content", [b"\x08", b"\x0a\x05abc", b"\x0b", b"\xff" * 20, b"\x0d\0\0", b"\x32\x0aaaORTMaaaa"]
)
def test_what_is_no_protobuf_is_refused_unseen(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InvalidModel, match="is no ONNX file"):
        read_model(tmp_path / "a.onnx")


def test_the_hash_is_compared_before_anything_looks_into_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"no model at all")
    with pytest.raises(InvalidModel, match=r"a\.onnx has sha256 .*; 0{64} is asked for"):
        Detector(tmp_path / "a.onnx", sha256="0" * 64)
    write_tiny_model(tmp_path / "a.onnx")
    right = hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()
    assert Detector(tmp_path / "a.onnx", device="cpu", sha256=right).sha256 == right


def test_our_own_files_have_none() -> None:
    path = demo_model("cpu")
    assert read_model(path) == (path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest())
