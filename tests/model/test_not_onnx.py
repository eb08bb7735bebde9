"""A model file that is none is named as what it is."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from model.detector import Detector
from model.metadata import InvalidModel
from tests.support.pictures import encode, picture
from tests.support.tiny_model import write_tiny_model


def checkpoint(**options: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file, **options)
    return file.getvalue()


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x" * 100)
    return file.getvalue()


def arrays() -> bytes:
    file = io.BytesIO()
    np.savez(file, weight=np.zeros(3))
    return file.getvalue()


FILES = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    "web page": b"\n<!doctype html>\n<title>Sign in</title>",
    "PyTorch checkpoint": checkpoint(),
    "PyTorch checkpoint (in the format before 1.6)": checkpoint(_use_new_zipfile_serialization=False),
    "Python pickle": pickle.dumps({"weight": [1.0]}),
    "ZIP archive": zipped("model.onnx"),
    "NumPy archive": arrays(),
    "gzip archive": b"\x1f\x8b\x08\0" + bytes(30),
    "safetensors": (40).to_bytes(8, "little") + b'{"weight":{"dtype":"F32","shape":[1]}}  ' + bytes(4),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(30),
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(30),
    "JSON": b'{"labels": []}',
    "JPEG": encode(picture(), "JPEG"),
    "is empty": b"",
    "cannot be parsed": b"hello",
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_onnx_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(FILES[name])
    with pytest.raises(InvalidModel) as refused:
        Detector(path, device="cpu")
    said = str(refused.value)
    assert said.startswith(str(path)) and name in said
    assert "\n" not in said and "protobuf" not in said


@pytest.mark.parametrize("change", ["ir_version", "opset"])
def test_a_version_of_the_future_is_said_without_the_runtimes_source(change: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    model = onnx.load(tmp_path / "tiny.onnx")
    if change == "opset":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    path = tmp_path / "future.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModel, match="99") as refused:
        Detector(path, device="cpu")
    assert "::" not in str(refused.value) and ".cc" not in str(refused.value)


def test_a_cut_off_model_is_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    write_tiny_model(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidModel, match="damaged"):
        Detector(path, device="cpu")
