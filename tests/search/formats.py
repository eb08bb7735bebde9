"""The formats that are searched, each with the counts and sizes of its structure as genes."""

import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np
from PIL import Image

from tests.search import jpegs, tiffs
from tests.search.climb import Genes, Species
from tests.support.pictures import encode

MAX_WRITTEN_PIXELS = 4_000_000
"""Encoding more would take the time that searching shall have; files of flat noughts may claim more."""
SIDES = {"width": (1, 100_000), "height": (1, 100_000)}


def formats(max_pixels: int) -> Mapping[str, Species]:
    builders: dict[str, tuple[dict[str, tuple[int, int]], Callable[[Genes, int], bytes]]] = {
        "JPEG": (jpegs.RANGES, jpegs.build),
        "PNG": (PNG, png),
        "GIF": (GIF, gif),
        "BMP": (BMP, bmp),
        "WEBP": (WEBP, webp),
        "TIFF": (tiffs.RANGES, tiffs.build),
        "AVIF": (AVIF, avif),
    }
    return {
        name: Species(ranges, partial(_within, build, max_pixels), STARTS.get(name, ()))
        for name, (ranges, build) in builders.items()
    }


STARTS: Mapping[str, tuple[Genes, ...]] = {
    "TIFF": tiffs.STARTS,
    "JPEG": jpegs.STARTS,
    "PNG": ({"width": 1, "height": 1, "kind": 0, "rows_beyond": 100, "chunks": 100_000, "chunk_bytes": 0},),
    "BMP": ({"width": 7_000, "height": 7_000, "kind": 6, "code": 1, "codes": 7_000},),
}


def _within(build: Callable[[Genes, int], bytes], max_pixels: int, genes: Genes) -> bytes:
    return build(genes, max_pixels)


def _size(genes: Genes, max_pixels: int) -> tuple[int, int]:
    return genes["width"], min(genes["height"], max(1, max_pixels // genes["width"]))


PNG = SIDES | {
    "kind": (0, 7), "interlaced": (0, 1), "rows_beyond": (0, 100), "pieces": (1, 3_000), "empty_pieces": (0, 100_000),
    "chunks": (0, 110_000), "chunk_bytes": (0, 10_000), "chunk_kind": (0, 3), "headers": (1, 3),
}  # fmt: skip
PNG_KINDS = ((8, 2), (16, 6), (16, 2), (8, 3), (16, 0), (1, 0), (1, 3), (8, 6))
"""Bits and colour type."""
TEXTS = (b"tEXt", b"zTXt", b"eXIf", b"iCCP")


def png(genes: Genes, max_pixels: int) -> bytes:
    width, height = _size(genes, max_pixels)
    bits, colour = PNG_KINDS[genes["kind"]]
    row = 1 + (width * bits * {0: 1, 2: 3, 3: 1, 6: 4}[colour] + 7) // 8
    packed = _deflated(min(row * (height + genes["rows_beyond"]), 2**29))
    pieces = _cut(packed, genes["pieces"])
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, genes["interlaced"])
    chunks = [_chunk(b"IHDR", header)] * genes["headers"]
    chunks += [_chunk(TEXTS[genes["chunk_kind"]], bytes(genes["chunk_bytes"]))] * genes["chunks"]
    chunks += [_chunk(b"PLTE", bytes(768))] if colour == 3 else []
    chunks += [_chunk(b"IDAT", b"")] * genes["empty_pieces"] + [_chunk(b"IDAT", piece) for piece in pieces]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _cut(data: bytes, count: int) -> list[bytes]:
    step = max(1, -(-len(data) // count))
    return [data[start : start + step] for start in range(0, len(data), step)]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache
def _deflated(size: int) -> bytes:
    return zlib.compress(bytes(size), 1)


GIF = SIDES | {
    "screen": (1, 65_535), "left": (0, 65_535), "code_bits": (2, 8), "clears": (0, 1), "data_bytes": (1, 2**21),
    "frames": (1, 5_000), "comments": (0, 20_000), "comment_bytes": (1, 255), "interlaced": (0, 1), "filler": (0, 255),
}  # fmt: skip


def gif(genes: Genes, max_pixels: int) -> bytes:
    width, height = (min(side, 65_535) for side in _size(genes, max_pixels))
    data = bytes([genes["filler"]]) * genes["data_bytes"]
    blocks = b"".join(bytes([len(piece)]) + piece for piece in (data[at : at + 255] for at in range(0, len(data), 255)))
    flags = 0x40 * genes["interlaced"]
    place = struct.pack("<HHHHB", genes["left"], 0, width, height, flags)
    frame = b"," + place + bytes([genes["code_bits"]]) + blocks + b"\0"
    frames = min(genes["frames"], 1 + 20 * 2**20 // len(frame))
    comment = b"!\xfe" + (bytes([genes["comment_bytes"]]) + bytes(genes["comment_bytes"])) * genes["comments"] + b"\0"
    screen = struct.pack("<HHBBB", genes["screen"], min(genes["screen"], height), 0xF7, 0, 0)
    return b"GIF89a" + screen + bytes(768) + comment + frame * frames + b";"


BMP = SIDES | {"kind": (0, 7), "code": (0, 4), "codes": (1, 10 * 2**20)}
BMP_KINDS = ((24, 0), (8, 0), (4, 0), (1, 0), (16, 3), (32, 3), (8, 1), (4, 2))
"""Bits and compression."""
CODES = (b"\1\0", b"\0\0", b"\0\2\0\0", b"\0\3\0\0\0\0", b"\0\2\1\0")
"""A run of one pixel, the end of a row, no jump, three pixels as they are, a jump by one."""


def bmp(genes: Genes, max_pixels: int) -> bytes:
    width, height = _size(genes, max_pixels)
    bits, compression = BMP_KINDS[genes["kind"]]
    if compression in (1, 2):
        code = CODES[genes["code"]]
        body = code * min(genes["codes"], 20 * 2**20 // len(code)) + b"\0\1"
    else:
        body = bytes(min(-(-width * bits // 32) * 4 * height, 20 * 2**20))
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F) if compression == 3 else b""
    palette = bytes(4 << bits) if bits <= 8 else b""
    start = 14 + len(header) + len(masks) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + header + masks + palette + body


WEBP = {"width": (1, 16_383), "height": (1, 16_383)} | {
    "lossless": (0, 1), "noise": (0, 1), "method": (0, 4), "alpha": (0, 1), "frames": (1, 8), "chunks": (0, 50_000),
    "chunk_bytes": (0, 2_000),
}  # fmt: skip


def webp(genes: Genes, max_pixels: int) -> bytes:
    width, height = _size(genes, min(max_pixels, MAX_WRITTEN_PIXELS) // genes["frames"])
    data = _saved_webp(width, height, *(genes[name] for name in ("lossless", "noise", "method", "alpha", "frames")))
    more = (b"JUNK" + struct.pack("<I", genes["chunk_bytes"] & ~1) + bytes(genes["chunk_bytes"] & ~1)) * genes["chunks"]
    return b"RIFF" + struct.pack("<I", len(data) - 8 + len(more)) + data[8:] + more


@cache
def _saved_webp(width: int, height: int, lossless: int, noise: int, method: int, alpha: int, frames: int) -> bytes:
    images = [_image(width, height, noise, 4 if alpha else 3, seed) for seed in range(frames)]
    options: dict[str, object] = {"lossless": bool(lossless), "method": method, "quality": 50}
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    return encode(images[0], "WEBP", **options)


AVIF = {"width": (1, 16_384), "height": (1, 16_384)} | {
    "noise": (0, 1), "quality": (1, 100), "alpha": (0, 1), "tiles": (0, 4), "frames": (1, 4), "claimed": (0, 2),
}  # fmt: skip


def avif(genes: Genes, max_pixels: int) -> bytes:
    width, height = _size(genes, min(max_pixels, MAX_WRITTEN_PIXELS // 4) // genes["frames"])
    data = _saved_avif(width, height, *(genes[name] for name in ("noise", "quality", "alpha", "tiles", "frames")))
    if genes["claimed"]:  # an extent that the coded frame does not have
        lie = struct.pack(">II", 1, 1) if genes["claimed"] == 1 else struct.pack(">II", 16_000, 3_000)
        data = data.replace(struct.pack(">II", width, height), lie)
    return data


@cache
def _saved_avif(width: int, height: int, noise: int, quality: int, alpha: int, tiles: int, frames: int) -> bytes:
    images = [_image(width, height, noise, 4 if alpha else 3, seed) for seed in range(frames)]
    options: dict[str, object] = {"quality": quality, "speed": 10, "autotiling": False}
    options |= {"tile_rows": tiles, "tile_cols": tiles}
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    return encode(images[0], "AVIF", **options)


def _image(width: int, height: int, noise: int, channels: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256 if noise else 1, (height, width, channels)).astype(np.uint8))
