"""Twenty thousand requests of every kind: memory, descriptors and threads stay level. A build that leaks is found."""

import base64
import collections
import contextlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.load import PNG, Footprint, blocks, connected, encoded, exchange, opened, request_head
from tests.support.serving import ServerProcess, server_process

pytestmark = pytest.mark.slow

REQUESTS = 20_000
WARM_UP = 3_000
SAMPLES = 20
CLIENTS = 8
BYTES_KEPT_PER_REQUEST = 400
"""Noise. The smallest leak, a request's own record, is larger."""
SPARE = 2
"""Tolerance of descriptors and threads: a client that left is noticed late, a pool's last thread starts late."""
IMAGE = blocks(20, 16, seed=1)
BASE64 = json.dumps({"image": base64.b64encode(IMAGE).decode()}).encode()
FORM = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + IMAGE + b"\r\n--x--\r\n"
PHOTO, WINDOWS = encoded(Image.effect_noise((640, 480), 40), "JPEG"), blocks(100, 80, seed=2)
HUGGING_FACE = json.dumps({"inputs": base64.b64encode(IMAGE).decode(), "parameters": {"threshold": 0.3}}).encode()
FILES = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(IMAGE).decode()]}
FRAME = {"name": "image", "datatype": "UINT8", "shape": [8, 8, 3], "parameters": {"binary_data_size": 192}}
FILES_JSON, FRAME_HEAD = (json.dumps({"inputs": [tensor]}).encode() for tensor in (FILES, FRAME))
FRAME_TYPE = {"Inference-Header-Content-Length": str(len(FRAME_HEAD))}
INFER = "/v2/models/tiny/infer"
JSON_TYPE, FORM_TYPE = {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=x"}
DRAWN = PNG | {"Accept": "image/png"}


def request(number: int, connection: HTTPConnection) -> int:
    """One of each kind in turn, most of them plain; the status."""
    match number % 40:
        case 1:
            return exchange(connection, "/detect", FORM, FORM_TYPE).status
        case 2:
            return exchange(connection, "/detect/batch", FORM, FORM_TYPE).status
        case 3:
            return exchange(connection, "/detect", BASE64, JSON_TYPE).status
        case 4:
            return exchange(connection, "/detect", IMAGE, DRAWN).status
        case 5:
            return exchange(connection, "/detect", b"no image").status
        case 6:
            return exchange(connection, f"/detect?label=unknown-{number}", IMAGE).status
        case 7:
            return exchange(connection, f"/unknown/{number}", method="GET").status
        case 8:
            return exchange(connection, "/metrics", method="GET").status
        case 9:
            return exchange(connection, "/", HUGGING_FACE, JSON_TYPE).status
        case 10:
            return exchange(connection, INFER, FILES_JSON, JSON_TYPE).status
        case 11:
            return exchange(connection, INFER, FRAME_HEAD + bytes(192), FRAME_TYPE).status
        case 12:
            return exchange(connection, "/detect?tile=64", WINDOWS).status
        case 13:
            return exchange(connection, "/detect", PHOTO, {}).status
        case _:
            return exchange(connection, "/detect", IMAGE).status


def leave(server: ServerProcess) -> None:
    """Send half an image and go."""
    with connected(server.url) as connection:
        connection.sendall(request_head(len(IMAGE)) + IMAGE[:50])


def soak(server: ServerProcess, requests: int, warm_up: int = WARM_UP) -> list[Footprint]:
    """Return the server's footprint after its warm-up, and after each share of the other requests."""
    numbers = itertools.count()
    warm = next(footprints(server, numbers, warm_up))
    return [warm, *itertools.islice(footprints(server, numbers, (requests - warm_up) // SAMPLES), SAMPLES)]


def footprints(server: ServerProcess, numbers: Iterator[int], step: int) -> Iterator[Footprint]:
    while True:
        turn = itertools.islice(numbers, step)  # the clients share it, so they finish together

        def work(connection: HTTPConnection, turn: Iterator[int] = turn) -> list[int]:
            return [request(number, connection) for number in turn]

        with contextlib.ExitStack() as stack, ThreadPoolExecutor(CLIENTS) as pool:
            connections = [stack.enter_context(contextlib.closing(opened(server.url))) for _ in range(CLIENTS)]
            statuses = collections.Counter(itertools.chain.from_iterable(pool.map(work, connections)))
            assert statuses.keys() == {200, 404, 422} and statuses.total() == step, statuses
            leave(server)
            yield Footprint.of(server.process.pid)


def leaks(samples: list[Footprint], requests: int, warm_up: int = WARM_UP) -> set[str]:
    """Return the resources that grow. Pools of threads start theirs as they are needed: the first quarter is theirs."""
    earlier, later = samples[SAMPLES // 4 : SAMPLES // 2], samples[SAMPLES // 2 :]

    growing = {
        "memory": slope(samples) > BYTES_KEPT_PER_REQUEST * (requests - warm_up) / SAMPLES,
        "descriptors": least(later).descriptors > least(earlier).descriptors + SPARE,
        "threads": least(later).threads > least(earlier).threads + SPARE,
    }
    return {what for what, grows in growing.items() if grows}


def slope(samples: list[Footprint]) -> float:
    """Bytes more from one sample to the next, by the line that fits best."""
    return float(np.polyfit(range(len(samples)), [sample.resident_bytes for sample in samples], 1)[0])


def least(samples: list[Footprint]) -> Footprint:
    return Footprint(
        min(sample.resident_bytes for sample in samples),
        min(sample.descriptors for sample in samples),
        min(sample.threads for sample in samples),
    )


@pytest.mark.timeout(900)
def test_after_20_000_requests_the_server_holds_what_it_held_before(tmp_path: Path) -> None:
    with server_process(tmp_path, "--threads", "1") as server:
        samples = soak(server, REQUESTS)
    assert leaks(samples, REQUESTS) == set(), samples


@pytest.mark.parametrize(
    ("leaking", "requests", "warm_up"), [("memory", 6_000, WARM_UP), ("descriptors,threads", 3_000, 500)]
)
def test_a_build_that_leaks_is_found_by_the_same_check(
    tmp_path: Path, leaking: str, requests: int, warm_up: int
) -> None:
    """Descriptors and threads need a shorter warm-up than memory."""
    with server_process(tmp_path, "--threads", "1", program=("-m", "tests.support.faulty_service", leaking)) as server:
        samples = soak(server, requests, warm_up)
    assert leaks(samples, requests, warm_up) >= set(leaking.split(",")), samples
