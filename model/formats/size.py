"""How many pixels an encoded picture claims, read off its first bytes in a bounded walk: what its decoding will take.

Only the reader knows the true size; whoever plans by the claim gives it to the reader as the most it may decode.
"""

import re
import struct
from collections.abc import Callable, Mapping

from model.formats import InvalidImage
from model.formats.jpeg import FRAMES, STANDALONE
from model.formats.signatures import name_of
from model.formats.tiff_tags import HEIGHT, SUB_DIRECTORIES, WIDTH, File

MAX_STEPS = 1_000
"""Of a walk over segments or blocks."""
AVIF_HEAD_BYTES = 64 * 1024
_ISPE = re.compile(rb"ispe\0\0\0\0(.{8})", re.DOTALL)


def claimed_pixels(data: bytes | bytearray) -> int | None:
    """Width × height; None if the first bytes do not say, or this is no picture."""
    reader = READERS.get(name_of(bytes(data[:HEAD_BYTES])) or "")
    try:
        return None if reader is None else reader(data)
    except (struct.error, IndexError, InvalidImage):
        return None


def _jpeg(data: bytes | bytearray) -> int | None:
    position = 2
    for _ in range(MAX_STEPS):
        position = data.find(b"\xff", position)
        marker = data[position + 1]
        if position < 0 or marker in (0xD9, 0xDA):
            return None
        if marker in (0x00, 0xFF, *STANDALONE):
            position += 1
            continue
        if marker in FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return int(height * width)
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


def _png(data: bytes | bytearray) -> int:
    width, height = struct.unpack_from(">II", data, 16)
    return int(width * height)


def _gif(data: bytes | bytearray) -> int | None:
    """The screen, enlarged by the first frame where that reaches beyond it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(MAX_STEPS):
        if data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return int(max(width, left + frame_width) * max(height, top + frame_height))
        if data[position] != 0x21:
            return None
        position += 2
        while length := data[position]:
            position += 1 + length
        position += 1
    return None


def _bmp(data: bytes | bytearray) -> int:
    old = struct.unpack_from("<I", data, 14)[0] == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return int(abs(width) * abs(height))


def _webp(data: bytes | bytearray) -> int | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return (int.from_bytes(data[24:27], "little") + 1) * (int.from_bytes(data[27:30], "little") + 1)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return int(((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return int((width & 0x3FFF) * (height & 0x3FFF))
    return None


def _tiff(data: bytes | bytearray) -> int | None:
    """Of a file with one directory: of several the reader chooses."""
    file = File.of(bytes(data))
    directory, following = file.directory(file.first())
    if following or SUB_DIRECTORIES in directory.tags:
        return None
    return directory.get(WIDTH, 0) * directory.get(HEIGHT, 0)


def _avif(data: bytes | bytearray) -> int | None:
    """The largest of its items: a grid's is the whole."""
    sizes = [struct.unpack(">II", found[1]) for found in _ISPE.finditer(data[:AVIF_HEAD_BYTES])]
    return max((int(width * height) for width, height in sizes), default=None)


HEAD_BYTES = 4096
READERS: Mapping[str, Callable[[bytes | bytearray], int | None]] = {
    "JPEG": _jpeg, "PNG": _png, "GIF": _gif, "BMP": _bmp, "WEBP": _webp, "TIFF": _tiff, "AVIF": _avif,
}  # fmt: skip
