"""Waiting for the answers of jobs, until all have come, the time is up, or the client has gone."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Receive

from service.api.uploads import ClientGone
from service.core.job import DeadlineExceeded, Job


async def answers_of(
    jobs: Sequence[Job], receive: Receive, timeout_seconds: float, cancel: Callable[[Job], None]
) -> list[Any]:
    """Return each job's result or exception; DeadlineExceeded for those not done in time. ClientGone: it has left.

    On return, unfinished jobs are cancelled: work that nobody will read is not begun.
    """
    loop = asyncio.get_running_loop()
    enough, unfinished = loop.create_future(), len(jobs)

    def wake(_: object = None) -> None:
        if not enough.done():
            enough.set_result(None)

    def job_done(_: object) -> None:
        nonlocal unfinished
        unfinished -= 1
        if not unfinished:
            wake()

    gone = loop.create_task(_disconnected(receive))
    gone.add_done_callback(wake)
    timer = loop.call_later(timeout_seconds, wake)
    for job in jobs:
        job.future.add_done_callback(job_done)
    try:
        await enough
        if unfinished and gone.done():
            raise ClientGone("the connection was closed before the answer")
        late = DeadlineExceeded(f"the answer was not ready within {timeout_seconds:g} s")
        return [(job.future.exception() or job.future.result()) if job.future.done() else late for job in jobs]
    finally:
        timer.cancel()
        gone.cancel()
        for job in jobs:
            if not job.future.done():
                cancel(job)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
