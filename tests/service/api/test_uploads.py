"""Bodies that are slow, late, too many or in odd pieces, over real sockets."""

import gc
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from service.api.connections import BoundedProtocol
from service.api.uploads import MalformedRequest, MultipartImages
from tests.support.load import connected
from tests.support.serving import FakeDetector, Serving, picture, serving, wait_until

HEAD = b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeDetector(), upload_timeout_seconds=1, max_upload_bytes_in_flight=2**20) as running:
        yield running


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_body_that_does_not_arrive_in_time_gets_408(server: Serving) -> None:
    with connected(server.url) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
        assert b" 408 " in (said := answer(connection)) and b"upload_timeout" in said
    assert server.metric("retinaserve_requests_total", outcome="timeout") >= 1


def test_a_body_in_one_byte_pieces_is_read(server: Serving) -> None:
    image = picture(8, 8)
    with connected(server.url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        for byte in image:
            connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 200 " in answer(connection)


def test_a_client_that_waits_for_100_continue_need_not_send_what_is_too_large(server: Serving) -> None:
    with connected(server.url) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n")
        said = connection.recv(65536)
        assert b" 413 " in said and b"100 Continue" not in said


def test_an_early_refusal_reaches_a_client_that_sends_its_whole_body_first(server: Serving) -> None:
    size = 30 * 2**20
    with connected(server.url) as connection:
        connection.sendall(HEAD.replace(b"/detect", b"/nowhere") + b"Content-Length: %d\r\n\r\n" % size)
        connection.sendall(b"\0" * size)
        said = answer(connection)
    assert b" 404 " in said and b"connection: close" in said and b"not_found" in said


def test_a_body_that_will_not_fit_into_the_total_takes_no_room_from_others(server: Serving) -> None:
    uploads = server.service.uploads
    with connected(server.url) as holding, connected(server.url) as refused:
        holding.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"\0" * 900_000)
        wait_until(lambda: uploads.bytes_in_flight == 900_000)
        refused.sendall(HEAD + b"Content-Length: 400000\r\n\r\n")
        assert b" 429 " in refused.recv(65536), "before one byte of it came"
    wait_until(lambda: uploads.bytes_in_flight == 0)


@pytest.mark.parametrize("framing", [b"Content-Length: 400000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n61a80\r\n"])
def test_uploads_beyond_the_total_get_429_and_their_bytes_are_given_back(server: Serving, framing: bytes) -> None:
    with connected(server.url) as holding, connected(server.url) as refused:
        holding.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"\0" * 900_000)
        uploads = server.service.uploads
        wait_until(lambda: uploads.bytes_in_flight == 900_000)
        assert server.metric("retinaserve_upload_bytes_in_flight") == 900_000
        refused.sendall(HEAD + framing + b"\0" * 400_000)
        said = refused.recv(65536)
        assert b" 429 " in said and b"retry-after" in said
        response = server.client.post("/detect", content=picture(), headers={"Content-Type": "image/png"})
        assert response.status_code == 200, "a small one still passes"
    wait_until(lambda: uploads.bytes_in_flight == 0)


def test_many_half_sent_uploads_do_not_keep_good_requests_from_being_served(server: Serving) -> None:
    rude = [connected(server.url) for _ in range(50)]
    for connection in rude:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\nabc")
    for _ in range(5):
        response = server.client.post("/detect", content=picture(), headers={"Content-Type": "image/png"})
        assert response.status_code == 200
    for connection in rude:
        connection.close()
    wait_until(lambda: server.metric("http_requests_in_flight") == 0)


def test_a_client_slow_with_its_headers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_seconds", 0.3)
    with serving(FakeDetector()) as server, connected(server.url) as slow:
        slow.sendall(b"POST /detect HTTP/1.1\r\nHo")
        assert answer(slow) == b""
        with connected(server.url) as kept:
            for _ in range(2):
                kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                said = b""
                while b"alive" not in said:
                    said += kept.recv(65536)
                    assert said, "between two requests the keep-alive time counts, not this one"
                time.sleep(0.5)


def test_so_is_one_that_is_slow_with_its_second_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "header_seconds", 0.3)
    with serving(FakeDetector()) as server, connected(server.url) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: server.metric("http_requests_total", method="GET", route="/healthz", status="200") == 1)
        slow.sendall(b"GET /hea")
        assert b"alive" in answer(slow)


def test_a_multipart_body_is_the_same_however_it_is_cut() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n\r\n--\r\n--b-\r\r\n--b--\r\n'
    for size in range(1, len(body) + 1):
        form = MultipartImages(b"b", max_images=1, max_image_bytes=100)
        for start in range(0, len(body), size):
            form.feed(body[start : start + size])
        assert form.finish() == [b"\r\n--\r\n--b-\r"]


def test_a_form_without_a_part_is_told_which_field_it_lacks() -> None:
    form = MultipartImages(b"b", max_images=1, max_image_bytes=100)
    form.feed(b"--b--\r\n")
    with pytest.raises(MalformedRequest, match="the form has no file field, such as 'image'"):
        form.finish()


def test_a_boundary_longer_than_any_client_makes_is_refused(server: Serving) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={'b' * 1000}"}
    response = server.client.post("/detect", content=b"", headers=headers)
    assert (response.status_code, response.json()["code"]) == (400, "malformed_request")
    assert "the multipart boundary is not valid" in response.json()["detail"]


def test_a_forms_images_are_given_back_without_the_garbage_collector() -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'

    def receive() -> int:
        form = MultipartImages(b"b", max_images=1, max_image_bytes=2**20)
        form.feed(head + bytes(2**20) + b"\r\n--b--\r\n")
        return len(form.finish()[0])

    gc.disable()
    tracemalloc.start()
    try:
        assert receive() == 2**20
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert most > 2**20
    assert left < 2**16


def test_good_requests_are_answered_while_others_upload_slowly(server: Serving) -> None:
    stop = threading.Event()

    def trickle() -> None:
        with connected(server.url) as connection:
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
            while not stop.wait(0.05):
                connection.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        response = server.client.post("/detect", content=picture(), headers={"Content-Type": "image/png"})
        assert response.status_code == 200
    finally:
        stop.set()
        thread.join()
