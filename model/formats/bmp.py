"""Reader of BMP: every header, depth, bit mask and run-length code that Windows and OS/2 write.

Source: Microsoft, "Bitmap Storage" (BITMAPINFOHEADER and its V4 and V5); OS/2 2.0 headers share its start.
"""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.formats import InvalidImage, check_pixels
from model.types import Pixels

RGB, RLE8, RLE4, BITFIELDS, ALPHA_BITFIELDS = 0, 1, 2, 3, 6
MASKS = {16: (0x7C00, 0x3E0, 0x1F), 24: (0xFF0000, 0xFF00, 0xFF), 32: (0xFF0000, 0xFF00, 0xFF)}
"""Default bit masks of red, green and blue."""


@dataclass(frozen=True)
class Header:
    size: int
    width: int
    height: int
    top_down: bool
    bits: int
    compression: int
    colours: int


def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
    header = _header(data)
    check_pixels(header.width, header.height, max_pixels)
    if header.width * header.height == 0:
        raise InvalidImage("the BMP has no pixels")
    [offset] = struct.unpack_from("<I", data, 10)
    if header.bits <= 8:
        palette = _palette(data, header)
        start = offset or 14 + header.size + len(palette) * (3 if header.size == 12 else 4)
        full = np.zeros((256, 3), np.uint8)
        full[: len(palette)] = palette
        pixels = full[_indexes(data, start, header)]
    else:
        pixels = _colours(data, offset, header)
    return np.array(pixels if header.top_down else pixels[::-1], order="C"), None


def _header(data: bytes) -> Header:
    [size] = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        header = Header(size, width, height, False, bits, RGB, 0)
    elif 16 <= size <= 124:
        # An OS/2 header may end early: what is not there is 0.
        fields = data[18 : 14 + min(size, 40)].ljust(36, b"\0")
        width, height, _, bits, compression, _, _, _, colours, _ = struct.unpack("<iiHHIIiiII", fields)
        if size in (16, 64) and compression == BITFIELDS:
            raise InvalidImage("a BMP of OS/2's Huffman code is not read")
        header = Header(size, width, abs(height), height < 0, bits, compression, colours)
    else:
        raise InvalidImage(f"a BMP with a header of {size} bytes is not read")
    compressions = {RLE8: (8,), RLE4: (4,), RGB: (1, 2, 4, 8, 16, 24, 32), BITFIELDS: (16, 24, 32)}
    compressions[ALPHA_BITFIELDS] = compressions[BITFIELDS]
    if header.width < 0 or header.bits not in compressions.get(header.compression, ()):
        raise InvalidImage(f"a BMP of {header.bits} bits and compression {header.compression} is not read")
    return header


def _palette(data: bytes, header: Header) -> Pixels:
    size = 3 if header.size == 12 else 4
    count = min(header.colours or 1 << header.bits, 1 << header.bits)
    start = 14 + header.size
    count = min(count, max(0, len(data) - start) // size)
    entries = np.frombuffer(data, np.uint8, count * size, start).reshape(count, size)
    return entries[:, 2::-1]


def _rows(data: bytes, offset: int, header: Header) -> NDArray[np.uint8]:
    """Return the rows, [height, bytes of a row]. Rows are padded to four bytes; the last padding may be missing."""
    used = (header.width * header.bits + 7) // 8
    row = -(-used // 4) * 4
    missing = offset + row * header.height - len(data)
    if missing > row - used:
        raise InvalidImage("the BMP is cut off: some of its pixels are missing")
    packed = data[offset : offset + row * header.height] + bytes(max(0, missing))
    return np.frombuffer(packed, np.uint8).reshape(header.height, row)


def _indexes(data: bytes, offset: int, header: Header) -> NDArray[np.uint8]:
    if header.compression in (RLE8, RLE4):
        return _run_lengths(data, offset, header)
    rows = _rows(data, offset, header)
    if header.bits < 8:
        shifts = np.arange(8 - header.bits, -1, -header.bits, dtype=np.uint8)
        rows = (rows[:, :, None] >> shifts & np.uint8((1 << header.bits) - 1)).reshape(header.height, -1)
    return rows[:, : header.width]


def _run_lengths(data: bytes, position: int, header: Header) -> NDArray[np.uint8]:
    """Decode run lengths. Skipped pixels have index 0. Code without an end mark must have filled all rows."""
    width, height, four_bits = header.width, header.height, header.compression == RLE4
    out = bytearray(width * height)
    x = y = 0
    while y < height:
        if position + 2 > len(data):
            if y == height - 1 and x >= width:
                break
            raise InvalidImage("the BMP is cut off: some of its pixels are missing")
        count, value = data[position], data[position + 1]
        position += 2
        if count:
            run = bytes((value >> 4, value & 15)) * ((count + 1) // 2) if four_bits else bytes((value,)) * count
            run = run[:count]
        elif value == 0:
            x, y = 0, y + 1
            continue
        elif value == 1:
            break
        elif value == 2:
            x, y = x + data[position], y + data[position + 1]
            position += 2
            continue
        else:
            size = (value + 1) // 2 if four_bits else value
            run = data[position : position + size]
            if len(run) < size:
                raise InvalidImage("the BMP is cut off: some of its pixels are missing")
            if four_bits:
                run = bytes(half for byte in run for half in (byte >> 4, byte & 15))[:value]
            position += size + size % 2
        kept = run[: max(0, width - x)]
        out[y * width + x : y * width + x + len(kept)] = kept
        x += len(run)
    return np.frombuffer(out, np.uint8).reshape(height, width)


def _colours(data: bytes, offset: int, header: Header) -> Pixels:
    masks, behind = MASKS[header.bits], 14 + header.size
    if header.compression in (BITFIELDS, ALPHA_BITFIELDS):
        masks = struct.unpack_from("<III", data, 54)  # behind the 40 bytes that every header starts with
        if header.size == 40:
            behind += 12 if header.compression == BITFIELDS else 16
    if header.bits == 32 and not any(masks):
        masks = MASKS[32]
    rows = _rows(data, offset or behind, header)
    if masks == MASKS[header.bits] and header.bits > 16:
        step = header.bits // 8
        return rows[:, : header.width * step].reshape(header.height, header.width, step)[:, :, 2::-1]
    if header.bits == 24:
        raise InvalidImage("a BMP of 24 bits with masks of its own is not read")
    words = rows.view(f"<u{header.bits // 8}")[:, : header.width]
    return np.stack([_scaled(words, mask) for mask in masks], axis=2)


def _scaled(words: NDArray[np.unsignedinteger], mask: int) -> NDArray[np.uint8]:
    """Scale the masked bits to 0 to 255."""
    if not mask:
        return np.zeros(words.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    largest = mask >> shift
    if largest > 0xFFFF:
        raise InvalidImage("a BMP of more than 16 bits per sample is not read")
    scale = (np.arange(largest + 1) * 255 + largest // 2) // largest
    samples: NDArray[np.uint8] = scale.astype(np.uint8)[(words & mask) >> shift]
    return samples
