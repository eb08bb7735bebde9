"""A file's claim is what Pillow reads, or nothing, and never takes more than a bounded walk."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.formats.claim import BYTES_PER_PIXEL, Claim, claim_of
from model.image import InvalidImage, TooManyPixels, decode_image, decode_soon
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
    claim = claim_of(encoded(kind, 123, 77, **options))
    assert (claim.format, claim.size, claim.pixels) == (kind, (77, 123), 123 * 77)


def test_a_gif_s_frame_may_reach_beyond_its_screen() -> None:
    data = bytearray(encoded("GIF", 123, 77))
    data[6:10] = struct.pack("<HH", 8, 8)
    with Image.open(io.BytesIO(data)) as image:
        assert claim_of(data).size == (image.height, image.width) == (77, 123)


def test_of_a_tiff_with_several_pictures_nothing_is_claimed() -> None:
    first = Image.new("RGB", (8, 8))
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=[Image.new("RGB", (900, 900))])
    assert claim_of(buffer.getvalue()) == Claim("TIFF")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_a_file_that_is_cut_off_anywhere_claims_its_size_or_nothing(kind: str) -> None:
    data = encoded(kind, 20, 10)
    for length in range(min(len(data), 700)):
        assert claim_of(data[:length]).size in (None, (10, 20))


def test_what_is_no_picture_costs_nothing() -> None:
    for data in (b"", b"no picture"):
        assert claim_of(data) == Claim(None, pixels=0)
        assert claim_of(data).decode_bytes(10**6) == 0, "it is refused by its first bytes"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xe0" + b"\0\x02\xff\x01" * 100_000,
        b"\xff\xd8\xff\xe1" + b"\0\x02\xff\xe1" * 100_000,
        b"\xff\xd8\xff\xe1\0\x02" + b"\xff\0" * 100_000 + encoded("JPEG", 20, 10)[2:],
        encoded("GIF", 1, 1)[:13] + b"\0\0\0\xff\xff\xff!\xfe" + b"\1a" * 100_000 + b"\0",
    ],
    ids=["markers", "segments", "stray bytes", "a GIF's comments"],
)
def test_the_walk_is_bounded(data: bytes) -> None:
    assert claim_of(data) == Claim({b"\xff": "JPEG", b"G": "GIF"}[data[:1]])


def test_who_says_nothing_may_cost_the_most() -> None:
    claim = Claim("TIFF")
    assert (claim.pixels_allowed(1000), claim.decode_bytes(1000)) == (1000, 1000 * BYTES_PER_PIXEL)


def test_a_picture_larger_than_allowed_costs_what_the_largest_does() -> None:
    claim = claim_of(picture(100, 50))
    assert (claim.pixels_allowed(1000), claim.decode_bytes(1000)) == (1000, 1000 * BYTES_PER_PIXEL), "it is refused"


@pytest.mark.parametrize(
    ("options", "costs"),
    [
        ({}, 8),
        ({"progressive": True}, 18),
    ],
)
def test_a_jpeg_that_holds_coefficients_costs_more(options: dict[str, object], costs: int) -> None:
    assert claim_of(encoded("JPEG", 100, 50, **options)).decode_bytes(10**6) == costs * 5000


@pytest.mark.parametrize(
    ("shape", "options"),
    [((100, 100, 3), {"tile": (256, 256)}), ((40, 40, 8), {"photometric": "rgb", "planarconfig": "contig"})],
    ids=["tiles reach beyond the picture", "samples besides the colours"],
)
def test_a_tiff_claims_what_its_blocks_take_and_is_decoded_within_that(
    shape: tuple[int, ...], options: dict[str, object]
) -> None:
    file = io.BytesIO()
    dtype = np.uint16 if shape[2] > 3 else np.uint8
    tifffile.imwrite(file, np.zeros(shape, dtype), metadata=None, **options)
    claim, data = claim_of(file.getvalue()), file.getvalue()
    assert claim.size == shape[:2]
    assert claim.pixels is not None and claim.pixels > shape[0] * shape[1]
    assert decode_image(data, max_pixels=claim.pixels).shape == (*shape[:2], 3)
    with pytest.raises(TooManyPixels):
        decode_image(data, max_pixels=claim.pixels - 1)


def test_a_tiff_of_many_strips_claims_their_lists() -> None:
    """100,000 strips of 8 pixels held 85 MiB: 300 bytes each, besides the pixels."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((2000, 8), np.uint8), rowsperstrip=1, metadata=None)
    claim = claim_of(file.getvalue())
    assert claim.decode_bytes(50_000_000) >= 2000 * (250 + 8)
    assert decode_image(file.getvalue(), max_pixels=16_000).shape == (2000, 8, 3)


@pytest.mark.parametrize(
    ("data", "soon"),
    [
        (picture(200, 100, kind="JPEG"), True),
        (encoded("JPEG", 64, 64, progressive=True), True),
        (picture(200, 100), False),
        (b"\xff\xd8" + b"\xff\x01" * 100_000, True),
        (b"\xff\xd8\xff cut off", True),
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
    try:
        found = decode_soon(data)
    except InvalidImage:
        assert soon
    else:
        assert (found is not None) == soon


def test_a_large_jpeg_of_many_scans_is_not_decoded_soon() -> None:
    data = bytearray(encoded("JPEG", 64, 64, progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 5000, 5000)
    assert decode_soon(data) is None
