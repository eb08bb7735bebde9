"""A group of processes with a limit of memory or CPU: cgroups of version 1, where this user may make some."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.serving import wait_until

ROOT = Path("/sys/fs/cgroup")
PERIOD_MICROSECONDS = 100_000


def missing(controller: str) -> str:
    """Say why there is no such group here; empty: there is."""
    folder = ROOT / controller
    return "" if (folder / "cgroup.procs").exists() and os.access(folder, os.W_OK) else f"needs a writable {folder}"


@contextlib.contextmanager
def limited(controller: str, process_id: int, **limits: int) -> Iterator[Path]:
    """Hold a process and its children to these limits, `memory.limit_in_bytes` written with `__` for the dot."""
    folder = ROOT / controller / f"retinaserve-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        for name, value in limits.items():
            (folder / name.replace("__", ".")).write_text(str(value))
        for each in (psutil.Process(process_id), *psutil.Process(process_id).children(recursive=True)):
            (folder / "cgroup.procs").write_text(str(each.pid))
        yield folder
    finally:
        wait_until(lambda: dissolved(folder))


def dissolved(group: Path) -> bool:
    """Let its processes out; those that are just ending hold it up for a while."""
    for process in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(process)
    try:
        group.rmdir()
    except OSError:
        return False
    return True
