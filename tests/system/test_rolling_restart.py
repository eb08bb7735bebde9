"""Two instances behind a real haproxy, one after the other replaced under constant load: no request is lost.

The proxy has no second chance to give: retries 0, no redispatch. What keeps requests safe is the drain alone, and
without its delay the very same run does lose requests.
"""

import collections
import contextlib
import csv
import http.client
import io
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.load import PNG, ask, blocks, constantly, free_ports, listens
from tests.support.serving import ServerProcess, server_process, wait_until

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs haproxy, Debian's package of that name"),
]

CLIENTS = 6
NO_ANSWER = 0
REPLICAS = ("first", "second")
CONFIG = """
global
  maxconn 200
defaults
  mode http
  retries 0
  no option redispatch
  option http-server-close
  timeout connect 30s
  timeout client 60s
  timeout server 60s
frontend api
  bind 127.0.0.1:{front}
  default_backend replicas
frontend statistics
  bind 127.0.0.1:{statistics}
  stats enable
  stats uri /
backend replicas
  balance roundrobin
  option httpchk GET /readyz
  http-check expect status 200
  timeout check 20s
  default-server check inter 1s fall 1 rise 1
  server first 127.0.0.1:{first}
  server second 127.0.0.1:{second}
"""


class Proxy:
    def __init__(self, front: int, statistics: int) -> None:
        self.url = f"http://127.0.0.1:{front}"
        self.statistics = f"http://127.0.0.1:{statistics}"

    def serves_with(self, *replicas: str) -> bool:
        """Whether these replicas, and no others, pass their checks."""
        rows = csv.DictReader(io.StringIO(ask(self.statistics, "/;csv", method="GET").body.decode()))
        up = [row["svname"] for row in rows if row["# pxname"] == "replicas" and row["status"].startswith("UP")]
        return set(up) - {"BACKEND"} == set(replicas)


@contextlib.contextmanager
def proxy(folder: Path, first: int, second: int) -> Iterator[Proxy]:
    front, statistics = free_ports(2)
    config = folder / "haproxy.cfg"
    config.write_text(CONFIG.format(front=front, statistics=statistics, first=first, second=second))
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(config)], stdout=log, stderr=log)
    running = Proxy(front, statistics)
    try:
        wait_until(lambda: process.poll() is not None or listens(running.statistics))
        assert process.poll() is None, (folder / "haproxy.log").read_text()
        yield running
    finally:
        process.kill()
        process.wait()


def counted(servers: Sequence[ServerProcess]) -> collections.Counter[str]:
    """The outcomes of detection requests, by the servers' logs."""
    lines = (line for server in servers for line in server.log())
    return collections.Counter(str(line["outcome"]) for line in lines if line.get("route") == "/detect")


def replace_both(folder: Path, drain_delay_seconds: int) -> tuple[list[int], collections.Counter[str]]:
    """Replace both replicas under constant load; what the clients got, and what the four processes counted."""
    ports = dict(zip(REPLICAS, free_ports(2), strict=True))
    image = blocks(90, 80, seed=1)
    statuses: list[int] = []

    with contextlib.ExitStack() as stack:

        def start(replica: str) -> ServerProcess:
            flags = ("--port", str(ports[replica]), "--drain-delay-seconds", str(drain_delay_seconds), "--threads", "1")
            return stack.enter_context(server_process(folder, *flags))

        def call(client: int) -> None:
            time.sleep(0.02)  # leave the machine some air
            try:
                statuses.append(ask(through.url, "/detect", image, PNG).status)
            except (http.client.HTTPException, ConnectionError):
                statuses.append(NO_ANSWER)  # the proxy gives a lost request a 502, or closes the connection

        servers = {replica: start(replica) for replica in REPLICAS}
        everyone = list(servers.values())
        through = stack.enter_context(proxy(folder, *ports.values()))
        wait_until(lambda: through.serves_with(*REPLICAS))
        with constantly(CLIENTS, call):
            for replica in REPLICAS:
                servers[replica].process.send_signal(signal.SIGTERM)
                assert servers[replica].process.wait(120) == 0
                everyone.append(start(replica))
                wait_until(lambda: through.serves_with(*REPLICAS), 60)
        wait_until(lambda: counted(everyone)["ok"] >= statuses.count(200))
        return statuses, counted(everyone)


def test_both_replicas_replaced_under_load_lose_no_request(tmp_path: Path) -> None:
    statuses, outcomes = replace_both(tmp_path, drain_delay_seconds=5)
    assert set(statuses) == {200}
    assert outcomes == {"ok": len(statuses)}


def test_without_the_drain_delay_the_same_run_loses_requests(tmp_path: Path) -> None:
    statuses, _ = replace_both(tmp_path, drain_delay_seconds=0)
    assert set(statuses) > {200}, "the test above cannot fail"
