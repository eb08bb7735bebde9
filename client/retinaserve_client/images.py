"""The bytes that are sent for a picture in any supported form.

A file's bytes are sent as they are. Pixels are sent as PNG, which is lossless. Boxes are then in pixels of your array
or Pillow image, whatever its EXIF orientation is.
"""

import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class PillowImage(Protocol):
    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> "PillowImage": ...
    def tobytes(self) -> bytes: ...


class RgbArray(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


Image = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PillowImage | RgbArray
"""A path, an encoded file's bytes, a file opened for bytes, a Pillow image, or an RGB array, uint8 [H, W, 3]."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(image: Image) -> bytes:
    """Return the bytes of an image file. OSError: it cannot be read. TypeError, ValueError: it is not an image."""
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if hasattr(image, "read"):
        data = image.read()
        if not isinstance(data, bytes):
            raise TypeError("the file is open as text: open it with mode 'rb'")
        return data
    if hasattr(image, "convert") and hasattr(image, "size"):
        width, height = image.size
        return png(width, height, image.convert("RGB").tobytes())
    if hasattr(image, "shape") and hasattr(image, "dtype"):
        return _png_of_array(image)
    raise TypeError(f"a path, bytes, an open file, a Pillow image or an RGB array is an image, not {type(image)}")


def _png_of_array(array: RgbArray) -> bytes:
    shape = tuple(array.shape)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or str(array.dtype) != "uint8":
        raise ValueError(f"an array is an image as RGB, uint8 [H, W, 3], not {array.dtype} {list(shape)}")
    height, width, _ = shape
    return png(width, height, array.tobytes())


def png(width: int, height: int, rgb: bytes) -> bytes:
    """Encode rows of 8-bit RGB pixels as PNG, quickly compressed (RFC 2083)."""
    row = 3 * width
    rows = b"".join(b"\0" + rgb[start : start + row] for start in range(0, height * row, row))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, level=1)), (b"IEND", b""))
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
