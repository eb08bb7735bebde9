"""The logs of the project on an engine: a request's lines, and their way to a collector."""

import json
import re
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.deploy.engine.stack import Load, Stack, needs_engine
from tests.support.load import PNG, free_ports
from tests.support.serving import picture, wait_until

pytestmark = needs_engine


def test_a_request_is_found_by_its_id_in_both_logs_and_a_probe_in_none(stack: Stack) -> None:
    stack.start(1)
    httpx.get(f"{stack.api}/readyz", headers={"X-Request-ID": "find-the-probe"})
    answer = httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG | {"X-Request-ID": "find-me"})
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "find-me"

    def lines() -> list[dict[str, object]]:
        logs = ["docker", "compose", *stack.options, "logs", "--no-log-prefix", "service", "proxy"]
        shown = subprocess.run(logs, cwd=stack.folder, env=stack.environment, capture_output=True, text=True)
        text = shown.stdout + shown.stderr  # as the containers wrote them
        logged = [
            json.loads(line) for line in re.findall(r"\{.*\}", text)
        ]  # Compose puts control characters before them
        return [line for line in logged if str(line.get("request_id", "")).startswith("find-")]

    wait_until(lambda: len(lines()) >= 2)
    assert sorted((line["message"], line["request_id"]) for line in lines()) == [
        ("proxied", "find-me"),
        ("request", "find-me"),
    ]


@contextmanager
def collector(port: int) -> Iterator[bytearray]:
    """A listener on this machine, and the bytes that it was sent: Fluentd's forward protocol has texts as they are."""
    received = bytearray()

    class Receiver(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while piece := self.request.recv(65536):
                received.extend(piece)

    with socketserver.ThreadingTCPServer(("127.0.0.1", port), Receiver) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield received
        server.shutdown()


def test_a_collector_gets_the_lines_of_both_and_its_absence_stops_nobody(stack: Stack) -> None:
    [port] = free_ports(1)
    stack.with_("docker/logs.yml", LOG_COLLECTOR=f"127.0.0.1:{port}").up()
    with Load(stack.api) as load:
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}
    with collector(port) as received:
        httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG | {"X-Request-ID": "to-the-collector"})
        wait_until(lambda: received.count(b"to-the-collector") == 2)  # the service's line and the proxy's
