"""The queue before the device: bounded places, batches formed the moment the device is free. Knows no HTTP and no
model.

A place is taken when a request is admitted and given back when its job leaves the device or is dropped, so `capacity`
bounds all that is being decoded, waiting or running. One device thread forms each batch itself, under the queue's lock,
when it has finished the last one: the oldest job first, then the oldest others of its group, so no rare group starves
and nothing waits for a batch to fill (unless `max_delay_seconds`). Gone jobs are dropped when a batch forms.

Threads: any thread may call any method. `run` and `deliver` are called on the device thread and must not raise.
"""

import threading
import time
from collections.abc import Callable, Hashable
from math import ceil
from typing import Generic, Protocol, TypeVar

MAX_RETRY_AFTER_SECONDS = 60
NEWEST_SHARE = 0.2
"""Weight of the newest batch in the moving average of the seconds that one image takes."""


class Job(Protocol):
    @property
    def group(self) -> Hashable:
        """Jobs of one group may share a batch."""

    @property
    def max_batch_size(self) -> int: ...

    @property
    def gone(self) -> bool:
        """Nobody waits for it any more: its client left or its deadline has passed."""


JobT = TypeVar("JobT", bound=Job)
ResultT = TypeVar("ResultT")


class QueueFull(Exception):
    """No place is free, or the wait would exceed the deadline. Try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Batcher(Generic[JobT, ResultT]):
    def __init__(
        self,
        run: Callable[[list[JobT]], list[ResultT]],
        deliver: Callable[[list[JobT], list[ResultT]], None],
        *,
        capacity: int,
        max_delay_seconds: float = 0,
    ) -> None:
        """`run` answers a batch, in order; `deliver` takes the answers after their places are free again."""
        self._run = run
        self._deliver = deliver
        self.capacity = capacity
        self._max_delay_seconds = max_delay_seconds
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, JobT]] = []  # (since, job), oldest first
        self._places_taken = 0
        self._running = 0
        self._run_started: float | None = None
        self._seconds_per_image = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_seconds: float) -> bool:
        """Finish what waits, then end the device thread. False: it is still busy."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    @property
    def depth(self) -> int:
        """Places taken."""
        return self._places_taken

    @property
    def running(self) -> int:
        """Jobs on the device."""
        return self._running

    @property
    def run_seconds(self) -> float:
        """How long the device has been at its present batch; 0 when it is free."""
        started = self._run_started
        return 0.0 if started is None else time.monotonic() - started

    @property
    def expected_wait_seconds(self) -> float:
        """What the places taken will cost the device, by its recent rate."""
        return self._places_taken * self._seconds_per_image

    @property
    def retry_after_seconds(self) -> int:
        """Whole seconds until what is admitted now has drained."""
        return min(max(1, ceil(self.expected_wait_seconds)), MAX_RETRY_AFTER_SECONDS)

    def take_places(self, count: int, timeout_seconds: float) -> None:
        """Take all `count` places or none. QueueFull: they are not free, or would not be served within the timeout.

        An empty queue has no expected wait, so a wrong estimate is always corrected by a next run.
        """
        with self._changed:
            if self._places_taken + count > self.capacity:
                raise QueueFull(
                    f"{self._places_taken} of {self.capacity} places in the queue are taken, {count} asked for",
                    self.retry_after_seconds,
                )
            if self.expected_wait_seconds > timeout_seconds:
                wait = f"the expected wait of {self.expected_wait_seconds:.1f} s"
                raise QueueFull(f"{wait} exceeds the limit of {timeout_seconds:g} s", self.retry_after_seconds)
            self._places_taken += count

    def give_back_place(self) -> None:
        """For a job that was admitted and never put, or that `remove` took out."""
        with self._changed:
            self._places_taken -= 1

    def put(self, job: JobT) -> None:
        """Queue a job that has a place."""
        with self._changed:
            self._waiting.append((time.monotonic(), job))
            self._changed.notify_all()

    def remove(self, job: JobT) -> bool:
        """Take a waiting job out and give its place back. False: it does not wait (yet, or any more)."""
        with self._changed:
            left = [entry for entry in self._waiting if entry[1] is not job]
            removed = len(left) < len(self._waiting)
            self._waiting = left
            self._places_taken -= removed
            return removed

    def _work(self) -> None:
        while batch := self._next_batch():
            results = self._run(batch)
            self._finish(len(batch))
            self._deliver(batch, results)

    def _next_batch(self) -> list[JobT]:
        """Wait for jobs and take them onto the device; [] means closed."""
        with self._changed:
            while True:
                self._drop_gone()
                if self._waiting:
                    batch, delay_left = self._form()
                    if delay_left <= 0 or self._closing:
                        self._take(batch)
                        return batch
                    self._changed.wait(delay_left)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()

    def _drop_gone(self) -> None:
        alive = [entry for entry in self._waiting if not entry[1].gone]
        self._places_taken -= len(self._waiting) - len(alive)
        self._waiting = alive

    def _form(self) -> tuple[list[JobT], float]:
        """The batch that the oldest job leads, and the seconds it may still wait for more."""
        since, oldest = self._waiting[0]
        batch = [job for _, job in self._waiting if job.group == oldest.group][: oldest.max_batch_size]
        if len(batch) == oldest.max_batch_size:
            return batch, 0
        return batch, since + self._max_delay_seconds - time.monotonic()

    def _take(self, batch: list[JobT]) -> None:
        taken = {id(job) for job in batch}
        self._waiting = [entry for entry in self._waiting if id(entry[1]) not in taken]
        self._running = len(batch)
        self._run_started = time.monotonic()

    def _finish(self, count: int) -> None:
        with self._changed:
            assert self._run_started is not None
            newest = (time.monotonic() - self._run_started) / count
            average = self._seconds_per_image
            self._seconds_per_image = average + NEWEST_SHARE * (newest - average) if average else newest
            self._run_started = None
            self._running = 0
            self._places_taken -= count
