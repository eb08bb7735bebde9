"""Pictures that take much memory or time, legal or not, beside a good client: it keeps its service, and the memory of
the service and its children stays within its bound and comes back."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import psutil
import pytest
from PIL import Image

from service.core.memory import Budget
from tests.support.load import connected, request_head
from tests.support.serving import picture, server_process, wait_until
from tests.support.watching import SETTLED, ask, memory, watched

OPTIONS: dict[str, dict[str, object]] = {
    "progressive": {"format": "JPEG", "progressive": True, "subsampling": 0},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}


@cache
def large(kind: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(file, **{"format": kind} | OPTIONS.get(kind, {}))
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "width", "height", "accept", "query"),
    [
        (("PNG", "WEBP", "GIF", "TIFF", "progressive", "JPEG"), 7000, 7000, "application/json", ""),
        (("WEBP",) * 6, 7000, 7000, "application/json", ""),
        (("PNG",) * 3, 1, 40_000_000, "application/json", ""),
        (("PNG",) * 6, 7000, 7000, "image/jpeg", ""),
        (("PNG", "JPEG", "WEBP") * 2, 7000, 7000, "application/json", "tile=560"),  # 256 windows
    ],
    ids=["all kinds", "the dearest", "the longest", "drawn", "tiled"],
)
def test_large_legal_pictures_stay_within_the_memory_and_keep_nobody_waiting(
    tmp_path: Path, kinds: tuple[str, ...], width: int, height: int, accept: str, query: str
) -> None:
    made = {kind: large(kind, width, height) for kind in set(kinds)}
    flags = ("--decode-threads", "2", "--threads", "1", "--request-timeout-seconds", "60")
    with server_process(tmp_path, *flags) as server, ThreadPoolExecutor(6) as pool:
        ask(server, picture(90, 60))  # the children have started
        rest = memory(process := psutil.Process(server.process.pid))
        with watched(server) as watch:
            statuses = list(pool.map(lambda kind: ask(server, made[kind], accept, query), kinds))
        assert set(statuses) <= {200, 429, 504}, statuses
        assert 200 in statuses
        assert watch.highest - rest <= Budget.of(2).total, f"{(watch.highest - rest) / 2**20:.0f} MiB"
        assert watch.slowest_probe <= 1
        assert watch.slowest_answer <= 5
        left = [0]

        def is_back() -> bool:
            left[0] = memory(process) - rest
            return left[0] <= SETTLED

        wait_until(is_back)


@pytest.mark.slow
def test_after_a_504_nothing_of_it_runs_on(tmp_path: Path) -> None:
    image = large("WEBP", 7000, 7000)
    flags = ("--decode-threads", "1", "--threads", "1", "--request-timeout-seconds", "0.3")
    with server_process(tmp_path, *flags) as server:
        assert ask(server, image) == 504
        process = psutil.Process(server.process.pid)

        def cpu_seconds() -> float:
            return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children()))

        wait_until(lambda: len(process.children()) == 1)
        ask(server, picture(90, 60, kind="PNG"))  # the new child has started
        before = cpu_seconds()
        time.sleep(1)
        assert cpu_seconds() - before < 0.7, "a decode that runs on takes all of the second"


@pytest.mark.slow
def test_sigterm_ends_the_service_though_a_decode_runs_and_its_client_has_gone(tmp_path: Path) -> None:
    image = large("WEBP", 7000, 7000)
    flags = ("--decode-threads", "1", "--threads", "1", "--drain-delay-seconds", "0")
    with server_process(tmp_path, *flags) as server:
        children = psutil.Process(server.process.pid).children()
        with connected(server.url) as leaving:
            leaving.sendall(request_head(len(image)) + image)
            time.sleep(0.2)
        server.process.terminate()
        assert server.process.wait(30) == 0
        wait_until(lambda: not any(child.is_running() for child in children))
