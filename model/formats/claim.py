"""The claim of an encoded picture: its size and the cost of decoding, read from its beginning in a bounded walk.

A claim may be false; only the reader finds out. A caller that plans by a claim gives `pixels_allowed` to the reader as
the most that it may decode, so that decoding takes no more than was planned.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.formats import InvalidImage
from model.formats.jpeg import SEQUENTIAL, frame_in, shape
from model.formats.signatures import HEAD_BYTES, name_of
from model.formats.tiff import work_of
from model.formats.tiff_tags import HEIGHT, SUB_DIRECTORIES, WIDTH, File

BYTES_PER_PIXEL = 18
"""Most memory of a decoder, with its resize. The largest is WebP's: 842 MiB for 50 million pixels."""
SEQUENTIAL_JPEG_BYTES_PER_PIXEL = 8
"""Memory of a sequential JPEG of grey or colour, of which only the pixels and the resized picture are held."""
MAX_STEPS = 10_000
"""Most steps of a walk over a GIF's blocks, which have at most 255 bytes."""
GIF_EXTENSION, GIF_FRAME = 0x21, 0x2C
CMYK = 4
"""Number of components of CMYK."""
AVIF_HEAD_BYTES = 64 * 1024
_ISPE = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)


@dataclass(frozen=True)
class Claim:
    format: str | None
    """Format, one of READ; None: it is not read."""
    size: tuple[int, int] | None = None
    """Height and width as stored; None: the beginning does not say, or makes no sense."""
    pixels: int | None = None
    """Pixels to decode: height × width, and for a TIFF at least the pixels of its blocks. None: unknown."""
    bytes_per_pixel: int = BYTES_PER_PIXEL

    def pixels_allowed(self, max_pixels: int) -> int:
        """Return the most pixels that its reader may decode, at most `max_pixels`."""
        return max_pixels if self.pixels is None else min(self.pixels, max_pixels)

    def decode_bytes(self, max_pixels: int) -> int:
        """The most memory that decoding takes, bytes."""
        return self.bytes_per_pixel * self.pixels_allowed(max_pixels)


Reader = Callable[[bytes | bytearray], Claim]


def claim_of(data: bytes | bytearray) -> Claim:
    """Read the claim. Takes milliseconds at most, and copies nothing, whatever the bytes are."""
    name = name_of(bytes(data[:HEAD_BYTES]))
    if name is None or name not in READERS:
        return Claim(None, pixels=0)
    try:
        return READERS[name](data)
    except (struct.error, IndexError, InvalidImage):
        return Claim(name)


def _sized(name: str, size_in: Callable[[bytes | bytearray], tuple[int, int] | None]) -> Reader:
    def read(data: bytes | bytearray) -> Claim:
        size = size_in(data)
        return Claim(name, size, None if size is None else size[0] * size[1])

    return read


def _jpeg(data: bytes | bytearray) -> Claim:
    if (frame := frame_in(data)) is None:
        return Claim("JPEG")
    height, width, components = shape(frame.payload)
    sequential = frame.marker in SEQUENTIAL and components < CMYK
    per_pixel = SEQUENTIAL_JPEG_BYTES_PER_PIXEL if sequential else BYTES_PER_PIXEL
    return Claim("JPEG", (height, width), height * width, per_pixel)


def _png(data: bytes | bytearray) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _gif(data: bytes | bytearray) -> tuple[int, int] | None:
    """Read the screen's size, enlarged by a first frame that reaches beyond it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position, inside = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), False
    for _ in range(MAX_STEPS):
        byte = data[position]
        if inside:
            position, inside = position + 1 + byte, byte > 0
        elif byte == GIF_EXTENSION:
            position, inside = position + 2, True
        elif byte == GIF_FRAME:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return max(height, top + frame_height), max(width, left + frame_width)
        else:
            return None
    return None


def _bmp(data: bytes | bytearray) -> tuple[int, int]:
    old = struct.unpack_from("<I", data, 14)[0] == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return abs(height), abs(width)


def _webp(data: bytes | bytearray) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


def _avif(data: bytes | bytearray) -> tuple[int, int] | None:
    """Read the size of the largest item: a grid's item is the whole picture."""
    sizes = [struct.unpack(">II", found[1]) for found in _ISPE.finditer(data, 0, AVIF_HEAD_BYTES)]
    return max(((height, width) for width, height in sizes), key=lambda size: size[0] * size[1], default=None)


def _tiff(data: bytes | bytearray) -> Claim:
    """Read the size of a file with one directory; among several the reader chooses."""
    file = File.of(data)
    directory, following = file.directory(file.first())
    if following or SUB_DIRECTORIES in directory.tags:
        return Claim("TIFF")
    height, width = directory.get(HEIGHT, 0), directory.get(WIDTH, 0)
    return Claim("TIFF", (height, width), max(height * width, work_of(directory).pixels))


READERS: Mapping[str, Reader] = {
    "JPEG": _jpeg,
    "PNG": _sized("PNG", _png),
    "GIF": _sized("GIF", _gif),
    "BMP": _sized("BMP", _bmp),
    "WEBP": _sized("WEBP", _webp),
    "TIFF": _tiff,
    "AVIF": _sized("AVIF", _avif),
}
