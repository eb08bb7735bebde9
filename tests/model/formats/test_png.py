"""PNG: what pixels need decides, and nothing else."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from model.image import InvalidImage, decode_image
from tests.support.pictures import encode, picture, png


def chunk(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)
    )


def with_chunk(*chunks: bytes, data: bytes | None = None) -> bytes:
    """Behind the header."""
    data = encode(picture(), "PNG") if data is None else data
    return data[:33] + b"".join(chunks) + data[33:]


UNUSED = {
    "a text of 2 MB, compressed": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000)),
    "a text of 100 MB, compressed": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 100_000_000)),
    "80 texts of 1 MB": chunk(b"zTXt", b"part\0\0" + zlib.compress(b"x" * 1_000_000)) * 80,
    "an international text, compressed": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "a text that is no text": chunk(b"iTXt", b"\xff\xfe\xfd"),
    "an unknown chunk with a wrong checksum": chunk(b"prVt", b"anything", crc=1),
    "a broken profile": chunk(b"iCCP", b"sRGB\0\0 not deflated"),
    "a profile with a wrong checksum": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(b"p"), crc=1),
    "a physical size that is too short": chunk(b"pHYs", b"\0"),
    "a gamma of nothing": chunk(b"gAMA", b""),
    "a suggested palette with a wrong checksum": chunk(b"PLTE", bytes(768), crc=1),
    "an animation without frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "an animation frame that is damaged": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0" * 26),
    "transparency of a wrong length": chunk(b"tRNS", b"\0"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"Exif\0\0MM\0*", crc=1),
}


@pytest.mark.parametrize("what", UNUSED)
def test_what_nobody_uses_never_decides(what: str) -> None:
    np.testing.assert_array_equal(decode_image(with_chunk(UNUSED[what])), picture())


def test_unused_chunks_between_and_behind_the_pixels_do_not_decide_either() -> None:
    data = encode(picture(), "PNG")
    np.testing.assert_array_equal(decode_image(data[:-12] + chunk(b"tEXt", b"a\0b", crc=1) + data[-12:]), picture())
    np.testing.assert_array_equal(decode_image(data + b"behind" * 1000), picture())
    np.testing.assert_array_equal(decode_image(data[:-12]), picture())


def test_checksums_of_pixels_decide() -> None:
    data = bytearray(encode(picture(), "PNG"))
    data[-13] ^= 1
    with pytest.raises(InvalidImage, match="the PNG"):
        decode_image(bytes(data))


def test_a_chunk_that_no_reader_may_skip_is_named() -> None:
    with pytest.raises(InvalidImage, match="'CgBI'"):
        decode_image(with_chunk(chunk(b"CgBI", bytes(4))))


def test_chunks_without_end_are_refused() -> None:
    with pytest.raises(InvalidImage, match="chunks"):
        decode_image(with_chunk(chunk(b"prVt", b"") * 200_000))


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def test_exif_turns_wherever_it_stands() -> None:
    turned = np.rot90(picture(), 3)
    exif = chunk(b"eXIf", orientation(6)[6:])
    data = encode(picture(), "PNG")
    np.testing.assert_array_equal(decode_image(with_chunk(exif)), turned)
    np.testing.assert_array_equal(decode_image(data[:-12] + exif + data[-12:]), turned)


@pytest.mark.parametrize("compressed", [False, True])
def test_so_does_the_text_in_which_imagemagick_keeps_exif(compressed: bool) -> None:
    exif = orientation(6)
    text = f"\nexif\n{len(exif):8}\n{exif.hex()[:72]}\n{exif.hex()[72:]}\n"
    information = PngImagePlugin.PngInfo()
    information.add_text("Raw profile type exif", text, zip=compressed)
    np.testing.assert_array_equal(decode_image(encode(picture(), "PNG", pnginfo=information)), np.rot90(picture(), 3))


def test_xmp_does_not_turn() -> None:
    information = PngImagePlugin.PngInfo()
    information.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/>')
    np.testing.assert_array_equal(decode_image(encode(picture(), "PNG", pnginfo=information)), picture())


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_declared_transparency_and_suggested_palettes_leave_16_bits_alone(colour_type: int) -> None:
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, samples), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    high = values[:, :, :3] >> 8 if samples > 2 else np.repeat(values[:, :, :1] >> 8, 3, axis=2)
    np.testing.assert_array_equal(decode_image(png(5, 6, 16, colour_type, rows, (b"sBIT", b"\x0c" * samples))), high)
