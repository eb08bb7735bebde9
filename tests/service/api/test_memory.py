"""Memory of requests is counted while they need it: bodies until they are answered, drawings until they are
read; and what does not fit is refused, while others are served."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.core.memory import HeldBytes
from tests.support.serving import FakeDetector, Serving, assert_problem, detect, picture, serving, wait_until

DRAWING = {"Content-Type": "image/png", "Accept": "image/png"}


@pytest.fixture
def server() -> Iterator[Serving]:
    detector = FakeDetector()
    detector.gate.clear()
    with serving(detector, max_upload_bytes_in_flight=2**20) as running:
        yield running


def is_empty(held: HeldBytes) -> bool:
    return held.taken == 0


def test_a_body_is_counted_until_its_answer(server: Serving) -> None:
    bodies, body = server.service.engine.bodies, picture() + bytes(700_000)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(detect, server, content=body)
        wait_until(lambda: server.service.engine.line.snapshot().places_taken == 1)
        assert bodies.taken == len(body)
        assert server.service.uploads.bytes_in_flight == 0, "it has arrived"
        assert_problem(detect(server, content=body), 429, "overloaded")
        server.detector.gate.set()
        assert first.result().status_code == 200
    wait_until(lambda: is_empty(bodies))


def test_a_body_that_finds_no_place_is_not_counted(server: Serving) -> None:
    server.service.engine.line.capacity = 0
    assert_problem(detect(server), 429, "overloaded")
    wait_until(lambda: is_empty(server.service.engine.bodies))


def test_a_drawing_is_counted_from_when_it_is_asked_for_and_one_is_always_made(server: Serving) -> None:
    answers = server.service.engine.answers
    answers.limit = 3 * 80 * 64 + 10
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(detect, server, content=picture(200, 200), headers=DRAWING)
        wait_until(lambda: answers.taken == 3 * 200 * 200)
        assert_problem(detect(server, headers=DRAWING), 429, "overloaded")
        server.detector.gate.set()
        assert first.result().status_code == 200
    wait_until(lambda: is_empty(answers))
    assert detect(server, headers=DRAWING).status_code == 200


def test_what_a_client_does_not_read_is_counted_until_it_has_gone(server: Serving) -> None:
    answers, url = server.service.engine.answers, httpx.URL(server.url)
    asked = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((url.host, url.port or 80))
        while is_empty(answers):
            connection.sendall(asked)
    wait_until(lambda: is_empty(answers))
