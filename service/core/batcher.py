"""The queue before the device: bounded places, batches formed the moment the device is free. Knows no HTTP and no
model.

A place is taken when a request is admitted and given back when its job leaves the device or is dropped, so `capacity`
bounds all that is being decoded, waiting or running. The device threads form each batch themselves, under the queue's
lock: the oldest job first, then the oldest others of its group, so no rare group starves and nothing waits for a batch
to fill (unless `max_delay_seconds`). Gone jobs are dropped when a batch forms.

A batch has the device alone, or is one of up to `runs_at_once` that share it: `shares` decides when it forms. Beside
others only a full batch forms: who comes later would not be in it anyway, so nothing is lost by not waiting for them.

Threads: any thread may call any method. `run` and `deliver` are called on the device threads, or on one that lends
itself by `put_or_run`, and must not raise.
"""

import threading
import time
from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
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
    def admitted(self) -> float:
        """When it got its place, time.monotonic(). Who came first is first, however long its decoding took."""

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
        run: Callable[[list[JobT], bool], list[ResultT]],
        deliver: Callable[[list[JobT], list[ResultT]], None],
        *,
        capacity: int,
        max_delay_seconds: float = 0,
        runs_at_once: int = 1,
        shares: Callable[[bool], bool] = lambda crowded: True,
    ) -> None:
        """`run` answers a batch, in order, and is told whether the batch shares the device; `deliver` takes the answers
        after their places are free again, while another device thread may run the next batch. `shares` says whether a
        batch that forms now shares the device, by whether more wait or run; it is called under the queue's lock."""
        self._run = run
        self._deliver = deliver
        self.capacity = capacity
        self._max_delay_seconds = max_delay_seconds
        self._runs_at_once = runs_at_once
        self._shares = shares
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, JobT]] = []  # (since, job), first admitted first
        self._places_taken = 0
        self._runs: list[_Run] = []  # on the device, oldest first
        self._last_end = 0.0
        self._seconds_per_image = 0.0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"device_{number}", daemon=True)
            for number in range(runs_at_once + 1)  # while those run, one more can deliver
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self, timeout_seconds: float) -> bool:
        """Finish what waits, then end the device threads. False: a run has not ended."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._changed:  # a run may be on a thread that is not one of these
            all_ended = self._changed.wait_for(lambda: not self._runs, max(0.0, end - time.monotonic()))
        return all_ended and not any(thread.is_alive() for thread in self._threads)

    @property
    def depth(self) -> int:
        """Places taken."""
        return self._places_taken

    @property
    def waiting(self) -> int:
        """Jobs put and not yet on the device."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs on the device."""
        return sum(run.count for run in self._runs)

    @property
    def run_seconds(self) -> float:
        """How long the oldest batch on the device has been there; 0 when it is free."""
        with self._changed:
            return time.monotonic() - self._runs[0].started if self._runs else 0.0

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
            if (refusal := self.refusal(count, timeout_seconds)) is not None:
                raise refusal
            self._places_taken += count

    def refusal(self, count: int, timeout_seconds: float) -> QueueFull | None:
        """Why so many places cannot be taken now."""
        if self._places_taken + count > self.capacity:
            taken = f"{self._places_taken} of {self.capacity} places in the queue are taken, {count} asked for"
            return QueueFull(taken, self.retry_after_seconds)
        if self.expected_wait_seconds > timeout_seconds:
            wait = f"the expected wait of {self.expected_wait_seconds:.1f} s"
            return QueueFull(f"{wait} exceeds the limit of {timeout_seconds:g} s", self.retry_after_seconds)
        return None

    def give_back_place(self) -> None:
        """For a job that was admitted and never put, or that `remove` took out."""
        with self._changed:
            self._places_taken -= 1

    def put(self, job: JobT) -> None:
        """Queue a job that has a place."""
        with self._changed:
            insort(self._waiting, (time.monotonic(), job), key=lambda entry: entry[1].admitted)
            if self._has_room():
                self._changed.notify()

    def put_or_run(self, job: JobT) -> None:
        """Queue a job that has a place; or, if all is idle, be its device thread: it need not wait for one to wake."""
        with self._changed:
            if self._runs or self._waiting or self._max_delay_seconds:
                self.put(job)
                return
            run = self._take([job], self._shares(False))
        self._process([job], run, lent=True)

    def remove(self, job: JobT) -> bool:
        """Take a waiting job out and give its place back. False: it does not wait (yet, or any more)."""
        with self._changed:
            left = [entry for entry in self._waiting if entry[1] is not job]
            removed = len(left) < len(self._waiting)
            self._waiting = left
            self._places_taken -= removed
            return removed

    def _work(self) -> None:
        while taken := self._next_batch():
            self._process(*taken)

    def _process(self, batch: list[JobT], run: "_Run", *, lent: bool = False) -> None:
        results = self._run(batch, run.shares)
        self._end(run, lent)
        self._deliver(batch, results)

    def _next_batch(self) -> "tuple[list[JobT], _Run] | None":
        """Wait for jobs and take them onto the device; None means closed."""
        with self._changed:
            while True:
                self._drop_gone()
                delay_left = None
                if self._waiting and self._has_room():
                    batch = self._form()
                    delay_left = self._delay_left(batch)
                    if delay_left is not None and delay_left <= 0:
                        crowded = bool(self._runs) or len(self._waiting) > len(batch)
                        run = self._take(batch, self._shares(crowded))
                        if self._waiting and self._has_room():
                            self._changed.notify()  # each wakes the next: to wake all for one place costs them time
                        return batch, run
                elif self._closing and not self._waiting:
                    return None
                self._changed.wait(delay_left)

    def _has_room(self) -> bool:
        """One more run may start: none does, or all share the device, and so would it."""
        if not self._runs:
            return True
        return len(self._runs) < self._runs_at_once and all(run.shares for run in self._runs) and self._shares(True)

    def _drop_gone(self) -> None:
        alive = [entry for entry in self._waiting if not entry[1].gone]
        self._places_taken -= len(self._waiting) - len(alive)
        self._waiting = alive

    def _form(self) -> list[JobT]:
        """The batch that the oldest job leads."""
        _, oldest = self._waiting[0]
        return [job for _, job in self._waiting if job.group == oldest.group][: oldest.max_batch_size]

    def _delay_left(self, batch: list[JobT]) -> float | None:
        """The seconds that this batch may still wait for more; None: until one that runs has ended."""
        if self._closing or len(batch) == batch[0].max_batch_size:
            return 0
        if self._runs:
            return None
        since = min(since for since, job in self._waiting if job.group == batch[0].group)
        return since + self._max_delay_seconds - time.monotonic()

    def _take(self, batch: list[JobT], shares: bool) -> "_Run":
        taken = {id(job) for job in batch}
        self._waiting = [entry for entry in self._waiting if id(entry[1]) not in taken]
        run = _Run(len(batch), time.monotonic(), shares)
        self._runs.append(run)
        return run

    def _end(self, run: "_Run", lent: bool) -> None:
        """Wakes another thread for what waits, if the device would be idle until this one has delivered."""
        with self._changed:
            now = time.monotonic()
            newest = (now - max(run.started, self._last_end)) / run.count  # runs overlap; what counts is the rate
            average = self._seconds_per_image
            self._seconds_per_image = average + NEWEST_SHARE * (newest - average) if average else newest
            self._last_end = now
            self._runs.remove(run)
            self._places_taken -= run.count
            if self._closing:
                self._changed.notify_all()
            elif self._waiting and (lent or not self._runs):
                self._changed.notify()


@dataclass(frozen=True, eq=False)
class _Run:
    """A batch on the device."""

    count: int
    started: float
    """time.monotonic()"""
    shares: bool
    """The device, with others."""
