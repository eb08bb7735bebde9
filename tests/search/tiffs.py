"""TIFFs of any grid of strips or tiles, samples, compression and directories; blocks may share their bytes."""

import lzma
import struct
import zlib
from functools import cache

from model.formats import tiff_tags as tag
from tests.search.climb import Genes

PLAIN: Genes = {
    "samples": 1, "bits": 2, "planar": 0, "predictor": 1, "compression": 2, "photometric": 1, "shared": 1,
    "extra_directories": 0, "subdirectories": 0, "noughts": 0,
}  # fmt: skip
STARTS: tuple[Genes, ...] = (
    PLAIN | {"width": 1, "height": 1, "tiled": 1, "block_width": 46_000, "block_height": 2_900},
    PLAIN | {"width": 80_000, "height": 1, "tiled": 1, "block_width": 16, "block_height": 10**6},
    PLAIN | {"width": 7_000, "height": 10**5, "tiled": 0, "block_height": 10**5, "samples": 3, "photometric": 0},
    PLAIN | {"width": 1, "height": 10**5, "tiled": 0, "block_height": 1, "compression": 4},
)
"""A tile larger than the picture, many tall ones, one large strip, many small ones."""
RANGES = {
    "width": (1, 100_000), "height": (1, 100_000), "tiled": (0, 1), "block_width": (1, 60_000),
    "block_height": (1, 1_000_000), "samples": (1, 16), "bits": (0, 4), "planar": (0, 1), "predictor": (1, 2),
    "compression": (0, 6), "photometric": (0, 5), "shared": (0, 1), "extra_directories": (0, 120),
    "subdirectories": (0, 120), "noughts": (0, 2**18),
}  # fmt: skip
BITS = (1, 4, 8, 12, 16)
COMPRESSIONS = (1, 5, 8, 32773, 34925, 4, 7)
PHOTOMETRICS = (2, 1, 0, 3, 5, 6)
SHORT, LONG = 3, 4
MAX_BLOCKS = 500_000
MAX_BLOCK_BYTES = 2**27


def build(genes: Genes, max_pixels: int) -> bytes:
    width = genes["width"]
    height = min(genes["height"], max(1, max_pixels // width))
    tiled, samples, bits = bool(genes["tiled"]), genes["samples"], BITS[genes["bits"]]
    block_width = genes["block_width"] if tiled else width
    block_height = genes["block_height"] if tiled else min(genes["block_height"], height)
    planes = samples if genes["planar"] else 1
    count = min(-(-width // block_width) * -(-height // block_height) * planes, MAX_BLOCKS)
    row_bytes = (block_width * (1 if genes["planar"] else samples) * bits + 7) // 8
    compression = COMPRESSIONS[genes["compression"]]
    block = _packed(min(row_bytes * block_height, MAX_BLOCK_BYTES), compression) + bytes(genes["noughts"])
    blocks = 1 if genes["shared"] else min(count, max(1, 10**7 // len(block)))
    offsets = [8 + (number % blocks) * len(block) for number in range(count)]
    entries = {
        tag.WIDTH: [width], tag.HEIGHT: [height], tag.BITS: [bits] * samples, tag.COMPRESSION: [compression],
        tag.PHOTOMETRIC: [PHOTOMETRICS[genes["photometric"]]], tag.SAMPLES: [samples],
        tag.PLANAR: [1 + genes["planar"]], tag.PREDICTOR: [genes["predictor"]],
        (tag.TILE_OFFSETS if tiled else tag.STRIP_OFFSETS): offsets,
        (tag.TILE_BYTES if tiled else tag.STRIP_BYTES): [len(block)] * count,
    }  # fmt: skip
    entries |= {tag.TILE_WIDTH: [block_width], tag.TILE_HEIGHT: [block_height]} if tiled else {}
    entries |= {} if tiled else {tag.ROWS_PER_STRIP: [block_height]}
    return _file(block * blocks, entries, genes["extra_directories"], genes["subdirectories"])


def _file(blocks: bytes, entries: dict[int, list[int]], extra: int, subs: int) -> bytes:
    """The blocks, the lists, then a chain of directories with the same tags; the first has sub-directories."""
    data = bytearray(b"II*\0" + bytes(4) + blocks)
    packed = []
    for name, values in sorted(entries.items()):
        packed.append(struct.pack("<HHII", name, LONG, len(values), values[0] if len(values) == 1 else len(data)))
        if len(values) > 1:
            data += struct.pack(f"<{len(values)}I", *values)
    data[4:8] = struct.pack("<I", len(data))
    for number in range(extra + 1):
        size = 2 + 12 * len(packed) + 4
        directory = struct.pack("<H", len(packed)) + b"".join(packed)
        if number == 0 and subs:
            own, size = [struct.pack("<HHII", tag.SUB_DIRECTORIES, LONG, 1, len(data))] * subs, size + 12 * subs
            directory = struct.pack("<H", len(packed) + subs) + b"".join([*packed, *own])
        data += directory + struct.pack("<I", len(data) + size if number < extra else 0)
    return bytes(data)


@cache
def _packed(size: int, compression: int) -> bytes:
    """Noughts, compressed as far as that goes; of a rounded number, so that few are compressed."""
    size = 1 << size.bit_length()
    if compression == 8:
        return zlib.compress(bytes(size), 6)
    if compression == 34925:
        return lzma.compress(bytes(min(size, 2**24)), preset=0)
    if compression == 32773:
        return b"\x81\0" * (-(-size // 128))
    return bytes(min(size, 10**6))
