"""Calls that other processes make from the start of a session of tests on, while tests wait for servers: exports.

    FILE = Background(exported, 500)    # exported(folder, 500), once, in a folder of its own
    @pytest.mark.needs(FILE)            # begins when a session does that has this test
    def test_it() -> None:
        detector = Detector(FILE.result())

The processes give way to all others (`nice`) and end with the last call. tests/conftest.py begins and ends them, in the
environments of tests/foreign too: so this needs the standard library alone.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any, Generic, TypeVar

PROCESSES = 2
"""Each imports torch once, and keeps one core busy for 10 to 30 s an export."""
NICENESS = 5
Made = TypeVar("Made")
pools: list[Pool] = []


class Background(Generic[Made]):
    """A call of `make` with a new folder and the arguments; all are pickled, and so is what it makes."""

    def __init__(self, make: Callable[..., Made], *arguments: object) -> None:
        self.make, self.arguments = make, arguments
        self.running: AsyncResult[Made] | None = None

    def result(self) -> Made:
        """Wait for what it makes, or raise its error."""
        begin([self])
        assert self.running is not None
        return self.running.get()


def begin(calls: "Iterable[Background[Any]]") -> None:
    """Have processes make them in this order; those that were begun go on."""
    new = [call for call in dict.fromkeys(calls) if call.running is None]
    if new:
        pools.append(multiprocessing.get_context("spawn").Pool(min(PROCESSES, len(new)), give_way))
    for call in new:
        call.running = pools[-1].apply_async(call.make, (Path(tempfile.mkdtemp(dir=folders().name)), *call.arguments))
    if new:
        pools[-1].close()


def give_way() -> None:
    """Let other processes compute first, and write nothing among what pytest writes."""
    os.nice(NICENESS)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@cache
def folders() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="background-")


def end() -> None:
    """Kill what nobody waits for any more, and remove the folders."""
    for pool in pools:
        pool.terminate()
    if pools:
        folders().cleanup()
