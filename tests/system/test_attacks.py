"""Files of known attacks on decoders, twice each, beside a good client: it and the probe notice little, memory stays
within the budget, and the service is well afterwards."""

import contextlib
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.formats.jpeg import SOS, Segment, parse
from model.image import MAX_PIXELS
from service.core.memory import Budget
from tests.search import tiffs
from tests.search.formats import png
from tests.support.pictures import encode
from tests.support.pictures import picture as pixels
from tests.support.serving import ServerProcess, picture, server_process
from tests.support.watching import ask, memory, watched

REFUSED = (413, 422)


def tiff(**genes: int) -> bytes:
    return tiffs.build({**tiffs.PLAIN, "tiled": 1, **genes}, MAX_PIXELS)


def jpeg_of_exif_segments() -> bytes:
    data = encode(pixels(), "JPEG")
    return data[:2] + bytes(Segment(0xE1, b"Exif\0\0")) * 1_000_000 + data[2:]


def jpeg_of_scans(side: int = 5_500, scans: int = 199) -> bytes:
    """A grey progressive picture that refines the same coefficients again and again, in 190 KB."""
    grey = np.full((side, side, 3), 128, np.uint8)
    segments = parse(encode(grey, "JPEG", progressive=True)).segments
    places = [place for place, segment in enumerate(segments) if segment.marker == SOS]
    table_and_scan = segments[places[5] - 1 : places[5] + 1]
    more = table_and_scan * (scans - len(places))
    return b"\xff\xd8" + b"".join(map(bytes, [*segments, *more])) + b"\xff\xd9"


def bmp_of_ended_rows(width: int = 4_900, height: int = 5_000) -> bytes:
    code = b"\0\0" * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(code), 0, 0, 0, 0)
    start = 14 + len(header) + 1024
    return struct.pack("<2sIHHI", b"BM", start + len(code), 0, 0, start) + header + bytes(1024) + code


def png_of_one_pixel_and_400_mebibytes() -> bytes:
    small = {"width": 1, "height": 1, "kind": 0, "interlaced": 0, "rows_beyond": 0, "pieces": 1, "empty_pieces": 0}
    data = png(small | {"chunks": 0, "chunk_bytes": 0, "chunk_kind": 0, "headers": 1}, MAX_PIXELS)
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(400)) + packer.flush()
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    return data[: data.index(b"IDAT") - 4] + chunk + data[-12:]


ATTACKS: Mapping[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "tiles far taller than the picture": (
        lambda: tiff(width=800_000, height=1, block_width=16, block_height=1_000_000),
        REFUSED,
    ),
    "a tile far larger than the picture": (
        lambda: tiff(width=1, height=1, block_width=46_000, block_height=2_900),
        REFUSED,
    ),
    "a million Exif segments": (jpeg_of_exif_segments, REFUSED),
    "199 scans of 30 megapixels": (jpeg_of_scans, (200, 422, 504)),
    "a run-length code that ends each row at once": (bmp_of_ended_rows, (200,)),
    "400 MiB for one pixel": (png_of_one_pixel_and_400_mebibytes, (200, 422)),
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as folder, attacked(Path(folder)) as running:
        yield running


@contextlib.contextmanager
def attacked(folder: Path) -> Iterator[ServerProcess]:
    flags = ("--decode-threads", "2", "--threads", "1", "--request-timeout-seconds", "30")
    with server_process(folder, *flags) as running:
        ask(running, picture(90, 60))  # the children have started
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_a_decoder_costs_nobody_else(server: ServerProcess, attack: str) -> None:
    make, statuses = ATTACKS[attack]
    data = make()
    rest = memory(psutil.Process(server.process.pid))
    with watched(server) as watch, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: ask(server, data), range(2)))
    assert set(answers) <= set(statuses), answers
    assert watch.highest - rest <= Budget.of(2).total, f"{(watch.highest - rest) / 2**20:.0f} MiB"
    assert watch.slowest_probe <= 1
    assert watch.slowest_answer <= 5
    assert ask(server, picture()) == 200
