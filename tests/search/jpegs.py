"""JPEGs of any number of scans, segments, markers and stray bytes."""

from functools import cache

import numpy as np
from PIL import Image

from model.formats.jpeg import DRI, SOI, SOS, Segment, parse
from tests.search.climb import Genes
from tests.support.pictures import encode

STARTS: tuple[Genes, ...] = (
    {"width": 2_000, "height": 65_500, "components": 2, "progressive": 1, "noise": 0, "scans": 199, "segments": 0},
    {"width": 8, "height": 8, "segments": 4_900, "segment_bytes": 8, "markers": 0, "stray_bytes": 0},
)
"""Scans, and Exif segments, without end."""
RANGES = {
    "width": (1, 65_500), "height": (1, 65_500), "components": (0, 2), "sampling": (0, 2), "progressive": (0, 1),
    "noise": (0, 1), "scans": (1, 300), "segments": (0, 6_000), "segment_bytes": (0, 65_533), "markers": (0, 6_000),
    "stray_bytes": (0, 2**20), "behind_scans": (0, 64), "trailer": (0, 2**20), "restart": (0, 64),
}  # fmt: skip

MAX_SCAN_BYTES = 16 * 2**20
MAX_WRITTEN_PIXELS = 1_000_000
"""A larger frame is claimed, and its scans end early."""


def build(genes: Genes, max_pixels: int) -> bytes:
    width = genes["width"]
    height = min(genes["height"], max(1, max_pixels // width))
    written = min(height, max(1, MAX_WRITTEN_PIXELS // width))
    base = _base(width, written, genes["components"], genes["sampling"], genes["progressive"], genes["noise"])
    head: list[Segment] = []
    scans: list[Segment] = []
    for segment in parse(base).segments:
        (scans if segment.marker == SOS else head).append(segment)
    fit = MAX_SCAN_BYTES // max(1, *(len(scan.scan) for scan in scans))
    scans = (scans * -(-genes["scans"] // len(scans)))[: max(1, min(genes["scans"], fit))]
    head = [_resized(segment, height) for segment in head]
    if genes["restart"]:
        head.append(Segment(DRI, genes["restart"].to_bytes(2, "big")))
    extra = bytes(Segment(0xE1, (b"Exif\0\0" + bytes(65_533))[: genes["segment_bytes"]])) * genes["segments"]
    extra += b"\xff\x01" * genes["markers"] + b"\xff\0" * (genes["stray_bytes"] // 2)
    stray = bytes(genes["behind_scans"])
    body = b"".join(map(bytes, head)) + b"".join(bytes(scan) + stray for scan in scans)
    return b"\xff%c" % SOI + extra + body + b"\xff\xd9" + b"\xff\xda" * (genes["trailer"] // 2)


@cache
def _base(width: int, height: int, components: int, sampling: int, progressive: int, noise: int) -> bytes:
    channels = (1, 3, 4)[components]
    pixels = np.random.default_rng(0).integers(0, 256 if noise else 1, (height, width, channels)).astype(np.uint8)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, {1: "L", 3: "RGB", 4: "CMYK"}[channels])
    options: dict[str, object] = {"progressive": bool(progressive), "quality": 60}
    if channels == 3:
        options["subsampling"] = sampling
    return encode(image, "JPEG", **options)


def _resized(segment: Segment, height: int) -> Segment:
    if not segment.is_frame():
        return segment
    payload = segment.payload[:1] + height.to_bytes(2, "big") + segment.payload[3:]
    return Segment(segment.marker, payload)
