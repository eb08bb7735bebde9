"""Damaged pictures that OpenCV and Pillow decode alike are decoded alike here, or refused with a true reason.

Two readers that agree may still be wrong about what neither reads by the tags (see test_tiff); such files are not among
these seeds. What they agree on and we refuse must be damaged by the format's own words: the reason has to say so.
"""

import collections
import io
import itertools
import random
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from model import image
from model.formats.png import SIGNATURE
from model.image import InvalidImage
from model.types import Pixels
from tests.support.pictures import encode, picture
from tests.system.test_fuzz import mutants

MUTANTS = 250
"""Damaged pictures of each format."""
MAX_PIXELS = 100_000
SAME = 1.5
"""Mean difference in grey levels: readers round colours and upsampled chroma differently."""
REASONS = (
    "cut off", "damaged", "is not read", "are not read", "not an image", "pixels; at most", "has no ", "has more than",
    "unknown", "but no picture", "needed", "its colours need",
)  # fmt: skip


def seeds() -> dict[str, list[bytes]]:
    rgb, text, exif = Image.fromarray(picture(40, 60)), PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("workflow", random.Random(0).randbytes(3000).hex())  # so that much of the damage is in no pixel
    exif[0x010E] = "x" * 3000
    return {
        "JPEG": [
            encode(rgb, "JPEG", quality=85),
            encode(rgb, "JPEG", quality=85, exif=exif, comment=b"c" * 3000),
            encode(rgb, "JPEG", progressive=True, subsampling=0),
            encode(rgb.convert("L"), "JPEG", restart_marker_blocks=2),
        ],
        "PNG": [*(encode(rgb.convert(mode), "PNG", pnginfo=text) for mode in ("RGB", "P", "L"))],
        "WEBP": [encode(rgb, "WEBP", quality=80), encode(rgb, "WEBP", lossless=True)],
        "BMP": [encode(rgb.convert(mode), "BMP") for mode in ("RGB", "L", "P", "1")],
        "TIFF": [
            encode(rgb, "TIFF"),
            encode(rgb, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
            encode(rgb.convert("L"), "TIFF", compression="packbits"),
            encode(rgb, "TIFF", compression="jpeg"),
        ],
        "GIF": [encode(rgb.convert("P"), "GIF"), encode(rgb.convert("L"), "GIF", interlace=1)],
        "AVIF": [encode(rgb, "AVIF", quality=80)],
    }


def with_right_checksums(data: bytes) -> bytes:
    """Correct a PNG's checksums: otherwise they reveal nearly all damage, and it is never read."""
    out, position = SIGNATURE, len(SIGNATURE)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind_and_body = data[position + 4 : position + 8 + length]
        out += data[position : position + 4] + kind_and_body + zlib.crc32(kind_and_body).to_bytes(4, "big")
        position += 12 + length
    return out


def by_opencv(data: bytes) -> Pixels | None:
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if decoded is None else np.asarray(decoded, np.uint8)[:, :, ::-1]


def by_pillow(data: bytes) -> Pixels | None:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS or opened.mode.startswith(("I", "F")):
                return None
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except Exception:  # a boundary: Pillow raises nearly anything
        return None


def alike(one: Pixels, other: Pixels) -> bool:
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).mean() < SAME)


@pytest.mark.parametrize("file_format", seeds())
def test_what_two_readers_agree_on_is_read_alike_or_refused_with_a_true_reason(file_format: str) -> None:
    compare_readers(file_format, MUTANTS)


def compare_readers(file_format: str, count: int, seed: int = 0) -> collections.Counter[str]:
    """Read so many damaged files of a format; how many were read, and refused, of those that two readers agree on."""
    cv2.utils.logging.setLogLevel(0)
    seen: collections.Counter[str] = collections.Counter()
    for number, data in enumerate(itertools.islice(mutants(seeds()[file_format], random.Random(seed)), count)):
        if number % 2 and data.startswith(SIGNATURE):
            data = with_right_checksums(data)
        try:
            ours, reason = image.decode_image(data, max_pixels=MAX_PIXELS), ""
        except InvalidImage as error:
            ours, reason = None, str(error)
        first, second = by_opencv(data), by_pillow(data)
        if first is None or second is None or not alike(first, second):
            continue
        if ours is None:
            assert any(words in reason for words in REASONS), reason
            seen["refused"] += 1
        else:
            assert alike(ours, first) or alike(ours, second), data.hex()
            seen["read"] += 1
    assert seen["read"] > 0
    assert seen["refused"] <= seen["read"], seen
    return seen
