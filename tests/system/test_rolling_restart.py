"""Two instances behind a real haproxy, one after the other replaced under constant load: no request is lost.

The proxy has no second chance to give: retries 0, no redispatch. What keeps requests safe is the drain alone, and
without its delay the very same run does lose requests.
"""

import collections
import contextlib
import http.client
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.load import PNG, ask, blocks, constantly, free_ports
from tests.support.replicas import HAPROXY, REPLICAS, proxy
from tests.support.serving import ServerProcess, server_process, wait_until
from tests.support.tiny_model import write_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(HAPROXY is None, reason="needs haproxy, Debian's package of that name"),
]

CLIENTS = 6
NO_ANSWER = 0


def counted(servers: Sequence[ServerProcess]) -> collections.Counter[str]:
    """The outcomes of detection requests, by the servers' logs."""
    lines = (line for server in servers for line in server.log())
    return collections.Counter(str(line["outcome"]) for line in lines if line.get("route") == "/detect")


def replace_both(folder: Path, drain_delay_seconds: int, rolls: int = 1) -> tuple[list[int], collections.Counter[str]]:
    """Replace both replicas under constant load; what the clients got, and what all the processes counted."""
    ports = dict(zip(REPLICAS, free_ports(2), strict=True))
    image = blocks(90, 80, seed=1)
    statuses: list[int] = []
    write_tiny_model(folder / "tiny.onnx")

    with contextlib.ExitStack() as stack:

        def start(replica: str) -> ServerProcess:
            flags = ("--port", str(ports[replica]), "--drain-delay-seconds", str(drain_delay_seconds), "--threads", "1")
            return stack.enter_context(server_process(folder, *flags, model_path=folder / "tiny.onnx"))

        def call(client: int) -> None:
            time.sleep(0.02)  # leave the machine some air
            try:
                statuses.append(ask(through.url, "/detect", image, PNG).status)
            except (http.client.HTTPException, ConnectionError):
                statuses.append(NO_ANSWER)  # the proxy gives a lost request a 502, or closes the connection

        with ThreadPoolExecutor() as pool:
            servers = dict(zip(REPLICAS, pool.map(start, REPLICAS), strict=True))
        everyone = list(servers.values())
        through = stack.enter_context(proxy(folder, *ports.values()))
        wait_until(lambda: through.serves_with(*REPLICAS))
        with constantly(CLIENTS, call):
            for replica in REPLICAS * rolls:
                servers[replica].process.send_signal(signal.SIGTERM)
                assert servers[replica].process.wait(120) == 0
                servers[replica] = start(replica)
                everyone.append(servers[replica])
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
