"""Damaged pictures and requests of every shape that OpenAPI allows: never a 5xx, no hang, no memory kept."""

import collections
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.load import Footprint, Reply, Scrape, ask, encoded, exchange, opened
from tests.support.serving import server_process, wait_until

pytestmark = pytest.mark.slow

MUTANTS_PER_FORMAT = 2_000
CLIENTS = 4
MAX_PIXELS = 100_000
"""So that the few that claim to be large do not hide what many small ones leave behind."""
BYTES_KEPT_PER_MUTANT = 1024
"""Less than the smallest upload. What is measured is within 300."""
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff", b"\xff\xff\0\0")


def photo(mode: str = "RGB", width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them."""
    chance = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = (ramp + chance.integers(0, 16, (height, width, 3))).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def grey16() -> Image.Image:
    return Image.fromarray(np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27)


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags.tobytes()


def seeds() -> dict[str, list[bytes]]:
    """Valid files of each format, in as many of its forms as Pillow writes."""
    frames = [photo(seed=seed) for seed in range(3)]
    return {
        "JPEG": [
            encoded(photo(), "JPEG", quality=80, exif=exif()),
            encoded(photo(), "JPEG", progressive=True, subsampling=0),
            encoded(photo("L"), "JPEG", restart_marker_blocks=2),
            encoded(photo("CMYK"), "JPEG"),
        ],
        "PNG": [
            encoded(photo()),
            encoded(photo("P")),
            encoded(photo("RGBA"), exif=exif()),
            encoded(photo("1")),
            encoded(grey16()),
            encoded(frames[0], save_all=True, append_images=frames[1:]),
        ],
        "WEBP": [
            encoded(photo(), "WEBP", quality=70, exif=exif()),
            encoded(photo("RGBA"), "WEBP", lossless=True),
            encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        ],
        "BMP": [encoded(photo(mode), "BMP") for mode in ("RGB", "RGBA", "L", "P", "1")],
        "TIFF": [
            encoded(photo(), "TIFF"),
            encoded(photo(), "TIFF", compression="tiff_lzw", exif=exif()),
            encoded(photo(), "TIFF", compression="tiff_adobe_deflate"),
            encoded(photo(), "TIFF", compression="jpeg"),
            encoded(photo("1"), "TIFF", compression="group4"),
            encoded(photo("CMYK"), "TIFF", compression="packbits"),
            encoded(grey16(), "TIFF"),
            encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        ],
        "GIF": [
            encoded(photo("P"), "GIF"),
            encoded(photo("L"), "GIF", interlace=1),
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0),
        ],
        "AVIF": [
            encoded(photo(), "AVIF", quality=60, exif=exif()),
            encoded(photo("RGBA"), "AVIF", quality=60),
            encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        ],
    }  # fmt: skip


def flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def flip_bits_of_the_header(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 4))):
        data[chance.randrange(min(len(data), 64))] ^= 1 << chance.randrange(8)


def put_extremes(data: bytearray, chance: random.Random) -> None:
    """Sizes, offsets and counts of 0, -1 and the largest."""
    place = chance.randrange(chance.choice((64, len(data))))
    data[place : place + 4] = chance.choice(EXTREMES)[: chance.choice((1, 2, 4))]


def cut_off(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(1, len(data)) :]


def cut_out(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(1, len(data))
    del data[place : place + chance.choice((1, 4, 100))]


def repeat(data: bytearray, chance: random.Random) -> None:
    place, length = chance.randrange(len(data)), chance.choice((1, 4, 100, 1000))
    data[place:place] = data[place : place + length] * chance.choice((1, 2, 50))


def scramble(data: bytearray, chance: random.Random) -> None:
    place, length = chance.randrange(len(data)), chance.choice((4, 40, 400))
    data[place : place + length] = chance.randbytes(min(length, len(data) - place))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits, flip_bits_of_the_header, put_extremes, cut_off, cut_out, repeat, scramble,
)  # fmt: skip


def mutants(files: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Endless: each from one file, by one to three mutations; some go on as another file."""
    while True:
        data = bytearray(chance.choice(files))
        for mutate in chance.choices(MUTATIONS, k=chance.choice((1, 1, 2, 3))):
            if len(data) > 1:
                mutate(data, chance)
        if chance.random() < 0.05:
            data += chance.choice(files)[chance.randrange(100) :]
        if data:
            yield bytes(data)


def corpus(count: int, seed: int = 0) -> list[bytes]:
    """So many of each format, in mixed order, the same in every run."""
    chance = random.Random(seed)
    files = [file for group in seeds().values() for file in itertools.islice(mutants(group, chance), count)]
    chance.shuffle(files)
    return files


def statuses_of(url: str, files: list[bytes]) -> collections.Counter[int]:
    """Send them all, from a few clients at once."""

    def send(share: list[bytes]) -> list[int]:
        with closing(opened(url)) as connection:
            return [exchange(connection, body=file).status for file in share]

    with ThreadPoolExecutor(CLIENTS) as pool:
        shares = pool.map(send, [files[number::CLIENTS] for number in range(CLIENTS)])
        return collections.Counter(itertools.chain.from_iterable(shares))


def problem_code(reply: Reply) -> str:
    code: str = json.loads(reply.body)["code"]
    return code


def test_damaged_pictures_of_every_format_get_an_answer_or_a_422_and_leave_no_memory_behind(tmp_path: Path) -> None:
    post_damaged(tmp_path, corpus(MUTANTS_PER_FORMAT))


def post_damaged(folder: Path, files: list[bytes]) -> collections.Counter[int]:
    """Post them all, and see that nothing stays of them; how many got each status."""
    valid = [file for group in seeds().values() for file in group]
    half = len(files) // 2
    flags = ("--max-image-pixels", str(MAX_PIXELS), "--threads", "1", "--request-timeout-seconds", "100")
    with server_process(folder, *flags) as server:
        assert statuses_of(server.url, valid) == {200: len(valid)}
        before = [json.loads(ask(server.url, body=file).body)["detections"] for file in valid]
        statuses = statuses_of(server.url, files[:half])
        settled = Footprint.of(server.process.pid)
        statuses += statuses_of(server.url, files[half:])
        after = Footprint.of(server.process.pid)
        assert set(statuses) == {200, 413, 422}, statuses
        assert statuses.total() == len(files)
        assert after.resident_bytes - settled.resident_bytes < half * BYTES_KEPT_PER_MUTANT
        assert [json.loads(ask(server.url, body=file).body)["detections"] for file in valid] == before
        scrape = Scrape(server.url)
        assert scrape("retinaserve_requests_total", outcome="error") == scrape("retinaserve_queue_depth") == 0
        wait_until(lambda: Footprint.of(server.process.pid).descriptors <= settled.descriptors)
        assert not [line for line in server.log() if "exception" in line or line["level"] not in ("info", "warning")]
        assert "Traceback" not in server.log_path.read_text()
    return statuses


SCHEMATHESIS = """
[checks.positive_data_acceptance]
enabled = false  # no schema can say which bytes are a picture

[[operations]]
include-name = "POST /detect/batch"

[operations.checks.negative_data_rejection]
enabled = false  # a part that is no picture is a problem inside a 200
"""


def test_no_request_that_schemathesis_makes_of_the_openapi_document_gets_what_the_document_does_not_say(
    tmp_path: Path,
) -> None:
    ask_by_schema(tmp_path, 200)


def ask_by_schema(folder: Path, examples: int, seed: int = 0) -> None:
    """Have schemathesis make up to so many requests for each operation."""
    config = folder / "schemathesis.toml"
    config.write_text(SCHEMATHESIS)
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--max-examples", str(examples), "--continue-on-failure", "--no-color"]
    options += ["--seed", str(seed)] if seed else ["--generation-deterministic"]
    with server_process(folder, "--threads", "1") as server:
        run = [str(program), "--config-file", str(config), "run", f"{server.url}/openapi.json", *options]
        seconds = 280 + examples
        finished = subprocess.run(run, capture_output=True, text=True, cwd=folder, timeout=seconds, check=False)
        scrape = Scrape(server.url)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Operations:       8 selected / 8 total" in finished.stdout
    assert scrape("retinaserve_requests_total", outcome="error") == 0
    assert scrape("retinaserve_requests_total", outcome="ok") > 0
    assert scrape("retinaserve_requests_total", outcome="invalid") > 100
