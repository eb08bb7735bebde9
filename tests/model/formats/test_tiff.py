"""TIFF: what the tags say decides. tifffile writes and reads samples; what they mean is written down here once more."""

import io
import itertools
import struct
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from model.image import InvalidImage, TooManyPixels, decode_image
from model.types import Pixels
from tests.support.pictures import encode, picture

SHORT, LONG = 3, 4


def tiff(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def directory(tags: dict[int, int | tuple[int, ...]], following: int, place: int, order: str = "<") -> bytes:
    """One directory by hand at `place`, LONGs; lists lie behind it."""
    lists, head = b"", struct.pack(order + "H", len(tags))
    behind = place + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            lists, packed = lists + packed, struct.pack(order + "I", behind + len(lists))
        head += struct.pack(order + "HHI", tag, LONG, len(values)) + packed
    return head + struct.pack(order + "I", following) + lists


def by_hand(*directories: dict[int, Any], blocks: bytes = b"", chained: int = 1) -> bytes:
    """A little-endian file: header, blocks at byte 8, the directories; the first `chained` are its chain."""
    places, place = [], 8 + len(blocks)
    unplaced = (0,) * (len(directories) - chained)
    for tags in ({tag: unplaced if value == "subs" else value for tag, value in each.items()} for each in directories):
        places.append(place)
        place += len(directory(tags, 0, 0))
    subs = tuple(places[chained:])
    body = b""
    for number, tags in enumerate(directories):
        following = places[number + 1] if number + 1 < chained else 0
        own = {tag: subs if value == "subs" else value for tag, value in tags.items()}
        body += directory(own, following, places[number])
    return b"II*\0" + struct.pack("<I", places[0]) + blocks + body


def grey(width: int, height: int, offset: int, **more: int) -> dict[int, int | tuple[int, ...]]:
    names = {"subfile_type": 254, "compression": 259, "photometric": 262, "old_type": 255, "dng": 50706}
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: offset, 277: 1, 278: height, 279: width * height}
    return tags | {names[name]: value for name, value in more.items()}


def expected(samples: np.ndarray, photometric: str, bits: int) -> Pixels:
    """Samples [H, W, S] → RGB, after TIFF 6.0: the high byte, ink for WhiteIsZero and CMYK."""
    high = (samples.astype(int) >> (bits - 8)) if bits >= 8 else samples.astype(int) * 255 // ((1 << bits) - 1)
    if photometric == "separated":
        return np.asarray(Image.fromarray(high[:, :, :4].astype(np.uint8), "CMYK").convert("RGB"))
    if photometric == "rgb":
        return high[:, :, :3].astype(np.uint8)
    level = 255 - high[:, :, 0] if photometric == "miniswhite" else high[:, :, 0]
    return np.stack([level] * 3, axis=2).astype(np.uint8)


KINDS = list(
    itertools.product(
        ["uint8", "uint16"],
        ["miniswhite", "minisblack", "rgb", "separated"],
        ["contig", "separate"],
        [None, "zlib"],
        ["strips", "tiles"],
    )
)


@pytest.mark.parametrize(("kind", "photometric", "planes", "compression", "blocks"), KINDS)
def test_every_kind_is_read_as_its_tags_say(
    kind: str, photometric: str, planes: str, compression: str | None, blocks: str
) -> None:
    rng = np.random.default_rng(0)
    colours = {"rgb": 3, "separated": 4}.get(photometric, 1)
    for order, extra, predictor in itertools.product("<>", (0, 2), (False, True)):
        if (predictor and compression != "zlib") or (colours + extra == 1 and planes == "separate"):
            continue
        samples = rng.integers(0, np.iinfo(kind).max + 1, (37, 53, colours + extra)).astype(kind)
        options: dict[str, Any] = {"tile": (16, 32)} if blocks == "tiles" else {"rowsperstrip": 7}
        if colours + extra > 1:
            options |= {"planarconfig": planes, "extrasamples": [0] * extra or None}
        stored = np.moveaxis(samples, 2, 0) if planes == "separate" else samples
        data = tiff(
            stored if colours + extra > 1 else samples[:, :, 0],
            photometric=photometric, compression=compression, predictor=predictor or None, byteorder=order, **options,
        )  # fmt: skip
        np.testing.assert_array_equal(decode_image(data), expected(samples, photometric, samples.itemsize * 8))


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_every_lossless_compression_is_undone(compression: str, predictor: int) -> None:
    data = encode(picture(), "TIFF", compression=compression, tiffinfo={317: predictor})
    np.testing.assert_array_equal(decode_image(data), picture())


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_odd_numbers_of_bits_are_spread_over_the_range(bits: int, photometric: str, order: str) -> None:
    colours = 3 if photometric == "rgb" else 1
    samples = np.random.default_rng(0).integers(0, 1 << bits, (17, 23, colours)).astype("u1" if bits <= 8 else "u2")
    # Packed here: tifffile writes odd bits only with a codec library that is not needed for anything else.
    rows = [np.array([list(f"{value:0{bits}b}") for value in row.ravel()]).astype(np.uint8) for row in samples]
    packed = b"".join(np.packbits(row.ravel()).tobytes() for row in rows)
    code = {"miniswhite": 0, "minisblack": 1, "rgb": 2}[photometric]
    tags: dict[int, int | tuple[int, ...]] = {
        256: 23, 257: 17, 258: (bits,) * colours, 259: 1, 262: code, 273: 8, 277: colours, 278: 17, 279: len(packed),
    }  # fmt: skip
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory(tags, 0, 8 + len(packed))
    if order == ">":  # samples of odd bits are a stream, which has no order of bytes
        data = b"MM\0*" + struct.pack(">I", 8 + len(packed)) + packed + directory(tags, 0, 8 + len(packed), ">")
    np.testing.assert_array_equal(decode_image(data), expected(samples, photometric, bits))


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
@pytest.mark.parametrize("bits", [11, 12])
def test_of_16_bit_samples_the_range_counts_that_the_file_declares(photometric: str, bits: int) -> None:
    colours = 3 if photometric == "rgb" else 1
    samples = np.random.default_rng(0).integers(0, 1 << bits, (20, 30, colours)).astype("u2")
    largest = (281, "H", colours, ((1 << bits) - 1,) * colours if colours > 1 else (1 << bits) - 1, True)
    data = tiff(samples if colours > 1 else samples[:, :, 0], photometric=photometric, extratags=[largest])
    np.testing.assert_array_equal(decode_image(data), expected(samples, photometric, bits))


def test_the_declared_range_of_8_bit_samples_is_statistics() -> None:
    data = tiff(picture()[:, :, 0], photometric="minisblack", extratags=[(281, "H", 1, 100, True)])
    np.testing.assert_array_equal(decode_image(data)[:, :, 0], picture()[:, :, 0])


def test_opencv_reads_the_negative_and_the_planes_alike() -> None:
    samples = cv2.resize(picture(), (53, 37)).astype("u2") * 257
    for data in (
        tiff(samples[:, :, 0], photometric="miniswhite"),
        tiff(np.moveaxis(samples, 2, 0), photometric="rgb", planarconfig="separate"),
    ):
        by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(decode_image(data), by_opencv[:, :, ::-1])


def test_of_a_tag_that_is_there_twice_the_first_counts() -> None:
    samples = picture()[:, :, 0]
    data = by_hand(grey(80, 60, 8), blocks=samples.tobytes())
    rows, width = struct.pack("<HH", 278, LONG), struct.pack("<HH", 256, LONG)
    assert data.count(rows) == 1
    twice = data.replace(rows, width)  # 80, then 60
    with Image.open(io.BytesIO(twice)) as by_pillow:
        assert np.array_equal(decode_image(twice)[:, :, 0], np.asarray(by_pillow))
    assert np.array_equal(decode_image(twice)[:, :, 0], samples)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_uncompressed_ycbcr_is_read_by_its_subsampling(subsampling: tuple[int, int]) -> None:
    across, down = subsampling
    y, red, blue = cv2.split(cv2.cvtColor(picture(), cv2.COLOR_RGB2YCrCb))
    small = [cv2.resize(plane, (80 // across, 60 // down), interpolation=cv2.INTER_AREA) for plane in (blue, red)]
    luma = y.reshape(60 // down, down, 80 // across, across).swapaxes(1, 2).reshape(60 // down, 80 // across, -1)
    blocks = np.concatenate([luma, *(plane[:, :, None] for plane in small)], axis=2).tobytes()
    tags = grey(80, 60, 8) | {258: (8, 8, 8), 262: 6, 277: 3, 279: len(blocks), 530: 0}
    tags.pop(530)
    data = by_hand(tags, blocks=blocks)
    # YCbCrSubSampling is a pair of SHORTs in place.
    start = int.from_bytes(data[4:8], "little")
    entries = [data[start + 2 + 12 * n : start + 14 + 12 * n] for n in range(len(tags))]
    entries.append(struct.pack("<HHIHH", 530, SHORT, 2, across, down))
    lists = data[start + 2 + 12 * len(tags) + 4 :]
    moved = [
        e if e[:2] != b"\x02\x01" else e[:8] + struct.pack("<I", start + 2 + 12 * len(entries) + 4) for e in entries
    ]
    data = data[:start] + struct.pack("<H", len(entries)) + b"".join(moved) + bytes(4) + lists
    by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(decode_image(data).astype(int) - by_opencv).max() <= 1
    assert np.abs(decode_image(data).astype(int) - picture()).mean() < 5


def test_colours_multiplied_by_alpha_are_divided_by_it() -> None:
    alpha = np.random.default_rng(0).integers(1, 256, (60, 80, 1))
    stored = np.concatenate([picture() * alpha // 255, alpha], axis=2).astype(np.uint8)
    found = decode_image(tiff(stored, photometric="rgb", extrasamples=["assocalpha"])).astype(int)
    assert (np.abs(found - picture()) <= 255 / alpha + 1).all()
    unassociated = tiff(stored, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(decode_image(unassociated), stored[:, :, :3])


@pytest.mark.parametrize("largest", [65535, 255])
def test_a_palette_is_read_whether_its_colours_have_16_bits_or_8(largest: int) -> None:
    rng = np.random.default_rng(0)
    colours, indexes = rng.integers(0, largest + 1, (3, 256)).astype("u2"), rng.integers(0, 256, (20, 30)).astype("u1")
    data = tiff(indexes, photometric="palette", colormap=colours)
    high = colours >> 8 if largest > 255 else colours
    np.testing.assert_array_equal(decode_image(data), high.T[indexes].astype(np.uint8))


def test_lab_is_read_as_pillow_reads_it() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(picture()), *profiles, outputMode="LAB")
    assert lab is not None
    assert np.abs(decode_image(encode(lab, "TIFF")).astype(int) - picture()).mean() < 2


@pytest.mark.parametrize("kind", ["int8", "int16", "float16", "float32", "uint32", "complex64"])
def test_samples_of_unknown_range_are_refused(kind: str) -> None:
    with pytest.raises(InvalidImage, match="range is unknown"):
        decode_image(tiff(np.zeros((8, 8), kind), photometric="minisblack"))


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({262: 32844}, "LogL"),
        ({262: 9}, "ICC Lab"),
        ({262: 4}, "a transparency mask"),
        ({262: 77}, "photometric interpretation 77"),
        ({259: 34712}, "JPEG 2000"),
        ({259: 50001}, "WebP"),
        ({259: 4711}, "method 4711"),
        ({277: 3, 258: (8, 8, 16), 262: 2}, r"\[8, 8, 16\] bits"),
        ({277: 2, 262: 2}, "2 samples per pixel; its colours need 3"),
        ({277: 200}, "200 samples"),
        ({32997: 5}, "several depths"),
    ],
)
def test_what_is_not_read_is_refused_with_the_reason(tags: dict[int, int | tuple[int, ...]], says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        decode_image(by_hand(grey(8, 8, 8) | tags, blocks=bytes(64)))


def test_a_file_that_does_not_say_what_its_samples_mean_is_refused() -> None:
    tags = grey(8, 8, 8)
    del tags[262]
    with pytest.raises(InvalidImage, match="has no PhotometricInterpretation"):
        decode_image(by_hand(tags, blocks=bytes(64)))


# Which directory is the picture

BLOCKS = bytes([10]) * 16 + bytes([200]) * 64


def levels(data: bytes) -> tuple[tuple[int, ...], int]:
    pixels = decode_image(data)
    return pixels.shape[:2], int(pixels.max())


@pytest.mark.parametrize("mark", [{"subfile_type": 1}, {"subfile_type": 4}, {"subfile_type": 5}, {"old_type": 2}])
@pytest.mark.parametrize("chained", [1, 2])
def test_reduced_copies_and_masks_are_skipped(mark: dict[str, int], chained: int) -> None:
    first: dict[int, Any] = grey(4, 4, 8, **mark)
    data = by_hand(first | ({} if chained == 2 else {330: "subs"}), grey(8, 8, 24), blocks=BLOCKS, chained=chained)
    assert levels(data) == ((8, 8), 200)


def test_a_picture_before_its_reduced_copies_is_the_picture() -> None:
    assert levels(by_hand(grey(8, 8, 24), grey(4, 4, 8, subfile_type=1), blocks=BLOCKS, chained=2)) == ((8, 8), 200)


def test_a_lone_reduced_copy_is_all_there_is() -> None:
    assert levels(by_hand(grey(4, 4, 8, subfile_type=1), blocks=BLOCKS)) == ((4, 4), 10)


def test_reduced_copies_without_a_picture_are_refused() -> None:
    copies = grey(4, 4, 8, subfile_type=1), grey(8, 8, 24, subfile_type=1)
    with pytest.raises(InvalidImage, match="no picture"):
        decode_image(by_hand(*copies, blocks=BLOCKS, chained=2))


@pytest.mark.parametrize(
    ("preview", "raw"),
    [
        ({"subfile_type": 1}, {"photometric": 32803}),  # TIFF/EP: NEF, ARW, PEF and most others
        ({}, {"photometric": 32803}),
        ({}, {"photometric": 34892}),
        ({}, {"compression": 34713}),
        ({"dng": 1}, {}),
        ({"subfile_type": 1, "dng": 1}, {"photometric": 1}),
        ({"photometric": 32803}, {}),
    ],
)
@pytest.mark.parametrize("chained", [1, 2])
def test_a_raw_file_is_refused_by_name_whatever_preview_it_keeps(
    preview: dict[str, int], raw: dict[str, int], chained: int
) -> None:
    first: dict[int, Any] = grey(4, 4, 8, **preview)
    data = by_hand(
        first | ({} if chained == 2 else {330: "subs"}), grey(8, 8, 24, **raw), blocks=BLOCKS, chained=chained
    )
    with pytest.raises(InvalidImage, match="raw file"):
        decode_image(data)


def test_only_the_orientation_tag_turns_a_tiff() -> None:
    says_6 = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for compression in (None, "zlib"):
        data = tiff(
            picture(), photometric="rgb", compression=compression, extratags=[(700, "B", len(says_6), says_6, True)]
        )
        np.testing.assert_array_equal(decode_image(data), picture())
    jpeg = Image.Exif()
    jpeg[0x0112] = 6
    data = encode(picture(), "TIFF", compression="jpeg", exif=jpeg)
    assert np.abs(decode_image(data).astype(int) - np.rot90(picture(), 3)).mean() < 6


# Hostile files


def test_the_blocks_count_not_only_the_picture() -> None:
    tags = grey(1, 1, 8) | {322: 46_000, 323: 46_000, 324: 8, 325: 64}
    del tags[273], tags[278], tags[279]
    with pytest.raises(TooManyPixels, match="tiles"):
        decode_image(by_hand(tags, blocks=bytes(64)))


def test_a_strip_of_many_samples_counts_by_its_bytes() -> None:
    tags = grey(60, 80, 8) | {258: (16,) * 16, 277: 16, 262: 2, 279: 60 * 80 * 32}
    data = by_hand(tags, blocks=bytes(60 * 80 * 32))
    assert decode_image(data).shape == (80, 60, 3)
    with pytest.raises(TooManyPixels, match="smaller strips"):
        decode_image(data, max_pixels=60 * 80)


def test_strips_that_share_their_bytes_are_not_copied_without_end() -> None:
    tags = grey(4000, 4000, 8) | {259: 8, 278: 1, 273: (8,) * 4000, 279: (1_000_000,) * 4000}
    with pytest.raises(InvalidImage, match="overlap"):
        decode_image(by_hand(tags, blocks=bytes(1_000_000)))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_pixels_that_are_missing_are_missed(compression: str | None) -> None:
    data = tiff(picture(), photometric="rgb", compression=compression, rowsperstrip=7, byteorder="<")
    start = data.index(struct.pack("<H", 273))
    place = struct.unpack_from("<I", data, start + 8)[0]
    last = place + 4 * 8
    broken = data[:last] + struct.pack("<I", len(data) - 10) + data[last + 4 :]
    with pytest.raises(InvalidImage):
        decode_image(broken)


def test_directories_that_go_round_end() -> None:
    data = bytearray(by_hand(grey(4, 4, 8), blocks=BLOCKS))
    data[-4:] = struct.pack("<I", int.from_bytes(data[4:8], "little"))
    assert levels(bytes(data)) == ((4, 4), 10)
