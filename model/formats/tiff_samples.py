"""Interpretation of a TIFF's samples: bytes of strips or tiles → samples → RGB."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.formats import InvalidImage
from model.types import Pixels

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, 6: 3, 8: 3}
"""Colour samples of each photometric interpretation; 6 is YCbCr, 8 Lab."""
PREMULTIPLIED = 1
Samples = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Layout:
    """The samples' layout, by the file's tags."""

    bits: int
    """Bits of each sample, 1 to 16."""
    samples: int
    photometric: int
    separate: bool
    """True: each sample has a plane of its own."""
    order: str
    """Byte order of 16-bit samples, "<" or ">"."""
    differences: int
    """Predictor: 2 if samples are differences from the left neighbour."""
    extra: tuple[int, ...]
    largest: int
    """MaxSampleValue; 0: it is missing."""
    colour_map: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.photometric not in COLOURS:
            raise InvalidImage(f"a TIFF of photometric interpretation {self.photometric} is not read")
        if self.samples < self.colours:
            raise InvalidImage(f"the TIFF has {self.samples} samples per pixel; its colours need {self.colours}")
        if self.differences not in (1, 2) or (self.differences == 2 and self.bits not in (8, 16)):
            raise InvalidImage(f"a TIFF with predictor {self.differences} at {self.bits} bits is not read")

    @property
    def colours(self) -> int:
        return COLOURS[self.photometric]

    @property
    def alpha(self) -> int | None:
        """Index of the alpha sample by which the colours were multiplied; None: there is none."""
        if PREMULTIPLIED not in self.extra or self.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            return None
        sample = self.colours + self.extra.index(PREMULTIPLIED)
        return sample if sample < self.samples else None

    @property
    def planes_needed(self) -> int:
        if not self.separate:
            return 1
        return self.colours if self.alpha is None else self.alpha + 1

    def row_bytes(self, width: int) -> int:
        return (width * (1 if self.separate else self.samples) * self.bits + 7) // 8

    def unpack(self, rows: NDArray[np.uint8], block_width: int, width: int) -> Samples:
        """Unpack bytes [rows, blocks × row_bytes] into samples [rows, width, samples in this plane]."""
        height, row_bytes = len(rows), self.row_bytes(block_width)
        blocks = rows.reshape(height, -1, row_bytes)
        count = block_width * (1 if self.separate else self.samples)
        samples: Samples
        if self.bits == 8:
            samples = blocks
        elif self.bits == 16:
            samples = blocks.view(self.order + "u2")
        else:
            samples = _unpack_bits(blocks, self.bits, count)
        samples = samples.reshape(height, blocks.shape[1], block_width, -1)
        if self.differences == 2:
            samples = np.cumsum(samples, axis=2, dtype=samples.dtype.newbyteorder("="))
        return samples.reshape(height, blocks.shape[1] * block_width, -1)[:, :width]


def _unpack_bits(blocks: NDArray[np.uint8], bits: int, count: int) -> Samples:
    """Unpack samples of any other number of bits, the highest bit first; each row begins at a whole byte."""
    if 8 % bits == 0:
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        return (blocks[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(*blocks.shape[:2], -1)[:, :, :count]
    first = np.arange(count) * bits
    padded = np.pad(blocks, ((0, 0), (0, 0), (0, 2)))
    value = np.zeros((*blocks.shape[:2], count), np.uint32)
    for byte in range(3):
        value = value << 8 | padded[:, :, first // 8 + byte]
    return (value >> (24 - bits - first % 8).astype(np.uint32) & (1 << bits) - 1).astype(np.uint16)


def to_rgb(samples: Samples, layout: Layout) -> Pixels:
    """Convert samples [H, W, S] to RGB [H, W, 3]. Alpha and other samples that are no colours are dropped."""
    colours = samples[:, :, : layout.colours]
    if layout.photometric == PALETTE:
        return _palette(layout)[colours[:, :, 0]]
    if layout.alpha is not None:
        alpha = samples[:, :, layout.alpha, None].astype(np.uint32)
        top = np.uint32((1 << layout.bits) - 1)
        colours = np.minimum(colours.astype(np.uint32) * top // np.maximum(alpha, 1), top)
    high = _eight_bits(colours, layout)
    if layout.photometric == WHITE_IS_ZERO:
        high = 255 - high
    if layout.photometric == CMYK:
        return np.asarray(Image.fromarray(np.ascontiguousarray(high), "CMYK").convert("RGB"))
    return np.repeat(high, 3, axis=2) if layout.colours == 1 else high


def _eight_bits(samples: Samples, layout: Layout) -> NDArray[np.uint8]:
    """Convert samples to 8 bits: fewer bits are scaled to the range, of more bits the high byte is kept.

    MaxSampleValue defines the range, if it has more than 8 bits and fewer than the samples.
    """
    count = 1 << layout.bits
    if layout.bits <= 8:
        spread = (np.arange(count) * 255 + (count - 1) // 2) // (count - 1)
        return samples.astype(np.uint8) if layout.bits == 8 else spread.astype(np.uint8)[samples]
    if 255 < layout.largest < count - 1:
        values = np.arange(count) * 256 // (layout.largest + 1)
        return np.minimum(values, 255).astype(np.uint8)[samples]
    return (samples >> (layout.bits - 8)).astype(np.uint8)


def _palette(layout: Layout) -> Pixels:
    size = 1 << layout.bits
    if len(layout.colour_map) < 3 * size:
        raise InvalidImage(f"the TIFF's colour map has {len(layout.colour_map)} values; {3 * size} are needed")
    colours = np.array(layout.colour_map[: 3 * size], np.uint16).reshape(3, size).T
    return (colours if colours.max() < 256 else colours >> 8).astype(np.uint8)  # some writers fill 8 of the 16 bits
