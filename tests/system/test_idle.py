"""A service that nobody asks leaves the CPU to others: no thread of it spins or polls fast."""

import time
from pathlib import Path

import httpx
import psutil
import pytest

from model.pretrained import PRETRAINED
from tests.support.serving import server_process, wait_until

pytestmark = pytest.mark.slow
EXAMPLE = PRETRAINED.with_name("example.jpg")
SECONDS = 3
SHARE = 0.03
"""Most of one core. A spinning inference thread takes a whole one; the GPU and file polls take about 0.002."""


def test_an_idle_service_takes_next_to_no_cpu_before_and_after_it_has_worked(tmp_path: Path) -> None:
    with server_process(tmp_path, "--device", "cpu", model_path=PRETRAINED) as server:
        process = psutil.Process(server.process.pid)
        assert idle_share(process) < SHARE
        answer = httpx.post(server.url + "/detect", files={"image": EXAMPLE.read_bytes()}, timeout=120)
        assert answer.status_code == 200
        assert cpu_seconds(process) > 0.1, "this is not the process that worked"
        assert idle_share(process) < SHARE


def idle_share(process: psutil.Process) -> float:
    """CPU time over time, once what was last asked is over, however busy the machine is."""
    wait_until(lambda: share(process, 1) < SHARE)
    return share(process, SECONDS)


def share(process: psutil.Process, seconds: float) -> float:
    before, started = cpu_seconds(process), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(process) - before) / (time.monotonic() - started)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
