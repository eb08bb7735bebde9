"""Directories and tags of a TIFF. Source: TIFF revision 6.0, BigTIFF, TIFF/EP, DNG 1.7."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.formats import InvalidImage

MAX_DIRECTORIES = 100
MAX_TAGS = 1_000
"""Most tags of one directory; real ones have tens."""
MAX_VALUES = 3 << 16
"""Most values of one tag: the colour map for 16 bits."""

SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
OLD_SUBFILE_TYPE, OLD_REDUCED = 255, 2
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, MAX_SAMPLE = 273, 274, 277, 278, 279, 281
PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 320, 322, 323, 324, 325
SUB_DIRECTORIES, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, DEPTH, DNG_VERSION = 330, 332, 338, 339, 32997, 50706

NEEDED = frozenset({
    SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES,
    ROWS_PER_STRIP, STRIP_BYTES, MAX_SAMPLE, PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS,
    TILE_BYTES, SUB_DIRECTORIES, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT, DEPTH, DNG_VERSION, OLD_SUBFILE_TYPE,
})  # fmt: skip
VALUES = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
"""Field types of unsigned integers."""
REDUCED, MASK = 1, 4
RAW_COMPRESSIONS = (262, 32767, 32769, 32770, 34713, 34892, 65000, 65535)
"""Compressions of Kodak, Sony, Epson, Samsung, Nikon, DNG, Kodak and Pentax."""
CFA, LINEAR_RAW = 32803, 34892


@dataclass(frozen=True)
class Directory:
    tags: Mapping[int, NDArray[np.unsignedinteger]]
    """Unsigned integer values of each tag; tags of other types are empty."""
    offset: int

    def get(self, tag: int, default: int) -> int:
        values = self.values(tag)
        return int(values[0]) if len(values) else default

    def values(self, tag: int) -> NDArray[np.unsignedinteger]:
        return self.tags.get(tag, np.empty(0, np.uint64))

    def all(self, tag: int) -> list[int]:
        return [int(value) for value in self.values(tag)[:MAX_VALUES]]

    def require(self, tag: int, name: str) -> int:
        if not len(self.values(tag)):
            raise InvalidImage(f"the TIFF has no {name}")
        return self.get(tag, 0)

    def is_reduced(self) -> bool:
        return bool(self.get(SUBFILE_TYPE, 0) & (REDUCED | MASK)) or self.get(OLD_SUBFILE_TYPE, 0) == OLD_REDUCED

    def is_raw(self) -> bool:
        return (
            DNG_VERSION in self.tags
            or self.get(PHOTOMETRIC, -1) in (CFA, LINEAR_RAW)
            or self.get(COMPRESSION, 1) in RAW_COMPRESSIONS
        )


@dataclass(frozen=True)
class File:
    data: bytes | bytearray
    order: str
    """Byte order, "<" or ">"."""
    big: bool

    @staticmethod
    def of(data: bytes | bytearray) -> "File":
        order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
        return File(data, order, 43 in data[2:4])

    def first(self) -> int:
        return self._number(8, "Q") if self.big else self._number(4, "I")

    def directory(self, offset: int) -> tuple[Directory, int]:
        """Return the directory, and the offset of the next one. Of a tag that is there twice, the first counts, as for
        other readers."""
        count, entry, size = (
            (self._number(offset, "Q"), "HHQ", 20) if self.big else (self._number(offset, "H"), "HHI", 12)
        )
        if count > MAX_TAGS:
            raise InvalidImage(f"the TIFF is damaged: a directory of {count:,} tags; at most {MAX_TAGS:,} are read")
        start, tags = offset + (8 if self.big else 2), {}
        for _ in range(count):
            self._number(start + size - 1, "B")
            tag, kind, length = struct.unpack_from(self.order + entry, self.data, start)
            if tag in NEEDED and tag not in tags:
                tags[tag] = self._values(kind, length, start + struct.calcsize(self.order + entry))
            start += size
        return Directory(tags, offset), self._number(start, "Q" if self.big else "I")

    def _values(self, kind: int, length: int, place: int) -> NDArray[np.unsignedinteger]:
        dtype = np.dtype(self.order + VALUES.get(kind, "u1"))
        if dtype.itemsize * length > (8 if self.big else 4):
            place = self._number(place, "Q" if self.big else "I")
        if kind not in VALUES or not length or place + dtype.itemsize * length > len(self.data):
            return np.empty(0, np.uint64)
        return np.frombuffer(self.data, dtype, length, place)

    def _number(self, place: int, kind: str) -> int:
        if place + struct.calcsize(kind) > len(self.data):
            raise InvalidImage("the TIFF is cut off or damaged: a directory lies beyond its end")
        return int(struct.unpack_from(self.order + kind, self.data, place)[0])

    def chain(self) -> Iterator[Directory]:
        offset, seen = self.first(), set[int]()
        while offset and offset not in seen and len(seen) < MAX_DIRECTORIES:
            seen.add(offset)
            try:
                directory, offset = self.directory(offset)
            except InvalidImage:
                if len(seen) == 1:
                    raise
                return  # the pictures before it are good
            yield directory

    def subs(self, directory: Directory) -> Iterator[Directory]:
        for offset in directory.all(SUB_DIRECTORIES)[:MAX_DIRECTORIES]:
            try:
                yield self.directory(offset)[0]
            except InvalidImage:
                return

    def starting_at(self, directory: Directory) -> bytes:
        """Return the file with this directory as its first."""
        if directory.offset == self.first():
            return bytes(self.data)
        header = bytes(self.data[: 8 if self.big else 4])
        header += struct.pack(self.order + ("Q" if self.big else "I"), directory.offset)
        return header + bytes(self.data[len(header) :])


def picture_in(file: File) -> Directory:
    chain = list(file.chain())
    subs = [sub for directory in chain for sub in file.subs(directory)][:MAX_DIRECTORIES]
    if any(directory.is_raw() for directory in chain + subs):
        raise InvalidImage(
            "this is a camera's raw file (DNG, NEF, ARW or the like), which is not read: develop it first"
        )
    if not chain:
        raise InvalidImage("the TIFF has no directory")
    whole = [directory for directory in chain + subs if not directory.is_reduced()]
    if not whole and len(chain + subs) > 1:
        raise InvalidImage("the TIFF holds reduced copies and masks, but no picture")
    return whole[0] if whole else chain[0]
