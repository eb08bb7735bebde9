"""A worker's next step: a pure function of the waiting jobs, the work under way, the lanes and the time.

`Waiting` holds what waits and what is under way. The line alone changes it, under its lock; `choose` reads it.

The order is: run if a lane is free; finish; decode or draw, the older job first among those that memory and large
pictures leave room for. A batch is led by the oldest part, and the oldest others of its model and canvas join. The
device runs one model at a time. While another batch runs, only a full one starts: pictures that come before that run
ends can still join any other batch.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import count, islice
from math import inf

from model.detector import Lane
from model.types import Candidates
from service.core.job import Job, Part, State
from service.core.store import LoadedModel

TURNS_AHEAD = 2
"""Canvases decoded ahead, in multiples of what the device takes at once. Decoding all pictures of a burst at once would
delay the first by the decoding of the last, and hold the pixels of all."""
LARGEST_SHARE = 15 / 16
"""Largest share of the decoding memory for one picture; the rest is for small ones."""
LARGE_BYTES = 256 * 2**20
"""Decoding memory from which a picture is large; its decoding takes half a second or more."""
MAX_UNFINISHED_BATCHES = 2
"""Batches that have run and are not yet answered, at which no run starts."""


@dataclass(eq=False)
class Run:
    """Run these parts, of one model and canvas, on this lane."""

    parts: list[Part]
    lane: Lane
    started: float = 0
    candidates: list[Candidates] = field(default_factory=list)
    """Result, left by the worker: one for each part, unless there is an error."""
    error: Exception | None = None
    """Error of the whole batch, left by the worker."""
    device_lost: bool = False
    """True, left by the worker: the device is lost, and nothing is tried again."""

    @property
    def model(self) -> LoadedModel:
        return self.parts[0].job.model


@dataclass(eq=False)
class Decode:
    """Decode this job's picture."""

    job: Job
    started: float = 0
    parts: list[Part] = field(default_factory=list)
    """Result, left by the worker, unless there is an error."""
    error: Exception | None = None
    """Error, left by the worker."""


@dataclass(eq=False)
class Finish:
    """Make this job's answer; a drawing takes as long as a decode."""

    job: Job
    started: float = 0


@dataclass(frozen=True)
class Wait:
    """There is nothing to do before `until`, time.monotonic(); None: until the line changes."""

    until: float | None = None


@dataclass(frozen=True)
class End:
    """The line is closed and there is nothing left to do."""


Work = Run | Decode | Finish
Step = Work | Wait | End


@dataclass
class Waiting:
    """All jobs that wait and all work under way, the oldest first."""

    decode_threads: int
    """Workers that may decode or draw at once."""
    max_batch_delay_seconds: float = 0
    max_decode_bytes: float = inf
    """Most memory of all pictures being decoded or drawn; a single picture may take more."""
    max_decoded_bytes: float = inf
    """Most bytes of canvases decoded ahead; a single one may hold more."""
    large_bytes: int = LARGE_BYTES
    """Decoding memory from which a picture is large."""
    large_last: bool = False
    """True: the last picture whose decoding or drawing began is a large one."""
    encoded: deque[Job] = field(default_factory=deque)
    ready: list[Part] = field(default_factory=list)
    """Parts that wait for the device; those to be run again come first."""
    ran: deque[deque[Job]] = field(default_factory=deque)
    """Jobs to be finished, a deque for each batch."""
    drawings: deque[Job] = field(default_factory=deque)
    """Drawings to be finished, by workers that decode."""
    cut: dict[Job, int] = field(default_factory=dict)
    """Bytes of the pictures that jobs hold because windows are still to be cut."""
    under_way: dict[Work, None] = field(default_factory=dict)
    closing: bool = False

    turns: "count[int]" = field(default_factory=count)

    @property
    def runs(self) -> list[Run]:
        return [work for work in self.under_way if isinstance(work, Run)]

    def needed_bytes(self, job: Job) -> int:
        """Return the memory of its next step at a decoder; cutting windows from a held picture takes none."""
        return 0 if job in self.cut else job.decode_bytes

    def hold_picture(self, job: Job) -> None:
        """Count the job's picture as held, or as no longer held."""
        self.cut.pop(job, None)
        if job.picture is not None:
            self.cut[job] = job.picture.nbytes

    def append(self, job: Job) -> None:
        """Append the job, to be decoded."""
        job.turn = next(self.turns)
        self.encoded.append(job)

    def insert(self, part: Part) -> None:
        """Let the part wait for the device, in its job's turn."""
        insort(self.ready, part, key=_order)

    def begin(self, work: Work) -> None:
        """Remove the chosen work from what waits."""
        self.under_way[work] = None
        if isinstance(work, Decode) or (isinstance(work, Finish) and work.job.draws):
            self.large_last = self.needed_bytes(work.job) >= self.large_bytes
        if isinstance(work, Run):
            self._begin_run(work)
        elif isinstance(work, Decode):
            self.encoded.remove(work.job)
        elif work.job.draws:
            self.drawings.remove(work.job)
        else:
            self.ran[0].popleft()
            if not self.ran[0]:
                self.ran.popleft()

    def _begin_run(self, run: Run) -> None:
        """Put the remaining parts of the batch's jobs behind all others that wait now."""
        batch, jobs = set(run.parts), {part.job for part in run.parts}
        self.ready = [part for part in self.ready if part not in batch]
        for job in {part.job: None for part in self.ready if part.job in jobs}:
            job.turn = next(self.turns)
            self.ready.sort(key=_order)

    def remove(self, job: Job) -> None:
        """Remove the job from all that waits."""
        self.cut.pop(job, None)
        if job.state is State.ENCODED:
            self.encoded.remove(job)
        elif job.state is State.RAN:
            self.drawings = deque(drawing for drawing in self.drawings if drawing is not job)
        else:
            self.ready = [part for part in self.ready if part.job is not job]


def choose(waiting: Waiting, now: float) -> Step:
    """Choose the next step of one worker. A Run takes its lane; nothing else changes. `now` is time.monotonic()."""
    run = _run(waiting, now)
    if isinstance(run, Run):
        return run
    if waiting.ran:
        return Finish(waiting.ran[0][0])
    if (job := _decode_or_draw(waiting)) is not None:
        return Finish(job) if job.state is State.RAN else Decode(job)
    if waiting.closing and not (waiting.encoded or waiting.ready or waiting.drawings):
        return End()
    return run or Wait()


def _run(waiting: Waiting, now: float) -> Run | Wait | None:
    """Return the run that can start; Wait: its batch waits to be filled; None: no run can start."""
    if not waiting.ready or len(waiting.ran) >= MAX_UNFINISHED_BATCHES:
        return None
    runs = waiting.runs
    for batch in _batches(waiting):
        leader = batch[0]
        model = leader.job.model
        if runs and runs[0].model is not model:
            return None
        if not (leader.alone or waiting.closing or len(batch) == model.max_batch_size):
            if runs:
                return None
            until = min(part.ready_at for part in batch) + waiting.max_batch_delay_seconds
            if until > now:
                return Wait(until)
        concurrent = bool(runs) or len(waiting.ready) > len(batch)
        lane = model.detector.free_lane(leader.canvas.canvas_size, len(batch), concurrent=concurrent)
        if lane is not None:
            return Run(batch, lane)
    return None


def _batches(waiting: Waiting) -> Iterator[list[Part]]:
    """Return the batch that each group's oldest part leads, the oldest leader first."""
    seen = set()
    for leader in waiting.ready:
        if leader.alone:
            yield [leader]
        elif leader.group not in seen:
            seen.add(leader.group)
            like = (part for part in waiting.ready if part.group == leader.group and not part.alone)
            yield list(islice(like, leader.job.model.max_batch_size))


def _decode_or_draw(waiting: Waiting) -> Job | None:
    """Return the job that a decoder takes next: the oldest allowed one. Large pictures leave one decoder to small ones;
    with a single decoder, a small one follows each large one."""
    decoding = [work.job for work in waiting.under_way if isinstance(work, Decode)]
    drawing = [work.job for work in waiting.under_way if isinstance(work, Finish) and work.job.draws]
    taken = [waiting.needed_bytes(job) for job in decoding + drawing]
    if len(taken) >= waiting.decode_threads:
        return None
    encoded = waiting.encoded if _is_next(waiting, len(decoding)) else ()
    due = list(merge(waiting.drawings, encoded, key=lambda job: job.turn))
    small = [job for job in due if waiting.needed_bytes(job) < waiting.large_bytes]
    num_large = sum(count >= waiting.large_bytes for count in taken)
    if num_large >= max(1, waiting.decode_threads - 1) or (waiting.large_last and small):
        due = small
    return _first_that_fits(waiting, due, [min(count, LARGEST_SHARE * waiting.max_decode_bytes) for count in taken])


def _first_that_fits(waiting: Waiting, due: Iterable[Job], taken: Sequence[float]) -> Job | None:
    """Return the first job, unless memory is short. While one large picture holds most of it, smaller jobs overtake
    those that wait for memory. Otherwise no job that needs memory overtakes, so that a large one gets its turn."""
    held, limit = [*taken, *waiting.cut.values()], waiting.max_decode_bytes
    left = limit - sum(held) if held else inf
    others_pass, passing = max(held, default=0) > limit / 2, True
    for job in due:
        needed = waiting.needed_bytes(job)
        if not needed or (passing and needed <= left):
            return job
        passing = others_pass
    return None


def _is_next(waiting: Waiting, decoding: int) -> bool:
    """Tell whether so few canvases are decoded or being decoded that the device takes the next one soon."""
    if not waiting.encoded:
        return False
    model, ahead = waiting.encoded[0].model, len(waiting.ready) + decoding
    in_turn = TURNS_AHEAD * model.detector.lanes * model.max_batch_size + waiting.decode_threads
    return not ahead or (ahead < in_turn and (ahead + 1) * model.canvas_bytes <= waiting.max_decoded_bytes)


def _order(part: Part) -> tuple[bool, int]:
    """Sort key: parts to be run again first, then by arrival."""
    return not part.alone, part.job.turn
