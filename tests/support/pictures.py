"""Pictures of known pixels, and files of them."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

from model.types import Pixels


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Pixels:
    """Smooth colours with edges, so that JPEG keeps it and a flip or a shift shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(pixels: Pixels | Image.Image, file_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, for kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
