"""BMP: every depth, header, mask and run-length code, compared with OpenCV, or with the format's words."""

import struct

import cv2
import numpy as np
import pytest

from model.image import InvalidImage, decode_image
from model.types import Pixels
from tests.support.pictures import encode, picture

RNG = np.random.default_rng(0)


def bmp(
    width: int,
    height: int,
    bits: int,
    body: bytes | None = None,
    *,
    header: int = 40,
    compression: int = 0,
    masks: tuple[int, ...] = (),
    palette: np.ndarray | None = None,
    top_down: bool = False,
) -> bytes:
    """By hand. `palette` [count, 3] RGB."""
    row = -(-width * bits // 32) * 4
    body = RNG.bytes(row * height) if body is None else body
    colours = 0 if palette is None else len(palette)
    if header == 12:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        signed = -height if top_down else height
        head = struct.pack("<IiiHHIIiiII", header, width, signed, 1, bits, compression, len(body), 0, 0, colours, 0)
        head += struct.pack(f"<{len(masks)}I", *masks)
        head = head.ljust(header, b"\0")
    table = b""
    if palette is not None:
        wide = np.zeros((colours, 3 if header == 12 else 4), np.uint8)
        wide[:, 2::-1] = palette
        table = wide.tobytes()
    offset = 14 + len(head) + len(table)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + table + body


def opencv(data: bytes) -> Pixels:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), np.uint8)[:, :, ::-1]


def colours(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3))


@pytest.mark.parametrize("header", [12, 40, 64, 108, 124])
@pytest.mark.parametrize("bits", [1, 4, 8, 24])
@pytest.mark.parametrize("width", [1, 7, 8, 13])
def test_every_header_and_depth_is_read(header: int, bits: int, width: int) -> None:
    data = bmp(width, 5, bits, header=header, palette=colours(1 << bits) if bits <= 8 else None)
    np.testing.assert_array_equal(decode_image(data), opencv(data))


@pytest.mark.parametrize("palette", ["black and white", "grey of 16", "10 colours"])
def test_a_short_or_grey_palette_is_still_a_palette(palette: str) -> None:
    tables = {
        "black and white": (8, np.array([[0] * 3, [255] * 3])),
        "grey of 16": (4, np.repeat(np.arange(16)[:, None], 3, axis=1)),
        "10 colours": (8, colours(10)),
    }
    bits, table = tables[palette]
    indexes = RNG.integers(0, len(table), (6, 16)).astype(np.uint8)
    packed = indexes if bits == 8 else indexes[:, ::2] << 4 | indexes[:, 1::2]
    data = bmp(16, 6, bits, packed[::-1].tobytes(), palette=table)
    np.testing.assert_array_equal(decode_image(data), table[indexes])


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("bits", [8, 24, 32])
def test_rows_go_up_or_down(top_down: bool, bits: int) -> None:
    data = bmp(6, 5, bits, top_down=top_down, palette=colours(256) if bits == 8 else None)
    np.testing.assert_array_equal(decode_image(data), opencv(data))
    assert decode_image(data).flags.writeable


@pytest.mark.parametrize(
    ("bits", "header", "masks"),
    [
        (16, 40, ()),
        (16, 40, (0x7C00, 0x3E0, 0x1F)),
        (16, 40, (0xF800, 0x7E0, 0x1F)),
        (16, 56, (0xF00, 0xF0, 0xF, 0xF000)),
        (16, 124, (0xF800, 0x7E0, 0x1F, 0)),
        (32, 108, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
        (32, 124, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
        (32, 124, (0x3FF00000, 0xFFC00, 0x3FF, 0)),
        (32, 40, (0xFF, 0xFF00, 0xFF0000)),
    ],
)
def test_the_masks_say_where_the_colours_are(bits: int, header: int, masks: tuple[int, ...]) -> None:
    words = RNG.integers(0, 1 << bits, (5, 8), dtype=np.uint64)
    body = words[::-1].astype(f"<u{bits // 8}").tobytes()
    data = bmp(8, 5, bits, body, header=header, compression=3 if masks else 0, masks=masks)
    used = masks[:3] or (0x7C00, 0x3E0, 0x1F)
    shares = [(words & mask) / mask for mask in used]  # a mask's bits over all of its bits
    np.testing.assert_allclose(decode_image(data), np.stack(shares, axis=2) * 255, atol=0.501)


def rle8(rows: list[bytes]) -> bytes:
    return b"".join(row + b"\0\0" for row in rows[:-1]) + rows[-1] + b"\0\1"


CODES = {
    "runs": rle8([b"\x08\1", b"\3\2\5\3", b"\x08\4"]),
    "blank rows": rle8([b"", b"\x08\2", b""]),
    "short rows": rle8([b"\2\1", b"\3\2", b"\1\3"]),
    "absolute": rle8([b"\0\x05\1\2\3\4\5\0\3\6", b"\0\4\1\2\3\4\4\1", b"\x08\1"]),
    "a jump": b"\2\1\0\2\3\1\2\5\0\0\x08\2\0\1",
    "a jump over rows": b"\x08\3\0\0\0\2\2\1\3\5\0\1",
    "an early end": b"\x08\3\0\0\0\1",
    "a long row": rle8([b"\x0c\1", b"\x08\2", b"\x08\3"]),
    "no end mark": b"\x08\1\0\0\x08\2\0\0\x08\3",
}


@pytest.mark.parametrize("code", CODES)
def test_run_lengths_of_8_bits_are_read(code: str) -> None:
    palette = colours(256)
    data = bmp(8, 3, 8, CODES[code], compression=1, palette=palette)
    if code in ("a long row", "no end mark"):  # which OpenCV refuses
        np.testing.assert_array_equal(decode_image(data), np.repeat(palette[[[3], [2], [1]]], 8, axis=1))
    else:
        np.testing.assert_array_equal(decode_image(data), opencv(data))


def test_run_lengths_of_4_bits_are_read() -> None:
    code = b"\5\x12\3\x45\0\0" + b"\0\5\x12\x34\x50\0\3\x66\0\0" + b"\2\x78\0\1"
    palette = colours(16)
    rows = [[1, 2, 1, 2, 1, 4, 5, 4], [1, 2, 3, 4, 5, 6, 6, 6], [7, 8, 0, 0, 0, 0, 0, 0]]
    data = bmp(8, 3, 4, code, compression=2, palette=palette)
    np.testing.assert_array_equal(decode_image(data), palette[rows[::-1]])


@pytest.mark.parametrize(
    "code", [b"", b"\x08\1", b"\x08\1\0\0\x08\2\0", b"\0\x08\1\2", b"\0\2\1", b"\x08\1\0\0\x08\2\0\0"]
)
def test_run_lengths_that_end_too_early_are_refused(code: str) -> None:
    with pytest.raises(InvalidImage, match="cut off"):
        decode_image(bmp(8, 3, 8, code, compression=1, palette=colours(256)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bits", "compression", "says"),
    [(24, 4, "compression 4"), (24, 5, "compression 5"), (8, 2, "compression 2"), (64, 0, "64 bits")],
)
def test_what_is_not_read_is_named(bits: int, compression: int, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        decode_image(bmp(8, 3, bits, bytes(1000), compression=compression))


@pytest.mark.parametrize("missing", [0, 1, 2, 3, 100])
def test_only_padding_may_be_missing(missing: int) -> None:
    data = encode(picture(60, 79), "BMP")  # rows of 237 bytes and three of padding
    kept = data[: len(data) - missing]
    if missing <= 3:
        np.testing.assert_array_equal(decode_image(kept), picture(60, 79))
    else:
        with pytest.raises(InvalidImage, match="cut off"):
            decode_image(kept)
