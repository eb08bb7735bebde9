"""Reader of TIFF. The tags that define the samples are obeyed, or the file is refused with the reason.

libtiff, through Pillow, decompresses; `tiff_samples` interprets the samples. Pillow decodes the whole picture if only
libtiff can read its pixels (JPEG, fax codes, YCbCr, Lab).

The picture is the first directory that is neither a reduced copy nor a mask, of the file's chain, else of the
sub-directories. A raw file is refused, wherever its preview is. Source: TIFF revision 6.0, TIFF/EP, DNG 1.7.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import TiffImagePlugin

from model.formats import InvalidImage, TooManyPixels, check_pixels
from model.formats.pillow import rgb_of
from model.formats.tiff_blocks import BAND_BYTES, Grid, decompressed, rows_of
from model.formats.tiff_samples import Layout, to_rgb
from model.formats.tiff_tags import (
    BITS,
    COLOUR_MAP,
    COMPRESSION,
    DEPTH,
    EXTRA_SAMPLES,
    HEIGHT,
    INK_SET,
    MAX_SAMPLE,
    ORIENTATION,
    PHOTOMETRIC,
    PLANAR,
    PREDICTOR,
    SAMPLE_FORMAT,
    SAMPLES,
    WIDTH,
    Directory,
    File,
    picture_in,
)
from model.types import Pixels

# Pillow's own reader of uncompressed files knows neither planes of 16 bits nor subsampled YCbCr; libtiff does.
TiffImagePlugin.READ_LIBTIFF = True

MAX_SAMPLES = 16
MAX_PIXEL_BYTES = 8
"""Most bytes per pixel of a picture in a single strip (16-bit RGB with alpha), which is decompressed as a whole."""
CHUNK_SAMPLES = 1 << 22
"""Samples that become RGB at once."""

MAX_TILE_PIXELS = 2
"""Most pixels of all tiles, in multiples of the largest picture: tiles reach beyond its edges."""

BLOCK_PIXELS = 16
"""Pixels whose memory a strip or tile takes in lists: some 300 bytes."""

UNSIGNED = 1
SEPARATE = 2
"""Planar configuration in which each sample has a plane of its own."""
DIFFERENCED = (5, 8, 32946, 34925, 50000)
"""Compressions that use the predictor."""
BYTES_COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, deflate, LZMA, Zstandard
PIXEL_COMPRESSIONS = (2, 3, 4, 6, 7)  # fax codes, JPEG
COMPRESSIONS = {
    32766: "NeXT", 32771: "CCITT RLEW", 32809: "ThunderScan", 33003: "JPEG 2000", 33005: "JPEG 2000", 34661: "JBIG",
    34676: "SGI Log", 34677: "SGI Log", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
PHOTOMETRICS = {
    4: "a transparency mask", 9: "ICC Lab", 10: "ITU Lab", 32844: "LogL", 32845: "LogLuv", 51177: "depth",
    52527: "a photometric mask",
}  # fmt: skip
YCBCR, LAB = 6, 8


def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
    file = File.of(data)
    directory = picture_in(file)
    width, height = directory.require(WIDTH, "ImageWidth"), directory.require(HEIGHT, "ImageLength")
    check_pixels(width, height, max_pixels)
    if width * height == 0:
        raise InvalidImage("the TIFF has no pixels")
    layout, grid, work = _layout(file, directory), Grid.of(directory, width, height), work_of(directory)
    if work.tile_pixels > MAX_TILE_PIXELS * max_pixels:
        raise TooManyPixels(
            f"the TIFF has tiles of {work.tile_pixels:,} pixels; at most {MAX_TILE_PIXELS * max_pixels:,} are allowed"
        )
    if work.bytes_at_once > MAX_PIXEL_BYTES * max_pixels:
        raise TooManyPixels(f"the TIFF's strips have {work.bytes_at_once:,} bytes; send the picture in smaller strips")
    compression = directory.get(COMPRESSION, 1)
    if compression in BYTES_COMPRESSIONS and layout.photometric not in (YCBCR, LAB):
        pixels = _read_samples(file, directory, grid, layout)
    elif compression in BYTES_COMPRESSIONS + PIXEL_COMPRESSIONS:
        pixels = _read_with_pillow(file.starting_at(directory))
    else:
        raise InvalidImage(f"a TIFF compressed by {COMPRESSIONS.get(compression, f'method {compression}')} is not read")
    return pixels, directory.get(ORIENTATION, 1)


@dataclass(frozen=True)
class Work:
    """The work of decoding: pixels and bytes besides the picture's own."""

    tile_pixels: int
    bytes_at_once: int
    """Bytes of a row of strips or tiles, which are decompressed together."""
    blocks: int
    """Number of strips or tiles of a plane."""

    @property
    def pixels(self) -> int:
        """The work as a number of pixels: those of the smallest picture that may take so much memory."""
        return max(
            -(-self.tile_pixels // MAX_TILE_PIXELS),
            -(-self.bytes_at_once // MAX_PIXEL_BYTES),
            self.blocks * BLOCK_PIXELS,
        )


def work_of(directory: Directory) -> Work:
    grid = Grid.of(directory, directory.get(WIDTH, 0), directory.get(HEIGHT, 0))
    samples = 1 if directory.get(PLANAR, 1) == SEPARATE else directory.get(SAMPLES, 1)
    row_bytes = (grid.width * samples * directory.get(BITS, 1) + 7) // 8
    return Work(grid.pixels, row_bytes * grid.columns * grid.height, grid.rows * grid.columns)


def _layout(file: File, directory: Directory) -> Layout:
    fax = directory.get(COMPRESSION, 1) in (2, 3, 4)
    samples, bits = directory.get(SAMPLES, 1), directory.all(BITS) or [1]
    if len(set(bits)) > 1:
        raise InvalidImage(f"a TIFF of {bits} bits per sample is not read: send the same number for each")
    if set(directory.all(SAMPLE_FORMAT)) - {UNSIGNED}:
        raise InvalidImage(f"signed or floating samples of {bits[0]} bits are not read: their range is unknown")
    if samples > MAX_SAMPLES:
        raise InvalidImage(f"a TIFF of {samples} samples per pixel is not read: at most {MAX_SAMPLES} are")
    if bits[0] > 16:
        raise InvalidImage(f"samples of {bits[0]} bits are not read: their range is unknown; send 8 or 16 bits")
    if directory.get(DEPTH, 1) != 1 or directory.get(INK_SET, 1) != 1:
        raise InvalidImage("a TIFF of several depths or of inks other than CMYK is not read")
    photometric = 0 if fax else directory.require(PHOTOMETRIC, "PhotometricInterpretation")
    photometric = directory.get(PHOTOMETRIC, photometric)
    if photometric in PHOTOMETRICS:
        raise InvalidImage(f"a TIFF whose samples are {PHOTOMETRICS[photometric]} is not read")
    return Layout(
        bits=bits[0],
        samples=samples,
        photometric=photometric,
        separate=directory.get(PLANAR, 1) == SEPARATE and samples > 1,
        order=file.order,
        differences=directory.get(PREDICTOR, 1) if directory.get(COMPRESSION, 1) in DIFFERENCED else 1,
        extra=tuple(directory.all(EXTRA_SAMPLES)),
        largest=max(directory.all(MAX_SAMPLE), default=0),
        colour_map=tuple(directory.all(COLOUR_MAP)),
    )


def _read_samples(file: File, directory: Directory, grid: Grid, layout: Layout) -> Pixels:
    height, width = directory.get(HEIGHT, 0), directory.get(WIDTH, 0)
    pixels = np.empty((height, width, 3), np.uint8)
    row_bytes = layout.row_bytes(grid.width)
    rows_at_once = max(1, BAND_BYTES // (row_bytes * grid.columns * grid.height))
    lines = max(1, CHUNK_SAMPLES // (grid.width * grid.columns * layout.samples))
    for first in range(0, grid.rows, rows_at_once):
        rows = range(first, min(first + rows_at_once, grid.rows))
        top, bottom = rows.start * grid.height, min(rows.stop * grid.height, height)
        planes = [
            decompressed(file, directory, grid, row_bytes, plane, rows, bottom - top)
            for plane in range(layout.planes_needed)
        ]
        for line in range(top, bottom, lines):
            chunk = line - top, min(line + lines, bottom) - top
            samples = [layout.unpack(rows_of(plane, *chunk), grid.width, width) for plane in planes]
            together = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=2)
            pixels[line : line + len(together)] = to_rgb(together, layout)
    return pixels


def _read_with_pillow(data: bytes) -> Pixels:
    """Read a picture whose pixels only libtiff can decode, of 1 or 8 bits."""
    with _StoredTiff(io.BytesIO(data)) as image:
        return rgb_of(image)


class _StoredTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF as it is stored: Pillow would turn it upright, by XMP too."""

    def load_end(self) -> None:
        pass
