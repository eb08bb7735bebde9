"""The line: all admitted jobs, in order, under one lock. It admits or refuses, and chooses a worker's next step.

A job goes ENCODED → DECODING → READY → RUNNING → RAN. It holds a place in the first four states, and in RAN while a
drawing is due. It leaves once, and frees its place. A plain job leaves with its last run, before its answer is made. A
cancelled or late job leaves at once, or when the worker that has it comes back.

`admit`, `next`, `leave` and `evict` change the line; `refusal`, `snapshot` and `oldest_step` read it. A worker's `next`
records what it has done and chooses its next step in one critical section, so the worker that decoded a lone picture
also runs and answers it. Idle workers wait on seats. A thread that changes the line hands them the steps that have
become possible, so no worker sleeps while there is work, and none wakes for nothing.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, inf
from queue import Empty, SimpleQueue

from service.core.choice import Decode, End, Finish, Run, Step, Wait, Waiting, Work, choose
from service.core.job import DeadlineExceeded, Job, State
from service.core.rate import DrainRate
from service.core.refusals import QueueFull
from service.core.store import LoadedModel

MAX_RETRY_AFTER_SECONDS = 60


@dataclass(frozen=True)
class Snapshot:
    places_taken: int
    encoded: int
    ready: int
    """Canvases decoded and not yet on the device."""
    running: int
    """Canvases on the device."""
    expected_wait_seconds: float


@dataclass(eq=False)
class Seat:
    """A seat on which one worker waits for a step."""

    until: float | None = None
    """time.monotonic() at which it chooses again."""
    steps: "SimpleQueue[Step]" = field(default_factory=SimpleQueue)


class Line:
    """The line of one engine. Thread-safe: workers call `next`, and any thread may call the others."""

    def __init__(
        self,
        *,
        capacity: int,
        decode_threads: int,
        max_batch_delay_seconds: float = 0,
        max_decode_bytes: float = inf,
        max_decoded_bytes: float = inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()  # guards all that follows
        self._jobs: dict[Job, None] = {}  # those with a place
        self._first_deadline = inf  # none of them has an earlier one
        self._waiting = Waiting(decode_threads, max_batch_delay_seconds, max_decode_bytes, max_decoded_bytes)
        self._seated: list[Seat] = []
        self._rate = DrainRate()
        self._lost: Exception | None = None  # why nobody is served any more
        self._newest: LoadedModel | None = None

    def admit(self, jobs: Sequence[Job], timeout_seconds: float) -> None:
        """Give all the jobs a place, or none. QueueFull: too few are free, or the wait would exceed the timeout."""
        with self._lock:
            if (refusal := self._refusal(len(jobs), timeout_seconds)) is not None:
                raise refusal
            if not self._jobs:
                self._rate.start(self._clock())
            for job in jobs:
                self._jobs[job] = None
                self._first_deadline = min(self._first_deadline, job.deadline)
                self._waiting.append(job)
            if jobs[0].model is not self._newest:
                self._newest = jobs[0].model
                self._newest.detector.when_lane_freed(self.look_again)
            self._hand_out()

    def next(self, done: Work | None = None) -> Work | End:
        """Record what the worker has done, and wait for its next step."""
        seat = Seat()
        step = self.take(done, seat)
        while isinstance(step, Wait):
            step = self._rest(seat)
        return step

    def take(self, done: Work | None = None, seat: "Seat | None" = None) -> Step:
        """Record what the worker has done, and choose its next step or, if there is none, take a seat."""
        with self._lock:
            if done is not None:
                self._book(done)
            step = self._take()
            self._hand_out()
            return self._sit(step, seat)

    def leave(self, job: Job) -> None:
        """Begin no more of the job's work, because nobody waits for it. A second call has no effect."""
        with self._lock:
            self._leave(job)
            self._hand_out()

    def evict(self, error: Exception) -> None:
        """Fail all jobs, now and from now on: the device can serve no more."""
        with self._lock:
            self._lost = error
            for job in [job for job in self._jobs if job.state in (State.ENCODED, State.READY)]:
                self._leave(job, error)
            self._hand_out()

    def close(self) -> None:
        """End each worker as soon as no work is left."""
        with self._lock:
            self._waiting.closing = True
            self._hand_out()

    def look_again(self) -> None:
        """Hand out steps that a change outside the line made possible: a lane is free."""
        with self._lock:
            self._hand_out()

    def refusal(self, num_jobs: int, timeout_seconds: float) -> QueueFull | None:
        """Say why so many cannot be admitted now."""
        with self._lock:
            return self._refusal(num_jobs, timeout_seconds)

    def snapshot(self) -> Snapshot:
        with self._lock:
            waiting, running = self._waiting, sum(len(run.parts) for run in self._waiting.runs)
            return Snapshot(len(self._jobs), len(waiting.encoded), len(waiting.ready), running, self._expected_wait())

    def oldest_step(self) -> tuple[str, float] | None:
        """Return the kind of the oldest step under way, "run", "decode" or "finish", and its age in seconds."""
        with self._lock:
            oldest = next(iter(self._waiting.under_way), None)
            return None if oldest is None else (type(oldest).__name__.lower(), self._clock() - oldest.started)

    def _refusal(self, num_jobs: int, timeout_seconds: float) -> QueueFull | None:
        wait = self._expected_wait()
        retry_after_seconds = min(max(1, ceil(wait)), MAX_RETRY_AFTER_SECONDS)
        if len(self._jobs) + num_jobs > self.capacity:
            taken = f"{len(self._jobs)} of {self.capacity} places in the queue are taken, {num_jobs} asked for"
            return QueueFull(taken, retry_after_seconds)
        if wait > timeout_seconds:
            too_long = f"the expected wait of {wait:.1f} s exceeds the limit of {timeout_seconds:g} s"
            return QueueFull(too_long, retry_after_seconds)
        return None

    def _expected_wait(self) -> float:
        """Return the seconds until the canvases ahead have run, by the recent rates; 0 for an empty line."""
        return self._rate.seconds(len(self._jobs), sum(max(0, job.canvases_left - 1) for job in self._jobs))

    # Workers, seated and not.

    def _sit(self, step: Step, seat: Seat | None) -> Step:
        if isinstance(step, Wait) and seat is not None:
            seat.until = step.until
            self._seated.append(seat)
        return step

    def _rest(self, seat: Seat) -> Step:
        """Wait until a step is handed over, or until it is time to choose again."""
        timeout = None if seat.until is None else max(0.0, seat.until - self._clock())
        step: Step = Wait()
        with suppress(Empty):
            step = seat.steps.get(timeout=timeout)
        with self._lock:
            if seat in self._seated:
                self._seated.remove(seat)
            elif not seat.steps.empty():  # handed over in the moment that the time was up
                step = seat.steps.get()
            return self._sit(self._take(), seat) if isinstance(step, Wait) else step

    def _hand_out(self) -> None:
        """Give seated workers all possible steps, and one of them the time until which a batch may fill."""
        while self._seated:
            step = self._take()
            if isinstance(step, Wait) and (
                step.until is None or any(seat.until == step.until for seat in self._seated)
            ):
                return
            self._seated.pop().steps.put(step)
            if isinstance(step, Wait):
                return

    # What a step changes when it begins and when it is done. The lock is held.

    def _take(self) -> Step:
        """Choose a step and begin it."""
        now = self._clock()
        if now >= self._first_deadline:
            self._drop_late(now)
        step = choose(self._waiting, now)
        if isinstance(step, (Wait, End)):
            return step
        step.started = now
        self._waiting.begin(step)
        if isinstance(step, Run):
            started = time.perf_counter()
            for part in step.parts:
                if not part.job.in_hand:
                    part.job.watch.lap("queue", started)
                part.job.in_hand += 1
                if part.job.in_hand == part.job.parts_left:
                    part.job.state = State.RUNNING
        else:
            step.job.in_hand = 1
            if isinstance(step, Decode):
                step.job.state = State.DECODING
        return step

    def _book(self, done: Work) -> None:
        del self._waiting.under_way[done]
        if isinstance(done, Run):
            self._book_run(done)
            return
        job = done.job
        job.in_hand = 0
        if job.gone or isinstance(done, Finish):
            self._jobs.pop(job, None)
            return
        if (error := done.error or self._lost) is not None:
            self._leave(job, error)
            return
        job.state, job.parts, job.parts_left = State.READY, done.parts, len(done.parts)
        job.canvases_left = len(done.parts) + len(job.uncut)
        self._waiting.hold_picture(job)
        for part in done.parts:
            part.ready_at = self._clock()
            self._waiting.insert(part)

    def _book_run(self, done: Run) -> None:
        ended = time.perf_counter()
        for part in done.parts:
            part.job.in_hand -= 1
            if not part.job.in_hand:
                part.job.watch.lap("inference", ended)
        again = done.error is not None and len(done.parts) > 1 and not done.device_lost
        if not again:
            self._rate.count(len(done.parts), self._clock(), done.started, 1 + len(self._waiting.runs))
        ran: deque[Job] = deque()
        for number, part in enumerate(done.parts):
            if part.job.gone:
                if not part.job.in_hand:
                    self._jobs.pop(part.job, None)
            elif again:  # only the picture that fails alone shall fail
                part.alone, part.job.state = True, State.READY
                self._waiting.insert(part)
            elif done.error is not None:
                self._leave(part.job, done.error)
            else:
                part.candidates = done.candidates[number]
                self._book_part(part.job, ran)
        if ran:
            self._waiting.ran.append(ran)

    def _book_part(self, job: Job, ran: deque[Job]) -> None:
        """Record that a part of the job has run. After the last part that was cut, the next windows are due, behind all
        that wait. After the last of all, a plain job frees its place."""
        job.parts_left -= 1
        job.canvases_left -= 1
        if job.parts_left:
            return
        if job.uncut:
            job.state = State.ENCODED
            self._waiting.append(job)
            return
        job.state = State.RAN
        if job.draws:
            self._waiting.drawings.append(job)
        else:
            del self._jobs[job]
            ran.append(job)

    def _leave(self, job: Job, error: Exception | None = None) -> None:
        """Remove the job from all that wait. If a worker has it, its place is freed when that worker comes back."""
        if job.gone:
            return
        job.gone = True
        self._waiting.remove(job)
        if error is not None:
            job.fail(error)
        if not job.in_hand:
            self._jobs.pop(job, None)

    def _drop_late(self, now: float) -> None:
        for job in [job for job in self._jobs if job.deadline <= now]:
            self._leave(job, DeadlineExceeded("the answer was not ready in time"))
        self._first_deadline = min((job.deadline for job in self._jobs if not job.gone), default=inf)
