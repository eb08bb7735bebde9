"""Decompression of a TIFF's strips and tiles.

libtiff, through Pillow, only decompresses: it gets the blocks as a grey picture of 8 bits, with one pixel for each of
their bytes.
"""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from model.formats import InvalidImage
from model.formats.tiff_tags import (
    BITS,
    COMPRESSION,
    FILL_ORDER,
    HEIGHT,
    PHOTOMETRIC,
    ROWS_PER_STRIP,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Directory,
    File,
)

BAND_BYTES = 1 << 24
"""Bytes that are decompressed at once, approximately, if the file's strips allow."""


@dataclass(frozen=True)
class Grid:
    """The grid of strips or tiles: `rows` × `columns` blocks of `height` × `width` pixels cover each plane."""

    height: int
    width: int
    rows: int
    columns: int
    tiled: bool

    @staticmethod
    def of(directory: Directory, width: int, height: int) -> "Grid":
        tiled = TILE_OFFSETS in directory.tags
        if tiled:
            block_width = directory.require(TILE_WIDTH, "TileWidth")
            block_height = directory.require(TILE_HEIGHT, "TileLength")
        else:
            block_width, block_height = width, min(directory.get(ROWS_PER_STRIP, height), height)
        if not block_width * block_height:
            raise InvalidImage("the TIFF's strips or tiles have no size")
        return Grid(block_height, block_width, -(-height // block_height), -(-width // block_width), tiled)

    @property
    def pixels(self) -> int:
        """Pixels that are decompressed for one plane: those of all blocks; strips end with the picture."""
        return self.rows * self.height * self.columns * self.width if self.tiled else 0


def decompressed(
    file: File, directory: Directory, grid: Grid, row_bytes: int, plane: int, rows: range, height: int
) -> Image.Image:
    """Decompress rows of blocks, `height` rows of pixels, to a picture of bytes, columns × row_bytes wide."""
    compression = directory.get(COMPRESSION, 1)
    tags = {
        WIDTH: grid.columns * row_bytes, HEIGHT: len(rows) * grid.height if grid.tiled else height, BITS: 8,
        COMPRESSION: compression, PHOTOMETRIC: 1, FILL_ORDER: directory.get(FILL_ORDER, 1), SAMPLES: 1,
    }  # fmt: skip
    tags |= {TILE_WIDTH: row_bytes, TILE_HEIGHT: grid.height} if grid.tiled else {ROWS_PER_STRIP: grid.height}
    first = (plane * grid.rows + rows.start) * grid.columns
    count = len(rows) * grid.columns
    offsets = directory.values(TILE_OFFSETS if grid.tiled else STRIP_OFFSETS)[first : first + count].tolist()
    sizes = directory.values(TILE_BYTES if grid.tiled else STRIP_BYTES)[first : first + count].tolist()
    if compression == 1:  # old writers leave the sizes out, or write 0
        sizes = [grid.height * row_bytes] * count
        if not grid.tiled:
            sizes[-1] -= (len(rows) * grid.height - height) * row_bytes
    extents = [(start, min(start + size, len(file.data))) for start, size in zip(offsets, sizes, strict=False)]
    if sum(max(0, end - start) for start, end in extents) > len(file.data) + BAND_BYTES:
        raise InvalidImage("the TIFF is damaged: its strips or tiles overlap")
    blocks = [bytes(file.data[start:end]) for start, end in extents]
    if len(blocks) < count:
        raise InvalidImage("the TIFF is cut off or damaged: some of its pixels are missing")
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_grey_tiff(tags, blocks, grid.tiled))) as image:
        image.load()
        return image


def rows_of(image: Image.Image, top: int, bottom: int) -> NDArray[np.uint8]:
    rows = image.crop((0, top, image.width, bottom))
    return np.frombuffer(rows.tobytes(), np.uint8).reshape(bottom - top, image.width)


def _grey_tiff(tags: Mapping[int, int], blocks: list[bytes], tiled: bool) -> bytes:
    entries, count = dict(tags), len(blocks)
    table = 8 + 2 + (len(tags) + 2) * 12 + 4  # where the offsets lie, then the sizes, then the blocks
    sizes = np.array([len(block) for block in blocks], "<u4")
    offsets = (table + 8 * count + np.cumsum(sizes) - sizes).astype("<u4")
    entries[TILE_OFFSETS if tiled else STRIP_OFFSETS] = table if count > 1 else int(offsets[0])
    entries[TILE_BYTES if tiled else STRIP_BYTES] = table + 4 * count if count > 1 else int(sizes[0])
    listed = (TILE_OFFSETS, STRIP_OFFSETS, TILE_BYTES, STRIP_BYTES)
    packed = [
        struct.pack("<HHII", tag, 4, count if tag in listed else 1, value) for tag, value in sorted(entries.items())
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(packed) + bytes(4)
    return b"".join([head, offsets.tobytes(), sizes.tobytes(), *blocks])
