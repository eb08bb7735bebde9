"""How many pixels a file claims: what Pillow reads off it, or nothing; and never more work than a bounded walk."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from model.formats.jpeg import decodes_soon
from model.formats.size import claimed_pixels
from tests.support.serving import picture


def encoded(kind: str, width: int, height: int, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0" + bytes(5000)}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
        ("TIFF", {}),
        ("AVIF", {}),
    ],
)
def test_the_claim_is_the_picture_s_size(kind: str, options: dict[str, object]) -> None:
    assert claimed_pixels(encoded(kind, 123, 77, **options)) == 123 * 77


def test_a_gif_s_frame_may_reach_beyond_its_screen() -> None:
    data = bytearray(encoded("GIF", 123, 77))
    data[6:10] = struct.pack("<HH", 8, 8)
    with Image.open(io.BytesIO(data)) as image:
        assert claimed_pixels(data) == image.width * image.height == 123 * 77


def test_of_a_tiff_with_several_pictures_nothing_is_claimed() -> None:
    first = Image.new("RGB", (8, 8))
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=[Image.new("RGB", (900, 900))])
    assert claimed_pixels(buffer.getvalue()) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_a_file_that_is_cut_off_anywhere_claims_its_size_or_nothing(kind: str) -> None:
    data = encoded(kind, 20, 10)
    for length in range(min(len(data), 700)):
        assert claimed_pixels(data[:length]) in (None, 200)


def test_what_is_no_picture_claims_nothing() -> None:
    assert claimed_pixels(b"") is None
    assert claimed_pixels(b"no picture") is None
    assert claimed_pixels(b"\xff\xd8" + b"\xff\x01" * 100_000) is None, "the walk is bounded"
    assert claimed_pixels(b"\xff\xd8" + b"\xff\xe1\0\x02" * 100_000) is None


@pytest.mark.parametrize(
    ("data", "soon"),
    [
        (picture(200, 100, kind="JPEG"), True),
        (encoded("JPEG", 64, 64, progressive=True), True),
        (picture(200, 100), False),
        (b"\xff\xd8" + b"\xff\x01" * 100_000, True),
        (b"\xff\xd8 cut off", True),
        (b"", False),
    ],
    ids=[
        "sequential",
        "progressive",
        "PNG",
        "markers without end: refused at once",
        "damaged: refused at once",
        "empty",
    ],
)
def test_a_jpeg_whose_pixels_times_scans_are_few_is_decoded_soon(data: bytes, soon: bool) -> None:
    assert decodes_soon(data) == soon


def test_a_large_jpeg_of_many_scans_is_not_decoded_soon() -> None:
    data = bytearray(encoded("JPEG", 64, 64, progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 5000, 5000)
    assert not decodes_soon(bytes(data))
