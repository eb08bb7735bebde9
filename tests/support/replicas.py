"""Two instances behind a real haproxy that has no second chance to give: retries 0, no redispatch."""

import contextlib
import csv
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.load import ask, free_ports, listens
from tests.support.serving import wait_until

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
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
        """Tell whether these replicas, and no others, pass their checks."""
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
