"""Pictures in JSON, whatever is around them, without holding up anybody."""

import base64
import contextlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.api.body.encodings import PIECE_BYTES
from service.api.body.large_json import LargeString, parse_json
from service.api.uploads import JsonImage, MalformedRequest
from tests.support.serving import FakeDetector, serving, wait_until

IMAGE = os.urandom(700_001)
TEXT = base64.b64encode(IMAGE).decode()
MIB = 2**20


def image_of(body: bytes, *, max_image_bytes: int = 20 * MIB) -> bytes:
    form = JsonImage(max_image_bytes=max_image_bytes)
    form.feed(body)
    [image] = form.finish()
    return bytes(image)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_image_is_found_in_every_encoding(encoding: str) -> None:
    assert image_of(json.dumps({"image": TEXT}).encode(encoding)) == IMAGE


@pytest.mark.parametrize(
    "body",
    [
        '{"image":"' + TEXT + '"}',
        '\n{ "image"\t:\r\n "' + TEXT + '" } ' + "\n" * 1000,
        '{"image":"' + TEXT.replace("/", "\\/") + '"}',
        '{"image":"' + TEXT.replace("+", "\\u002B").replace("/", "\\u002f").replace("=", "\\u003d") + '"}',
        '{"image":"' + "\\r\\n".join(TEXT[start : start + 76] for start in range(0, len(TEXT), 76)) + '"}',
        '{"image":"data:image\\/png;base64,' + TEXT.replace("/", "%2F").replace("+", "%2b") + '"}',
        '{"im\\u0061ge":"' + TEXT + '"}',
        '{"image":"' + TEXT[:4000] + '","image":"' + TEXT + '"}',
        '{"image":"not base64","image":"' + TEXT + '"}',
    ],
    ids=["dense", "spaced", "PHP", ".NET", "lines", "data URL", "escaped key", "doubled", "doubled, large last"],
)
def test_the_image_is_what_json_and_base64_say(body: str) -> None:
    assert image_of(body.encode()) == IMAGE


@pytest.mark.parametrize("cut", range(-7, 8))
def test_an_escape_at_the_end_of_a_piece_is_not_cut(cut: int) -> None:
    letters = b"A" * (PIECE_BYTES + cut) + b"\\u002b\\/\\u002B\\/\\n" + b"A" * (PIECE_BYTES * 2)
    assert LargeString(letters).unescaped() == json.loads(b'"' + letters + b'"').encode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT[:-3], "not base64: it is cut off"),
        (TEXT[:PIECE_BYTES - 1] + "=" + TEXT, "not base64: it continues after its padding"),
        (TEXT[:100] + "\\\\" + TEXT[100:], "not base64"),
        (TEXT[:100] + '\\"' + TEXT[100:], "not base64"),
        (TEXT[:100] + "é" + TEXT[100:], "not base64"),
        (TEXT + '","other":"1', "keys besides 'image'"),
        (TEXT + '","other":"' + TEXT, "keys besides 'image'"),
        (TEXT + '","' + TEXT + '":"1', "keys besides 'image'"),
        ("\\" * 100_000, "64 backslashes"),
        ('\\"' * 100_000, "more than 1000 strings"),
        (TEXT + '"' + " " * 100_000 + ',"a":"b', "more than 65536 bytes besides the image"),
    ],
)  # fmt: skip
def test_what_is_no_image_in_json_says_why(text: str, says: str) -> None:
    with pytest.raises(MalformedRequest, match=says):
        image_of(('{"image":"' + text + '"}').encode())


def test_small_documents_are_as_json_loads_has_them() -> None:
    for document in ({"a": [1, 2.5, None, {"b": 'c\\"d\u20ac'}], "": {}}, [], "x", 5, ["\\\\", '"']):
        assert parse_json(json.dumps(document).encode()) == document
    assert parse_json(json.dumps({"a": ["x" * 5000, "y"]}).encode()) == {"a": [LargeString(b"x" * 5000), "y"]}


def keys(count: int) -> bytes:
    return b"{" + b",".join(b'"%07d":1' % number for number in range(count)) + b"}"


ATTACKS = {
    "keys": keys(2_200_000),
    "numbers": b'{"image":[' + b"1," * 13_000_000 + b"1]}",
    "number": b'{"image":' + b"1" * 26_000_000 + b"}",
    "brackets": b"[" * 26_000_000,
    "escapes": b'{"image":"' + b"\\/" * 13_000_000 + b'"}',
    "long escapes": b'{"image":"' + b"\\u002b" * 4_300_000 + b'"}',
    "percent signs": b'{"image":"data:;base64,' + b"%41" * 8_700_000 + b'"}',
    "line ends": b'{"image":"' + b"\\n" * 13_000_000 + b'"}',
    "quotes": b'{"image":"' + b'\\"' * 13_000_000 + b'"}',
    "backslashes": b'{"image":"' + b"\\" * 26_000_000 + b'"}',
    "letters": b'{"image":"' + b"AAAA" * 6_500_000 + b'"}',
    "UTF-16": b'{"image":"AAAA"}'.decode().replace("AAAA", "AAAA" * 3_200_000).encode("utf-16"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_body_holds_up_the_others_for_long(attack: str) -> None:
    """Another thread, as the event loop is one, gets its turn. In CPU time, for others on the machine take no turns."""
    longest, done = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.process_time()
        while not done.wait(0.001):
            now = time.process_time()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.process_time()
    try:
        with contextlib.suppress(MalformedRequest):
            image_of(ATTACKS[attack], max_image_bytes=40 * MIB)
    finally:
        done.set()
        thread.join()
    assert time.process_time() - started < 3
    assert longest < 0.5


def test_ten_bodies_of_millions_of_keys_keep_nobody_waiting() -> None:
    headers = {"Content-Type": "application/json"}
    with serving(FakeDetector()) as server, ThreadPoolExecutor(10) as pool:
        attacks = [
            pool.submit(httpx.post, server.url + "/detect", content=ATTACKS["keys"], headers=headers, timeout=60)
            for _ in range(10)
        ]
        waits = []
        while not all(attack.done() for attack in attacks):
            started = time.perf_counter()
            assert server.client.get("/healthz").status_code == 200
            waits.append(time.perf_counter() - started)
            time.sleep(0.05)
        assert {attack.result().status_code for attack in attacks} <= {400, 429}
    assert max(waits) < 1


def test_a_body_is_counted_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def finish(form: JsonImage) -> list[bytearray]:
        gate.wait(30)
        raise MalformedRequest("done")

    monkeypatch.setattr(JsonImage, "finish", finish)
    with serving(FakeDetector()) as server, ThreadPoolExecutor(1) as pool:
        body = json.dumps({"image": TEXT}).encode()
        headers = {"Content-Type": "application/json"}
        reply = pool.submit(server.client.post, "/detect", content=body, headers=headers)
        uploads = server.service.uploads
        wait_until(lambda: uploads.bytes_in_flight == len(body))
        time.sleep(0.1)
        assert uploads.bytes_in_flight == len(body)
        gate.set()
        assert reply.result().status_code == 400
        assert uploads.bytes_in_flight == 0
