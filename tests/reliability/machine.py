"""The machine against the service: what is documented happens, and it recovers without a hand."""

import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from tests.reliability.gate import Figures, Work
from tests.support import cgroups
from tests.support.load import PNG, Scrape, ask, blocks, connected, constantly, free_ports
from tests.support.replicas import HAPROXY, REPLICAS, proxy
from tests.support.serving import ServerProcess, picture, server_process, wait_until
from tests.system import test_faults

IMAGE = blocks(90, 80, seed=1)
STOPPED_SECONDS = 30
DESCRIPTORS = 80
CONNECTIONS = 300
LARGE = picture(3000, 2000, kind="BMP")
MEMORY_BYTES = 100 * 2**20
"""Less than a replica holds."""
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
CLOCK_STEPS = ("+1d", "-1d", "+10y", "-1h", "+0")
Counts = dict[str, int]


class NotRun(Exception):
    """This machine lacks something for it; the text says what."""


def is_fine(server: ServerProcess) -> bool:
    try:
        return ask(server.url, body=IMAGE).status == 200 and ask(server.url, "/healthz", method="GET").status == 200
    except (ConnectionError, http.client.HTTPException, TimeoutError):
        return False


def stopped_replica(folder: Path) -> Counts:
    """SIGSTOP: the proxy takes the replica out, the other one serves all; SIGCONT: it serves again."""
    if HAPROXY is None:
        raise NotRun("haproxy")
    served = itertools.count()

    def call(client: int) -> None:
        assert ask(through.url, "/detect", IMAGE, PNG).status == 200
        next(served)

    with contextlib.ExitStack() as stack:
        ports = free_ports(2)
        first, _ = (
            stack.enter_context(server_process(folder, "--threads", "1", "--port", str(port))) for port in ports
        )
        through = stack.enter_context(proxy(folder, *ports))
        wait_until(lambda: through.serves_with(*REPLICAS))
        first.process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + STOPPED_SECONDS
        wait_until(lambda: through.serves_with(REPLICAS[1]))
        with constantly(4, call):
            time.sleep(max(0.0, end - time.monotonic()))
            before = next(served)
            assert before > 0
            first.process.send_signal(signal.SIGCONT)
            wait_until(lambda: through.serves_with(*REPLICAS))
            wait_until(lambda: next(served) > before + 100)
        assert is_fine(first)
    return {"served_while_a_replica_is_stopped": before}


def no_descriptors(folder: Path) -> Counts:
    """Connections beyond RLIMIT_NOFILE: what is connected is served on; once they end, everyone is."""
    with server_process(folder, "--threads", "1") as server, contextlib.ExitStack() as stack:
        with httpx.Client(base_url=server.url, timeout=60) as known:
            assert known.post("/detect", content=IMAGE).status_code == 200
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            connections = [stack.enter_context(connected(server.url)) for _ in range(CONNECTIONS)]
            held = psutil.Process(server.process.pid)
            wait_until(lambda: held.num_fds() >= DESCRIPTORS - 1)
            answers = [known.post("/detect", content=IMAGE).status_code for _ in range(20)]
            assert answers == [200] * 20, answers
            share = cpu_share(held, 3)
            assert share < 0.5, f"{share:.0%} of a core goes into accepting what cannot be accepted"
            for connection in connections:
                connection.close()
        wait_until(lambda: is_fine(server))
        wait_until(lambda: held.num_fds() < DESCRIPTORS // 2)
    return {"connections_beyond_the_descriptors": CONNECTIONS - DESCRIPTORS}


def cpu_share(process: psutil.Process, seconds: float) -> float:
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return float(sum(process.cpu_times()[:2]) - before) / seconds


@contextlib.contextmanager
def restarted(folder: Path, *flags: str) -> Iterator[list[ServerProcess]]:
    """Keep a service running as Docker does: one that ends is started again. The last of the list is the one now."""
    processes, over = list[ServerProcess](), threading.Event()

    def keep() -> None:
        while not over.is_set():
            with server_process(folder, *flags) as server:
                processes.append(server)
                while server.process.poll() is None and not over.is_set():
                    time.sleep(0.05)

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        wait_until(lambda: bool(processes))
        yield processes
    finally:
        over.set()
        keeper.join()


def killed_by_memory(folder: Path) -> Counts:
    """A memory limit that kills one of two: the other serves, what was in flight is lost at most, and it comes back."""
    if reason := cgroups.missing("memory"):
        raise NotRun(reason)
    with restarted(folder, "--threads", "1") as limited, server_process(folder, "--threads", "1") as other:
        wait_until(lambda: is_fine(limited[0]))
        children = psutil.Process(limited[0].process.pid).children()
        with cgroups.limited("memory", limited[0].process.pid) as group, ThreadPoolExecutor(8) as pool:
            with contextlib.suppress(OSError):  # what is held cannot all be given back: the next page kills
                (group / "memory.limit_in_bytes").write_text(str(MEMORY_BYTES))
            pool.map(lambda _: quietly(limited[0], LARGE), range(32))
            assert is_fine(other)
            wait_until(lambda: limited[0].process.poll() is not None)
        wait_until(lambda: len(limited) > 1 and is_fine(limited[-1]))
        assert limited[0].process.returncode == -signal.SIGKILL
        wait_until(lambda: not any(child.is_running() for child in children))
    return {"killed_by_a_memory_limit": 1}


def quietly(server: ServerProcess, image: bytes) -> int:
    try:
        return ask(server.url, body=image, headers={}).status
    except (ConnectionError, http.client.HTTPException, TimeoutError):
        return 0


def a_tenth_of_a_cpu(folder: Path) -> Counts:
    """A tenth of a core: answers or refusals, probes pass; the whole core again: all is as before."""
    if reason := cgroups.missing("cpu"):
        raise NotRun(reason)
    statuses: list[int] = []

    def call(client: int) -> None:
        statuses.append(ask(server.url, body=IMAGE).status)
        assert ask(server.url, "/healthz", method="GET").status == 200

    tenth = {"cpu__cfs_period_us": cgroups.PERIOD_MICROSECONDS, "cpu__cfs_quota_us": cgroups.PERIOD_MICROSECONDS // 10}
    with server_process(folder, "--threads", "1") as server:
        with cgroups.limited("cpu", server.process.pid, **tenth), constantly(8, call):
            time.sleep(15)
        assert set(statuses) <= {200, 429, 504}, set(statuses)
        assert statuses.count(200) > 0
        wait_until(lambda: is_fine(server))
    return {"answers_on_a_tenth_of_a_cpu": statuses.count(200)}


def clock_steps(folder: Path) -> Counts:
    """The clock of the day jumps by days and years, both ways: nothing is late, nothing is counted backwards."""
    if FAKETIME is None:
        raise NotRun("libfaketime")
    clock = folder / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    answered = 0
    with server_process(folder, "--threads", "1", "--model-poll-seconds", "0.1", environment=fake) as server:
        for step in CLOCK_STEPS:
            clock.write_text(step)
            replies = [ask(server.url, body=IMAGE) for _ in range(50)]
            assert {reply.status for reply in replies} == {200}
            timings = [value for reply in replies for value in json.loads(reply.body)["timing_ms"].values()]
            assert min(timings) >= 0 and max(timings) < 60_000
            answered += len(replies)
        years = {str(line["time"])[:4] for line in server.log()}
        assert len(years) > 1, "the service did not see the steps"
        assert Scrape(server.url).by_label("retinaserve_model_reloads_total", "outcome") == {}
        assert is_fine(server)
    return {"answers_over_clock_steps": answered}


def full_disk(folder: Path) -> Counts:
    """A file system with no room, for the log too: requests are served; with room again the log goes on."""
    test_faults.test_where_no_byte_can_be_written_requests_are_served(folder)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise NotRun("rights to mount a file system")
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "retinaserve-test", str(small)], check=True)
    try:
        with server_process(small, "--threads", "1", model_path=tiny(folder)) as server:
            filler = small / "filler"
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(2**20))
            assert {ask(server.url, body=IMAGE).status for _ in range(300)} == {200}
            assert shutil.disk_usage(small).free == 0
            filler.unlink()
            lines = server.log_path.stat().st_size
            assert is_fine(server)
            wait_until(lambda: server.log_path.stat().st_size > lines)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    return {"answers_without_room_on_the_disk": 300}


def tiny(folder: Path) -> Path:
    from tests.support.tiny_model import write_tiny_model

    write_tiny_model(folder / "tiny.onnx")
    return folder / "tiny.onnx"


def hung_inference(folder: Path) -> Counts:
    test_faults.test_a_network_that_hangs_is_told_by_504_and_the_probes_and_does_not_hold_up_the_end(folder)
    return {"hung_inferences_found_by_the_probes": 1}


FAULTS: Mapping[str, Callable[[Path], Counts]] = {
    "hung inference": hung_inference, "stopped replica": stopped_replica, "full disk": full_disk,
    "no descriptors": no_descriptors, "killed by memory": killed_by_memory, "a tenth of a CPU": a_tenth_of_a_cpu,
    "clock steps": clock_steps,
}  # fmt: skip


def run(work: Work) -> Figures:
    """Take the faults in turn."""
    figures: Counts = {}
    for number in range(work.first, work.first + work.count):
        name, fault = list(FAULTS.items())[number % len(FAULTS)]
        folder = work.folder / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        try:
            figures |= fault(folder)
        except NotRun as reason:
            figures[f"not_run:_{name},_for_want_of_{reason}"] = 1
    return figures
