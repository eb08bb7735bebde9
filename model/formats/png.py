"""Reader of PNG: Pillow decodes a copy of the file with the chunks that pixels need, so that texts, profiles and their
checksums cannot fail the decoding.

Source: PNG specification, third edition.
"""

import io
import re
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import PngImagePlugin

from model.formats import InvalidImage, check_pixels
from model.formats.exif import orientation_in
from model.formats.pillow import rgb_of
from model.types import Pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"
MAX_CHUNKS = 100_000
MAX_EXIF_BYTES = 1 << 20
PALETTE = 3
"""Colour type whose samples are indices into PLTE; for others PLTE is a suggestion."""


def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
    needed, exif, is_palette = [SIGNATURE], None, False
    for kind, body, chunk in _chunks(data):
        is_whole = zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(chunk[8 + len(body) :], "big")
        if kind == b"IHDR":
            if len(body) < 13:
                raise InvalidImage("the PNG has a damaged header")
            check_pixels(int.from_bytes(body[:4], "big"), int.from_bytes(body[4:8], "big"), max_pixels)
            is_palette = body[9] == PALETTE
        if kind in (b"IHDR", b"IDAT") or (kind == b"PLTE" and is_palette):
            if not is_whole:
                raise InvalidImage(f"the PNG is cut off or damaged: the checksum of its {kind.decode()} is wrong")
            needed.append(chunk)
        elif not kind[0] & 32 and kind not in (b"PLTE", b"IEND"):  # a capital letter: no reader may skip it
            raise InvalidImage(f"the PNG has a chunk {kind.decode('latin-1')!r}, which is not read")
        elif is_whole:
            exif = exif or _exif(kind, body)
    with PngImagePlugin.PngImageFile(io.BytesIO(b"".join([*needed, END]))) as image:
        if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2), orientation_in(exif)
        return rgb_of(image), orientation_in(exif)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (kind, body, whole chunk) of each chunk up to IEND or the end of a truncated file."""
    position = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind, chunk = data[position + 4 : position + 8], data[position:end]
        if len(chunk) < 12:
            return
        yield kind, chunk[8 : end - position - 4], chunk
        if kind == b"IEND" or end > len(data):
            return
        position = end
    raise InvalidImage(f"the PNG has more than {MAX_CHUNKS:,} chunks")


def _exif(kind: bytes, body: bytes) -> bytes | None:
    """Return the EXIF data of eXIf, or of the text in which ImageMagick keeps it."""
    if kind == b"eXIf":
        return body
    if kind not in (b"zTXt", b"tEXt") or not body.startswith((b"Raw profile type exif\0", b"Raw profile type APP1\0")):
        return None
    text = body[22:]
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_EXIF_BYTES)
        name_length_digits = re.match(rb"\s*\w+\s+\d+\s+([0-9a-fA-F\s]*)", text)
        return bytes.fromhex(name_length_digits[1].decode()) if name_length_digits else None
    except (zlib.error, ValueError):
        return None
