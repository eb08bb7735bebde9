"""A file is named by its first bytes, and no error calls a picture something else."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from model.formats.signatures import HEAD_BYTES, READ, name_of
from model.image import InvalidImage, decode_image
from tests.support.pictures import encode


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def box(brand: bytes, *compatible: bytes) -> bytes:
    content = brand + b"\0\0\0\0" + b"".join(compatible)
    return (8 + len(content)).to_bytes(4, "big") + b"ftyp" + content + bytes(100)


def zipped(name: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, "x")

    return written(write)


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a"))


WEIGHTS = {"weight": torch.zeros(3)}
OTHERS = {
    "HEIC": [box(b"heic", b"mif1", b"heic"), box(b"heix"), box(b"mif1", b"mif1", b"heic", b"miaf"), box(b"hevc")],
    "JPEG XL": [b"\xff\x0a" + bytes(100), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100)],
    "JPEG 2000": [encode(Image.new("RGB", (32, 32)), "JPEG2000"), b"\xff\x4f\xff\x51" + bytes(100)],
    "JPEG-LS": [b"\xff\xd8\xff\xf7" + bytes(100)],
    "JPEG XR": [b"II\xbc\x01" + bytes(100)],
    "Canon raw file (CR2)": [b"II*\0\x10\0\0\0CR\2\0" + bytes(100)],
    "Canon raw file (CR3)": [box(b"crx ", b"crx ", b"isom")],
    "Olympus raw file": [b"IIRO\x08\0\0\0" + bytes(100), b"IIRS\x08\0\0\0", b"MMOR\0\0\0\x08"],
    "Panasonic raw file": [b"IIU\0\x18\0\0\0" + bytes(100)],
    "Fujifilm raw file": [b"FUJIFILMCCD-RAW 0201FF"],
    "Phase One raw file": [b"II*\0\x10\0\0\0IIII" + bytes(100)],
    "SVG": [
        b"<svg/>", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', b"\xef\xbb\xbf <!-- x --><svg>",
    ],
    "PDF": [encode(Image.new("RGB", (32, 32)), "PDF")],
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0"],
    "PSD": [b"8BPS\0\1" + bytes(100)],
    "icon": [encode(Image.new("RGB", (32, 32)), "ICO")],
    "Netpbm": [encode(Image.new("RGB", (32, 32)), "PPM")],
    "web page": [b"<!DOCTYPE html><html>", b"\n<html><body>not found"],
    "film": [box(b"isom", b"mp42"), box(b"qt  ")],
    "JSON": [b'{"image": "abc"}'],
    "data URL": [b"data:image/png;base64,iVBORw0KGgo"],
    "in base64": [b"/9j/4AAQSkZJRg", b"iVBORw0KGgoAAAANSUhEUg"],
    "Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"],
    "PyTorch checkpoint": [
        written(lambda file: torch.save(WEIGHTS, file)),
        written(lambda file: torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)),
    ],
    "Python pickle": [pickle.dumps({"weight": 1}), pickle.dumps([1], protocol=2)],
    "ZIP archive": [zipped("model.onnx")],
    "npz": [written(lambda file: np.savez(file, weight=np.zeros(3)))],
    "gzip archive": [b"\x1f\x8b\x08" + bytes(30)],
    "tar archive": [written(tarred)],
    "safetensors": [(40).to_bytes(8, "little") + b'{"weight":{"dtype":"F32","shape":[1]}}  ' + bytes(4)],
    "HDF5": [b"\x89HDF\r\n\x1a\n" + bytes(30)],
    "TensorFlow Lite": [b"\x1c\0\0\0TFL3" + bytes(30)],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_known_and_not_read_is_named(name: str) -> None:
    for data in OTHERS[name]:
        with pytest.raises(InvalidImage) as refused:
            decode_image(data)
        said = str(refused.value)
        assert name in said and "not an image" not in said
        assert said.endswith("send one of JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF")


@pytest.mark.parametrize("file_format", READ)
def test_what_is_read_is_known_by_its_first_bytes(file_format: str) -> None:
    assert name_of(encode(Image.new("RGB", (32, 32)), file_format)[:HEAD_BYTES]) == file_format


def test_avif_that_calls_itself_a_general_container_is_avif() -> None:
    data = encode(Image.new("RGB", (32, 32), "red"), "AVIF")
    assert data[8:12] == b"avif"
    general = data[:8] + b"mif1" + data[12:]
    np.testing.assert_array_equal(decode_image(general), decode_image(data))


@pytest.mark.parametrize("data", [b"hello", bytes(1000), b"BMW is no bitmap", b"MZ"[:1], b"GIF"])
def test_what_is_not_known_is_not_named(data: bytes) -> None:
    assert name_of(data) is None
    with pytest.raises(InvalidImage, match="are not an image"):
        decode_image(data)


@pytest.mark.parametrize("file_format", READ)
def test_a_damaged_picture_is_called_a_damaged_one(file_format: str) -> None:
    data = encode(Image.new("RGB", (32, 32), "red"), file_format)
    with pytest.raises(InvalidImage, match=f"the {file_format} .*(cut off|damaged)"):
        decode_image(data[: len(data) * 2 // 3])
    with pytest.raises(InvalidImage, match=file_format):
        decode_image(data[:24])
