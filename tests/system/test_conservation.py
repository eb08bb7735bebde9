"""Every request that was sent is counted once, by its true outcome, under load, overload and aborts at any moment.

Each request carries an id; the server's log has one line with that id, and what the line says is what the client got.
"""

import base64
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.errors import OUTCOME_OF_STATUS
from service.api.paths import DETECTION_ROUTES
from tests.support.faulty_models import write_slow_model
from tests.support.load import PNG, Reply, Scrape, ask, blocks, connected, request_head
from tests.support.serving import ServerProcess, server_process, wait_until

IMAGES = [blocks(100 + 10 * (number % 4), 90, number) for number in range(8)]
CANCELLED = "cancelled"
ANYTHING = "ok|overloaded|timeout|cancelled"
"""A client that left after its last byte cannot know which of these it was."""


@dataclass
class Ledger:
    """The clients' knowledge of each request, by its id."""

    outcomes: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, request_id: str, outcome: str) -> None:
        with self._lock:
            assert request_id not in self.outcomes
            self.outcomes[request_id] = outcome

    def counts(self) -> dict[str, int]:
        return dict(collections.Counter(self.outcomes.values()))


@dataclass
class Clients:
    """The kinds of clients there are. Each call is one request and one line in the ledger."""

    url: str
    infer_path: str = "/v2/models/slow/infer"
    ledger: Ledger = field(default_factory=Ledger)

    def ask(self, path: str, body: bytes, headers: dict[str, str]) -> Reply:
        request_id = uuid.uuid4().hex
        reply = ask(self.url, path, body, {"X-Request-ID": request_id} | headers)
        assert reply.headers["x-request-id"] == request_id
        self.ledger.write(request_id, OUTCOME_OF_STATUS[reply.status])
        return reply

    def good(self) -> Reply:
        return self.ask("/detect", random.choice(IMAGES), PNG)

    def batch(self) -> Reply:
        request = httpx.Request("POST", self.url, files=[("image", image) for image in IMAGES[:3]])
        return self.ask("/detect/batch", request.read(), {"Content-Type": request.headers["content-type"]})

    def tensors(self) -> Reply:
        return self.infer(*random.sample(IMAGES, 2), parameters={"binary_data_output": True})

    def infer(self, *images: bytes, **members: Any) -> Reply:
        """Ask in the Open Inference Protocol, whose path names the model."""
        data = b"".join(len(image).to_bytes(4, "little") + image for image in images)
        tensor = {
            "name": "image",
            "datatype": "BYTES",
            "shape": [len(images)],
            "parameters": {"binary_data_size": len(data)},
        }
        head = json.dumps({"inputs": [tensor]} | members).encode()
        return self.ask(self.infer_path, head + data, {"Inference-Header-Content-Length": str(len(head))})

    def no_image(self) -> list[Reply]:
        return [self.ask("/detect", b"no image at all", PNG), self.infer(b"no image at all")]

    def bad_option(self) -> list[Reply]:
        bad = {"score_threshold": 2}
        return [self.ask("/detect?score_threshold=2", IMAGES[0], PNG), self.infer(IMAGES[0], parameters=bad)]

    def too_large(self) -> list[Reply]:
        return [self.ask("/detect", bytes(150_000), PNG), self.infer(bytes(150_000))]

    def wrong_type(self) -> list[Reply]:
        wrong = {"Content-Encoding": "gzip"}
        return [
            self.ask("/detect", IMAGES[0], {"Content-Type": "text/plain"}),
            self.ask(self.infer_path, IMAGES[0], wrong),
        ]

    def wrong_model(self) -> Reply:
        return self.ask("/v2/models/other/infer", IMAGES[0], {})

    def too_slow(self) -> None:
        """Never sends its last byte, and waits for the server to give up."""
        request_id = uuid.uuid4().hex
        with connected(self.url) as connection:
            connection.sendall(request_head(1000, request_id=request_id) + bytes(999))
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        self.ledger.write(request_id, "timeout")

    def leaves_while_sending(self) -> None:
        request_id = uuid.uuid4().hex
        with connected(self.url) as connection:
            connection.sendall(request_head(1000, request_id=request_id) + bytes(500))
        self.ledger.write(request_id, CANCELLED)

    def leaves_while_waiting(self) -> None:
        request_id, image = uuid.uuid4().hex, random.choice(IMAGES)
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(image).decode()]}
        in_json = json.dumps({"inputs": [tensor]}).encode()
        path, body = random.choice((("/detect", image), (self.infer_path, in_json)))
        with connected(self.url) as connection:
            connection.sendall(request_head(len(body), path, request_id) + body)
            time.sleep(random.uniform(0, 0.2))
        self.ledger.write(request_id, ANYTHING)


def assert_books_agree(server: ServerProcess, ledger: Ledger) -> None:
    """The log has each request once and says what its client says; the metrics are the sums of the log."""
    wait_until(lambda: len(logged(server)) >= len(ledger.outcomes))
    log = logged(server)
    assert len({line["request_id"] for line in log}) == len(log) == len(ledger.outcomes)
    told = {str(line["request_id"]): str(line["outcome"]) for line in log}
    differing = [(said, told.get(key)) for key, said in ledger.outcomes.items() if told.get(key) not in said.split("|")]
    assert differing == []
    scrape = Scrape(server.url)
    assert scrape.by_label("retinaserve_requests_total", "outcome") == collections.Counter(told.values())
    statuses = collections.Counter(str(line["status"]) for line in log)
    http = collections.Counter[str]()
    for (name, labels), value in scrape.samples.items():
        values = dict(labels)
        if name == "http_requests_total" and values["route"] in DETECTION_ROUTES and value:
            http[values["status"]] += int(value)
    assert http == statuses


def logged(server: ServerProcess) -> list[dict[str, object]]:
    return [line for line in server.log() if line.get("route") in DETECTION_ROUTES]


@pytest.mark.slow
def test_whatever_clients_do_each_request_is_counted_once_by_what_became_of_it(tmp_path: Path) -> None:
    counts = storm(tmp_path)
    assert set(counts) >= {"ok", "overloaded", "invalid", "too_large", "unsupported", "timeout", "unavailable"}, counts
    assert counts[CANCELLED] == 3 * 16


def storm(folder: Path, seconds: float = 0, seed: int = 0) -> dict[str, int]:
    """Have a crowd of every kind of client ask, for so long at least, and compare the books. Returns the clients'."""
    model = folder / "model.fifo"
    os.mkfifo(model)
    write_slow_model(folder / "slow.onnx", multiplications=6)
    flags = (
        "--queue-capacity", "24", "--request-timeout-seconds", "1", "--upload-timeout-seconds", "3",
        "--max-image-bytes", "100000", "--threads", "1", "--model-poll-seconds", "0",
    )  # fmt: skip
    with server_process(folder, *flags, model_path=model, ready=False) as server, ThreadPoolExecutor(64) as pool:
        clients, end = Clients(server.url), time.monotonic() + seconds

        # The loader waits for the other end of the pipe: not ready.
        assert {pool.submit(clients.good).result().status for _ in range(5)} == {503}
        model.write_bytes((folder / "slow.onnx").read_bytes())
        wait_until(lambda: ask(server.url, "/readyz", method="GET").status == 200, 60)

        # Nothing is known of the model's speed yet, so a burst is admitted, and is late or served.
        list(pool.map(lambda _: clients.good(), range(24)))

        # Alone, each kind gets its own outcome; in the crowd below any of them may be refused as overloaded.
        wait_until(lambda: clients.good().status == 200, 60)
        for call, status in (
            (clients.no_image, 422), (clients.bad_option, 422), (clients.too_large, 413), (clients.wrong_type, 415),
        ):  # fmt: skip
            wait_until(lambda: {reply.status for reply in call()} == {status}, 60)  # noqa: B023
        wait_until(lambda: clients.tensors().status == 200, 60)
        assert clients.wrong_model().status == 404
        wait_until(lambda: 429 in [reply.status for reply in pool.map(lambda _: clients.good(), range(64))], 60)

        kinds = [clients.good] * 12 + [clients.leaves_while_waiting] * 6 + [clients.leaves_while_sending] * 3
        kinds += [clients.batch, clients.no_image, clients.bad_option, clients.too_large, clients.wrong_type] * 2
        kinds += [clients.tensors] * 6 + [clients.wrong_model, clients.too_slow]
        random.Random(seed).shuffle(kinds)
        list(pool.map(lambda call: call(), kinds * 16))
        while time.monotonic() < end:
            list(pool.map(lambda call: call(), kinds))

        wait_until(lambda: Scrape(server.url)("retinaserve_queue_depth") == 0)
        assert_books_agree(server, clients.ledger)
    return clients.ledger.counts()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, from Debian's package prometheus")
def test_promtool_finds_no_fault_in_a_process_that_has_served(tmp_path: Path) -> None:
    with server_process(tmp_path) as server:
        before = set(Scrape(server.url).samples)
        clients = Clients(server.url, "/v2/models/tiny/infer")
        for call in (clients.good, clients.batch, clients.tensors, clients.no_image, clients.leaves_while_sending):
            call()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: Scrape(server.url)("retinaserve_model_reloads_total", outcome="success") == 1)
        text = ask(server.url, "/metrics", method="GET").body
        assert set(Scrape(server.url).samples) == before
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
