"""Damaged requests of every form, as bytes on a socket: damaged anywhere, or in the body alone.

A client waits a second for its answer, ends its half of the connection, and then has to see the server end the other.
"""

import collections
import itertools
import json
import random
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.reliability.gate import Figures, Work
from tests.support.load import Footprint, Scrape, ask, connected, said
from tests.support.serving import server_process, wait_until
from tests.system.test_fuzz import mutants
from tests.system.test_soak import BASE64, FILES_JSON, FORM, FRAME_HEAD, HUGGING_FACE, IMAGE, INFER

CLIENTS = 64
FLAGS = (
    "--threads", "1", "--queue-capacity", "1000", "--upload-timeout-seconds", "2", "--request-timeout-seconds", "100",
    "--max-image-pixels", "100000", "--max-image-bytes", "1000000",
)  # fmt: skip
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
CHUNKED = b"5\r\n" + IMAGE[:5] + b"\r\n%x;a=b\r\n" % len(IMAGE[5:]) + IMAGE[5:] + b"\r\n0\r\nX-End: 1\r\n\r\n"
FRAME_LENGTH = f"Inference-Header-Content-Length: {len(FRAME_HEAD)}"
FORMS = {
    "multipart": ("/detect", "Content-Type: multipart/form-data; boundary=x", FORM),
    "batch": ("/detect/batch", "Content-Type: multipart/form-data; boundary=x", FORM.replace(b"--x--\r\n", b"") + FORM),
    "base64": ("/detect", "Content-Type: application/json", BASE64),
    "hugging face": ("/", "Content-Type: application/json", HUGGING_FACE),
    "files": (INFER, "Content-Type: application/json", FILES_JSON),
    "frames": (INFER, FRAME_LENGTH, FRAME_HEAD + bytes(192)),
    "query": ("/detect?score_threshold=0.5&label=circle&tile=64&overlap=0.2", "Content-Type: image/png", IMAGE),
}
"""Path, header and body of each."""
WHOLE = ("GET /model", "GET /healthz", "HEAD /", "OPTIONS /detect", "GET /docs", "GET /v2/models/tiny")


def head(request_line: str, *fields: str) -> bytes:
    lines = [f"{request_line} HTTP/1.1", "Host: x", "Connection: close", *filter(None, fields), "", ""]
    return "\r\n".join(lines).encode()


def whole(path: str, field: str, body: bytes) -> bytes:
    return head(f"POST {path}", field, f"Content-Length: {len(body)}") + body


def seeds() -> list[bytes]:
    """Requests that are right."""
    chunked = head("POST /detect", "Content-Type: image/png", "Transfer-Encoding: chunked") + CHUNKED
    return [*(whole(*form) for form in FORMS.values()), chunked, *(head(line) for line in WHOLE)]


def damaged(chance: random.Random) -> Iterator[bytes]:
    """Endless: half of them damaged anywhere, half in their body alone, with a true length."""
    anywhere = mutants(seeds(), chance)
    bodies = {name: mutants([body], chance) for name, (_, _, body) in FORMS.items()}
    while True:
        yield next(anywhere)
        name = chance.choice(list(FORMS))
        path, field, _ = FORMS[name]
        yield whole(path, field, next(bodies[name]))


def answer_to(url: str, request: bytes, first_wait_seconds: float = 1) -> str:
    """The status of the first answer; "none": the connection ended without one."""
    with connected(url) as connection:
        try:
            connection.sendall(request)
            connection.settimeout(first_wait_seconds)
            first = connection.recv(65536)
        except TimeoutError:
            connection.settimeout(60)
            connection.shutdown(socket.SHUT_WR)
            first = said(connection)  # TimeoutError: it hangs
        except ConnectionError:
            first = b""
        found = STATUS.match(first)
    return found[1].decode() if found else "none"


def post_damaged_requests(folder: Path, count: int, seed: int) -> collections.Counter[str]:
    """Send them, and see that no answer is a 5xx, nothing hangs or stays, and the log knows of no bug."""
    requests = list(itertools.islice(damaged(random.Random(seed)), count))
    with server_process(folder, *FLAGS) as server, ThreadPoolExecutor(CLIENTS) as pool:
        assert {answer_to(server.url, request, 60) for request in seeds()} == {"200", "405"}
        before = Footprint.of(server.process.pid)
        statuses = collections.Counter(pool.map(lambda request: answer_to(server.url, request), requests))
        assert [status for status in statuses if status.startswith("5")] == [], statuses
        wait_until(lambda: Scrape(server.url)("http_requests_in_flight") == 1)
        scrape = Scrape(server.url)
        counts = [(dict(labels), count) for (name, labels), count in scrape.samples.items() if name == COUNTED]
        # /readyz says 503 to who waits for the start.
        counted = {labels["status"] for labels, count in counts if count and labels["route"] != "/readyz"}
        assert [status for status in counted if status.startswith("5")] == [], counted
        assert scrape("retinaserve_queue_depth") == 0
        wait_until(lambda: Footprint.of(server.process.pid).descriptors <= before.descriptors + 2)
        assert json.loads(ask(server.url, body=IMAGE).body)["detections"] != []
        assert "Traceback" not in server.log_path.read_text()
    return statuses


COUNTED = "http_requests_total"


def run(work: Work) -> Figures:
    statuses = post_damaged_requests(work.folder, work.count, work.first)
    return {f"answered_{status}": count for status, count in sorted(statuses.items())}
