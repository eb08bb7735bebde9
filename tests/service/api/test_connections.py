"""Bounds on what a connection sends, leaves unread or leaves unfinished, over real sockets."""

import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from service.api import connections
from service.api.connections import MAX_HEADER_BYTES, MAX_HEADER_FIELDS, MAX_URL_BYTES, BoundedProtocol
from tests.support.load import said
from tests.support.serving import FakeDetector, Serving, picture, server_process, serving, wait_until

HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSE = b"Connection: close\r\n\r\n"
CHUNKED = b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
MIB = 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeDetector(), api_keys="key", upload_timeout_seconds=2) as running:
        yield running


def connected(url: str) -> socket.socket:
    parts = httpx.URL(url)
    connection = socket.create_connection((parts.host, parts.port or 80))
    connection.settimeout(30)
    return connection


def ask(server: Serving, request: bytes) -> bytes:
    with connected(server.url) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return said(connection)


def assert_problem(answer: bytes, status: int, code: str) -> None:
    head, body = answer.split(b"\r\n\r\n")
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert (problem["status"], problem["code"]) == (status, code)
    assert b"content-type: application/problem+json" in head and b"connection: close" in head.lower()
    assert b"x-request-id: " + problem["request_id"].encode() in head.lower()


def post(image: bytes, more: bytes = b"") -> bytes:
    head = b"POST /detect HTTP/1.1\r\nHost: x\r\nX-API-Key: key\r\nContent-Type: image/png\r\nContent-Length: %d\r\n"
    return head % len(image) + more + b"\r\n" + image


def endless(server: Serving, beginning: bytes, piece: bytes) -> tuple[int, bytes]:
    """Send pieces until the server closes, at most 50 MiB; how many bytes it took, and what it said."""
    with connected(server.url) as connection:
        answer: list[bytes] = []
        reader = threading.Thread(target=lambda: answer.append(said(connection)))
        reader.start()
        sent, pieces = len(beginning), piece * (65536 // len(piece))
        with contextlib.suppress(ConnectionError):
            connection.sendall(beginning)
            while sent < 50 * MIB and reader.is_alive():
                connection.sendall(pieces)
                sent += len(pieces)
        reader.join()
        return sent, b"".join(answer)


# Headers and URL


def test_as_many_header_fields_as_are_allowed_pass_and_one_more_is_431(server: Serving) -> None:
    fields = b"".join(b"A%d: b\r\n" % number for number in range(MAX_HEADER_FIELDS - 2))
    assert ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + fields + CLOSE).startswith(b"HTTP/1.1 200 ")
    answer = ask(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nOne: more\r\n" + fields + CLOSE)
    assert_problem(answer, 431, "headers_too_large")


def test_header_bytes_are_counted_over_all_fields(server: Serving) -> None:
    for size, status in ((MAX_HEADER_BYTES // 2 - 100, b"200"), (MAX_HEADER_BYTES // 2, b"431")):
        value = b"x" * size
        answer = ask(server, b"GET /healthz HTTP/1.1\r\nA: " + value + b"\r\nB: " + value + b"\r\n" + CLOSE)
        assert answer.startswith(b"HTTP/1.1 " + status)


def test_a_url_as_long_as_allowed_passes_and_a_longer_one_is_414(server: Serving) -> None:
    path = b"/healthz?" + b"x" * (MAX_URL_BYTES - len(b"/healthz?"))
    assert ask(server, b"GET " + path + b" HTTP/1.1\r\n" + CLOSE).startswith(b"HTTP/1.1 200 ")
    assert_problem(ask(server, b"GET " + path + b"x HTTP/1.1\r\n" + CLOSE), 414, "uri_too_long")


@pytest.mark.parametrize(
    ("beginning", "piece", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n", b"a:\r\n", b"431"),
        (b"GET /healthz HTTP/1.1\r\na: ", b"x", b"431"),
        (b"GET /healthz HTTP/1.1\r\n", b"x", b"431"),
        (b"GET /", b"x", b"414"),
        (b"", b"\r\n", b"431"),
        (CHUNKED.replace(b"Host: x", b"X-API-Key: key") + b"1\r\nx\r\n0\r\n", b"a:\r\n", b"431"),
        (CHUNKED.replace(b"Host: x", b"X-API-Key: key") + b"1\r\nx\r\n0\r\na: ", b"x", b"431"),
        (CHUNKED.replace(b"Host: x", b"X-API-Key: key") + b"1;", b"x", b"431"),
    ],
    ids=["fields", "value", "name", "url", "empty lines", "trailers", "trailer", "chunk extension"],
)
def test_what_has_no_end_is_refused_after_some_kilobytes(
    server: Serving, beginning: bytes, piece: bytes, status: bytes
) -> None:
    sent, answer = endless(server, beginning, piece)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:100]
    assert sent < 16 * MIB, "a socket's buffers, and no more"


def test_trailers_are_no_headers(server: Serving) -> None:
    assert b" 401 " in ask(server, CHUNKED + b"1\r\nx\r\n0\r\nX-API-Key: key\r\n\r\n")


def test_a_refused_head_is_counted_and_logged_with_its_id(tmp_path: Path) -> None:
    with server_process(tmp_path, "--api-keys", "key") as process:
        with connected(process.url) as connection:
            connection.sendall(b"GET /model HTTP/1.1\r\nX-Request-ID: mine\r\nA: " + b"x" * 100_000)
            assert_problem(said_whole(connection), 431, "headers_too_large")
        wait_until(lambda: any(line.get("request_id") == "mine" for line in process.log()))
        [line] = (line for line in process.log() if line.get("request_id") == "mine")
        assert (line["status"], line["route"]) == (431, "/model")
        text = httpx.get(process.url + "/metrics", headers={"X-API-Key": "key"}).text
    assert 'http_requests_total{method="<other>",route="<unmatched>",status="431"} 1.0' in text


def said_whole(connection: socket.socket) -> bytes:
    """One answer that has a length; the server does not close while it waits for the client to."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


# What is no HTTP


@pytest.mark.parametrize(
    "request_", [b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nA b\r\n\r\n"]
)
def test_what_is_no_http_is_a_problem_and_counted(server: Serving, request_: bytes) -> None:
    def refused() -> float:
        samples = (
            sample
            for family in server.service.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "http_requests_total" and sample.labels["status"] == "400"
        )
        return sum(sample.value for sample in samples)

    before = refused()
    assert_problem(ask(server, request_), 400, "malformed_request")
    assert refused() == before + 1


@pytest.mark.parametrize("pause_seconds", [0, 0.2])
def test_a_body_that_is_no_http_is_one_problem_of_its_request(server: Serving, pause_seconds: float) -> None:
    before = server.metric("retinaserve_requests_total", outcome="invalid")
    chunked = CHUNKED.replace(b"Host: x", b"X-API-Key: key\r\nX-Request-ID: mine")
    with connected(server.url) as connection:
        connection.sendall(chunked + b"5\r\nhello\r\n")
        time.sleep(pause_seconds)
        connection.sendall(b"nonsense\r\n")
        answer = said_whole(connection)
    assert_problem(answer, 400, "malformed_request")
    assert b"x-request-id: mine" in answer.lower()
    assert server.metric("retinaserve_requests_total", outcome="invalid") == before + 1


def test_what_comes_after_a_good_request_and_is_no_http_is_answered_in_its_turn(server: Serving) -> None:
    first, second = ask(server, HEALTHZ + b"nonsense\r\n\r\n").split(b"}", 1)
    assert first.startswith(b"HTTP/1.1 200 ")
    assert_problem(second, 400, "malformed_request")


@pytest.mark.parametrize("asked", ["", "items=0-1", "bytes=5-2", "bytes=99999999-", "bytes=0-1," * 200])
def test_a_range_that_a_file_does_not_have_is_a_problem(server: Serving, asked: str) -> None:
    headers = {"X-API-Key": "key", "Range": asked}
    response = server.client.get("/static-offline-docs/swagger-ui.css", headers=headers)
    if response.status_code != 200:
        assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
        assert response.headers["x-request-id"] == response.json()["request_id"]


def test_a_range_that_a_file_has_is_served(server: Serving) -> None:
    headers = {"X-API-Key": "key", "Range": "bytes=0-1"}
    response = server.client.get("/static-offline-docs/swagger-ui.css", headers=headers)
    assert (response.status_code, len(response.content)) == (206, 2)


# Pipelining


def test_pipelined_requests_are_taken_one_at_a_time_and_answered_in_order() -> None:
    detector = FakeDetector()
    with serving(detector, api_keys="key") as server, connected(server.url) as connection:
        detector.gate.clear()
        images = [picture(8 * number, 64) for number in range(1, 6)]
        connection.sendall(b"".join(map(post, images)) + HEALTHZ.replace(b"\r\n\r\n", b"\r\n" + CLOSE))
        wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        time.sleep(0.2)
        assert server.metric("http_requests_in_flight") == 1
        assert server.metric("retinaserve_queue_depth") == 1
        detector.gate.set()
        answer = said(connection)
    widths = [
        json.loads(part.split(b"\r\n\r\n")[1])["image"]["width"] for part in answer.split(b"HTTP/1.1 200 OK")[1:6]
    ]
    assert widths == [8, 16, 24, 32, 40]
    assert answer.endswith(b'{"status":"alive"}')


@pytest.mark.parametrize("cut", [1, 2, 3, 40])
def test_pipelined_requests_cut_anywhere_are_answered(server: Serving, cut: int) -> None:
    chunked = CHUNKED.replace(b"Host: x", b"X-API-Key: key") + b"3\r\nabc\r\n0\r\nA: b\r\n\r\n"
    requests = (HEALTHZ + chunked + post(b"abc")) * 2 + HEALTHZ.replace(b"\r\n\r\n", b"\r\n" + CLOSE)
    with connected(server.url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(requests), cut):
            connection.sendall(requests[start : start + cut])
        statuses = [part[:3] for part in said(connection).split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"422", b"422"] * 2 + [b"200"]


@pytest.mark.parametrize(
    ("behind", "status"),
    [(b"no HTTP at all\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431")],
)
def test_what_comes_behind_a_request_in_error_is_refused_by_its_own_fault(
    server: Serving, behind: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The first answer is made while an exception is handled, which must not pass for the second one's."""
    with connected(server.url) as connection:
        connection.sendall(b"PUT /detect HTTP/1.1\r\nHost: x\r\nX-API-Key: key\r\n\r\n" + behind)
        statuses = re.findall(rb"HTTP/1.1 (\d{3}) ", said(connection))
    assert statuses == [b"405", status]
    assert "a request failed" not in caplog.text


@pytest.mark.parametrize("request_", [HEALTHZ, post(b"x")], ids=["GET", "POST"])
def test_a_flood_of_pipelined_requests_takes_no_memory(tmp_path: Path, request_: bytes) -> None:
    with server_process(tmp_path) as process, connected(process.url) as connection:
        before = psutil.Process(process.process.pid).memory_info().rss
        reader = threading.Thread(target=said, args=(connection,))
        reader.start()
        connection.settimeout(1.5)
        end = time.monotonic() + 1.5
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < end:
                connection.sendall(request_ * 10_000)
        started = time.monotonic()
        assert httpx.get(process.url + "/healthz").status_code == 200
        assert time.monotonic() - started < 1
        assert psutil.Process(process.process.pid).memory_info().rss - before < 8 * MIB
        connection.shutdown(socket.SHUT_RDWR)
        reader.join()


# Upgrades


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_offer_to_upgrade_is_ignored_and_the_body_read(server: Serving, tmp_path: Path, loop: str) -> None:
    image = picture(8, 64)
    request = post(image, H2C)
    with contextlib.ExitStack() as stack:
        url = (
            server.url if loop == "asyncio" else stack.enter_context(server_process(tmp_path, "--api-keys", "key")).url
        )
        connection = stack.enter_context(connected(url))
        for _ in range(2):  # the connection goes on
            for part in (request[:-20], request[-20:]):
                connection.sendall(part)
            answer = said_whole(connection)
            assert answer.startswith(b"HTTP/1.1 200 ") and b'"width":8' in answer


def test_connect_is_refused(server: Serving) -> None:
    assert ask(server, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\nabc").startswith(b"HTTP/1.1 400 ")
    assert b" 401 " in ask(server, b"CONNECT /detect HTTP/1.1\r\nHost: x\r\n\r\nabc")


# Answers that are not read, connections that are not used


def test_an_answer_that_is_not_read_is_given_up(tmp_path: Path) -> None:
    flags = ("--write-timeout-seconds", "1", "--docs", "true")
    with server_process(tmp_path, *flags) as process:
        url = httpx.URL(process.url)
        unread = []
        for _ in range(10):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((url.host, url.port or 80))
            connection.sendall(b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
            unread.append(connection)
        service = psutil.Process(process.process.pid)
        wait_until(lambda: len(service.net_connections()) > 10)
        wait_until(lambda: len(service.net_connections()) <= 1 and in_flight(process.url) == 1, 10)
        for connection in unread:
            connection.close()


def test_an_answer_that_is_read_slowly_is_sent_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    with serving(FakeDetector(), write_timeout_seconds=0.4) as server, socket.socket() as connection:
        url = httpx.URL(server.url)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.connect((url.host, url.port or 80))
        connection.sendall(post(buffer.getvalue(), b"Accept: image/png\r\nConnection: close\r\n"))
        answer = b""
        while part := connection.recv(65536):
            answer += part
            if len(answer) < 20 * 65536:
                time.sleep(0.1)
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"content-length: %d\r\n" % len(body) in head


def in_flight(url: str) -> float:
    text = httpx.get(url + "/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("http_requests_in_flight "))


def test_an_idle_connection_is_kept_for_the_time_set() -> None:
    with serving(FakeDetector(), keep_alive_seconds=0.5) as server, connected(server.url) as connection:
        connection.sendall(HEALTHZ)
        started = time.monotonic()
        assert said(connection).startswith(b"HTTP/1.1 200 ")
        assert 0.4 < time.monotonic() - started < 3


def test_a_connection_that_sends_nothing_but_line_ends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_seconds", 0.5)
    with serving(FakeDetector()) as server, connected(server.url) as connection:
        connection.sendall(HEALTHZ)
        said_whole(connection)
        end = time.monotonic() + 10
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"\r\n")
                time.sleep(0.1)
        assert connections.HEADER_SECONDS == 10
