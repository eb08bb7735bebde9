"""JPEG: harmless oddities are read as OpenCV or Pillow read them, missing pixels are refused."""

import io
import random
import re
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from model.image import InvalidImage, decode_image
from model.types import Pixels
from tests.support.pictures import encode, picture

EOI = b"\xff\xd9"


def jpeg(**options: object) -> bytes:
    return encode(picture(120, 160), "JPEG", quality=90, **options)


def opencv(data: bytes) -> Pixels:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(decoded, np.uint8)[:, :, ::-1]


def before(marker: int, stray: bytes, data: bytes) -> bytes:
    place = data.index(bytes([0xFF, marker]))
    return data[:place] + stray + data[place:]


def segment(marker: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2 if length is None else length) + payload


ODD = {
    "a comment that says less than it has": before(0xDB, segment(0xFE, b"c" * 100, 42), jpeg()),
    "stray bytes before the tables": before(0xDB, b"abc", jpeg()),
    "stray bytes before the scan": before(0xDA, b"\0\xff\0zz", jpeg()),
    "stray bytes and a progressive scan": before(0xDB, b"ab", jpeg(progressive=True)),
    "12 bytes of padding before the end": jpeg()[:-2] + bytes(12) + EOI,
    "3,000 bytes of padding before the end": jpeg()[:-2] + bytes(3000) + EOI,
    "20 bytes of anything before the end": jpeg()[:-2] + random.Random(0).randbytes(20).replace(b"\xff", b"x") + EOI,
    "padding behind every scan": re.sub(rb"(?<!^)\xff(?=[\xc4\xda\xd9])", bytes(12) + b"\xff", jpeg(progressive=True)),
    "fill before every marker": before(0xDB, b"\xff\xff\xff", jpeg())[:-2] + b"\xff\xff" + EOI,
    "a JFIF version of the future": jpeg().replace(b"JFIF\0\1", b"JFIF\0\7"),
    "an unknown Adobe transform": before(0xDB, segment(0xEE, b"Adobe\0\x64" + bytes(4) + b"\x09"), jpeg()),
    "a sequential scan with the progression left out": jpeg().replace(b"\3\x11\0\x3f\0", b"\3\x11\0\0\0"),
    "restart markers in the header": before(0xDB, b"\xff\xd3", jpeg()),
    "broken EXIF, ICC and XMP": before(
        0xDB,
        segment(0xE1, b"Exif\0\0junk") + segment(0xE2, b"ICC_PROFILE\0\7\1x") + segment(0xE1, b"http://ns"),
        jpeg(),
    ),
    "a quantisation table in a segment of its own behind a thumbnail": before(
        0xDB, segment(0xE1, b"Exif\0\0" + encode(picture(8, 8), "JPEG")), jpeg()
    ),
    "many comments": before(0xDB, segment(0xFE, b"") * 3000, jpeg()),
}


@pytest.mark.parametrize("oddity", ODD)
def test_a_harmless_oddity_changes_no_pixel(oddity: str) -> None:
    np.testing.assert_array_equal(decode_image(ODD[oddity]), opencv(ODD[oddity]))
    np.testing.assert_allclose(decode_image(ODD[oddity]).astype(int), picture(120, 160), atol=40)


def resampled(sampling: tuple[int, int], data: bytes) -> bytes:
    """The header of a 4:4:4 grey-coded file that says another sampling: see `sampled`."""
    place = data.index(b"\xff\xc0")
    return data[: place + 11] + bytes([sampling[0] << 4 | sampling[1]]) + data[place + 12 :]


def sampled(across: int, down: int) -> bytes:
    """Colour with luma sampled across × down against chroma, for samplings that no writer at hand has a name for.

    The chroma is constant, so its blocks are all alike and empty but for the first, and a grey file's scan with an
    order of its own is enough: luma alone, as one component of a scan, then each chroma alone.
    """
    height, width = 120, 160
    grey = encode(Image.fromarray(picture(height, width)[:, :, 1]), "JPEG", quality=90)
    size = -(-height // (8 * down)) * 8, -(-width // (8 * across)) * 8
    flat = encode(Image.new("L", (size[1], size[0]), 160), "JPEG", quality=90)
    assert tables(grey) == tables(flat)
    frame = struct.pack(">BHHB", 8, height, width, 3)
    frame += bytes([1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0])
    scans = [
        segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + scan(data)
        for number, data in ((1, grey), (2, flat), (3, flat))
    ]
    return b"\xff\xd8" + tables(grey) + segment(0xC0, frame) + b"".join(scans) + EOI


def tables(data: bytes) -> bytes:
    quantisation, frame, huffman = data.index(b"\xff\xdb"), data.index(b"\xff\xc0"), data.index(b"\xff\xc4")
    return data[quantisation:frame] + data[huffman : data.index(b"\xff\xda")]


def scan(data: bytes) -> bytes:
    start = data.index(b"\xff\xda")
    return data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") : -2]


@pytest.mark.parametrize("sampling", [(3, 1), (1, 3), (3, 2), (4, 2), (2, 2), (1, 1)])
def test_any_sampling_is_read(sampling: tuple[int, int]) -> None:
    data = sampled(*sampling)
    np.testing.assert_array_equal(decode_image(data), opencv(data))


@pytest.mark.parametrize("megabytes", [0.001, 1, 14, 40])
def test_what_follows_the_end_does_not_count(megabytes: float) -> None:
    trailer = np.random.default_rng(0).bytes(int(megabytes * 2**20))
    np.testing.assert_array_equal(decode_image(jpeg() + trailer), decode_image(jpeg()))
    np.testing.assert_array_equal(decode_image(jpeg(progressive=True) + trailer), decode_image(jpeg(progressive=True)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_a_file_that_lacks_no_more_than_its_end_marker_is_read(options: dict[str, object]) -> None:
    data = jpeg(**options)
    np.testing.assert_array_equal(decode_image(data[:-2]), decode_image(data))
    np.testing.assert_array_equal(decode_image(data[:-1]), decode_image(data))


GREY = Image.fromarray(picture(120, 160)[:, :, 0])
WHOLE = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "restart": jpeg(restart_marker_blocks=3),
    "3 × 1": sampled(3, 1),
    "grey": encode(GREY, "JPEG"),
    "CMYK": encode(Image.fromarray(picture(120, 160)).convert("CMYK"), "JPEG", quality=90),
    "stray": ODD["stray bytes before the tables"],
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("end", [b"", EOI, EOI + bytes(1000)])
def test_missing_pixels_are_refused_wherever_the_file_is_cut(kind: str, end: bytes) -> None:
    data = WHOLE[kind]
    first = data.index(b"\xff\xda")
    cuts = random.Random(0).sample(range(first + 20, len(data) - 12), 25)
    scans = [place for place in range(first + 1, len(data)) if data[place : place + 2] == b"\xff\xda"]
    if not end:
        cuts += [each for scan in scans for each in (scan, scan + 5)]  # between two scans, and within a header
    for cut in cuts:
        kept = data[:cut].rstrip(b"\xff")
        if kind in ("progressive", "3 × 1") and end and any(scan - 400 < cut < scan + 20 for scan in scans):
            continue  # an end marker between two scans: a coarser picture, but a whole one
        with pytest.raises(InvalidImage, match="cut off"):
            decode_image(kept + end)


def test_a_scan_that_lost_its_place_is_refused() -> None:
    data = jpeg()
    middle = len(data) * 2 // 3
    with pytest.raises(InvalidImage, match="damaged"):
        decode_image(data[:middle] + b"\x5a" * 700 + data[middle:])


def test_scans_are_counted_in_the_jpeg_alone() -> None:
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 1000)
    np.testing.assert_array_equal(decode_image(before(0xDB, thumbnail, jpeg())), decode_image(jpeg()))
    np.testing.assert_array_equal(decode_image(jpeg() + b"\xff\xda" * 1000), decode_image(jpeg()))


def test_segments_without_end_are_refused_at_once() -> None:
    with pytest.raises(InvalidImage, match="segments"):
        decode_image(before(0xDB, segment(0xE1, b"Exif\0\0") * 100_000, jpeg()))


@pytest.mark.parametrize("orientation", [1, 6])
def test_only_exif_turns_a_jpeg(orientation: int) -> None:
    says_6 = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = before(0xDB, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + says_6), jpeg())
    np.testing.assert_array_equal(decode_image(data), decode_image(jpeg()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(decode_image(jpeg()), {1: 0, 6: 3}[orientation])
    np.testing.assert_array_equal(decode_image(before(0xE0, segment(0xE1, exif.tobytes()), data)), turned)


def test_of_two_exif_segments_the_first_counts() -> None:
    tags = []
    for orientation in (6, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        tags.append(segment(0xE1, exif.tobytes()))
    np.testing.assert_array_equal(decode_image(before(0xDB, b"".join(tags), jpeg())), np.rot90(decode_image(jpeg()), 3))


@pytest.mark.parametrize(("place", "value", "says"), [(4, 12, "12 bits per sample"), (9, 2, "2 components")])
def test_kinds_that_are_not_read_are_named(place: int, value: int, says: str) -> None:
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + place] = value
    with pytest.raises(InvalidImage, match=says):
        decode_image(bytes(data))


def test_pillow_and_opencv_agree_with_the_odd_samplings_made_here() -> None:
    data = sampled(3, 1)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image), opencv(data))
    assert np.abs(opencv(data)[:, :, 1].astype(int) - picture(120, 160)[:, :, 1]).mean() < 40
