"""The container's health check: what it says, and whom it ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "ready.py"


@contextmanager
def replica(answers: dict[str, int]) -> Iterator[int]:
    """A replica whose probes have these statuses; its port."""

    class Probes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Probes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def check(port: int, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-IS", str(SCRIPT), *flags]
    environment = os.environ | {"RETINASERVE_PORT": str(port)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_ready_replica_is_said_to_be() -> None:
    with replica({"/readyz": 200, "/healthz": 200}) as port:
        checked = check(port)
    assert (checked.returncode, checked.stdout) == (0, "ready\n")


@pytest.mark.parametrize(("healthz", "flags", "ends"), [(503, True, True), (200, True, False), (503, False, False)])
def test_only_a_replica_that_nothing_else_mends_is_ended(healthz: int, flags: bool, ends: bool) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        with replica({"/readyz": 503, "/healthz": healthz}) as port:
            checked = check(port, *(["--end", str(process.pid)] if flags else []))
        assert checked.returncode == 1
        assert "/readyz: HTTP Error 503" in checked.stderr
        if ends:
            assert process.wait(30) == -15
        assert (process.poll() is not None) == ends
    finally:
        process.kill()
        process.wait()


def test_a_replica_that_does_not_listen_yet_is_not_ended() -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        with replica({}) as port:
            pass
        assert check(port, "--end", str(process.pid)).returncode == 1
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
