"""The line's verbs: who gets a place, who leaves it when, and that no worker sleeps while there is something to do.

Without threads `take` plays the workers, one step at a time; jobs are letters.
"""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest

from model.detector import InferenceFailed
from model.tiles import Window
from model.types import Candidates, CanvasImage
from service.core.choice import Decode, End, Finish, Run, Step, Wait, Work
from service.core.job import DeadlineExceeded, Job, Options, Part, State, Stopwatch
from service.core.line import Line
from service.core.refusals import QueueFull
from service.core.store import LoadedModel, NotReady
from tests.support.serving import FakeDetector, wait_until

WINDOW = Window(0, 0, 64, 64)
CANDIDATES = Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


class Loop:
    """An event loop that calls at once."""

    def call_soon_threadsafe(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)


class Answer(Future[Any]):
    """A job's future, for any thread."""

    def get_loop(self) -> Loop:
        return Loop()


def model(max_batch_size: int = 2, lanes: int = 1) -> LoadedModel:
    return LoadedModel(cast("Any", FakeDetector(lanes=lanes)), {}, {}, max_batch_size, "fake")


def cut_from(job: Job) -> list[Window]:
    """The next windows of a picture with tiles, two at a time, whose picture is held until the last are cut."""
    windows = [job.uncut.popleft() for _ in range(min(2, len(job.uncut)))]
    job.picture = np.zeros((1, 1, 3), np.uint8) if job.uncut else None
    return windows or [WINDOW]


class Scene:
    """A line whose clock stands still, and a worker for each step that is under way."""

    def __init__(self, *, capacity: int = 32, decode_threads: int = 2, lanes: int = 1, batch: int = 2) -> None:
        self.now = 0.0
        self.line = Line(capacity=capacity, decode_threads=decode_threads, clock=lambda: self.now)
        self.model = model(batch, lanes)
        self.names: dict[Job, str] = {}
        self.put_off: list[Step] = []

    def admit(self, names: str, *, deadline: float = 1e9, draws: bool = False, of: LoadedModel | None = None) -> None:
        jobs = [self.job(name, deadline, draws, of) for name in names]
        self.line.admit(jobs, timeout_seconds=30)

    def job(self, name: str, deadline: float, draws: bool, of: LoadedModel | None) -> Job:
        job = Job(
            bytearray(), of or self.model, Options(0.05, 0.5, 300), deadline, Stopwatch(), lambda *_: None, draws,
            cast("Any", Answer()),
        )  # fmt: skip
        self.names[job] = name
        return job

    def __getitem__(self, name: str) -> Job:
        return next(job for job, each in self.names.items() if each == name)

    def take(self, done: Work | None = None) -> Step:
        """Let a worker that has done this choose; one that has done nothing takes what was put off."""
        if done is None and self.put_off:
            return self.put_off.pop(0)
        return self.line.take(done)

    def told(self, step: Step) -> str:
        if isinstance(step, Run):
            return "run " + "".join(self.names[part.job] for part in step.parts)
        if isinstance(step, (Wait, End)):
            return type(step).__name__.lower()
        return f"{type(step).__name__.lower()} {self.names[step.job]}"

    def work(self, expected: str, done: Work | None = None) -> Any:
        """Take a step, which is the expected one."""
        step = self.take(done)
        assert self.told(step) == expected
        return step

    def did(self, step: Work) -> Work:
        """As a worker leaves it that meets no error."""
        if isinstance(step, Decode):
            step.parts = [Part(step.job, CanvasImage.uniform((64, 64))) for _ in cut_from(step.job)]
        elif isinstance(step, Run):
            self.end_run(step)
            step.candidates = [CANDIDATES] * len(step.parts)
        return step

    def failed(self, step: Work, error: Exception, **left: object) -> Work:
        assert isinstance(step, (Decode, Run))
        if isinstance(step, Run):
            self.end_run(step)
        step.error = error
        for name, value in left.items():
            setattr(step, name, value)
        return step

    def end_run(self, run: Run) -> None:
        cast("Any", run.lane).free()

    def decode(self, names: str) -> None:
        """A worker decodes these, one after the other, while the device is busy or the line's choice is to decode."""
        done = None
        for name in names:
            done = self.did(self.work(f"decode {name}", done))
        assert done is not None
        self.book(done)

    def book(self, done: Work) -> None:
        """A worker is done; what it shall do next is put off."""
        step = self.line.take(done)
        if not isinstance(step, (Wait, End)):
            self.put_off.append(step)

    def error(self, name: str) -> BaseException | None:
        """Return the job's error; None: it has not failed."""
        future = self[name].future
        return future.exception() if future.done() else None

    @property
    def places(self) -> int:
        return self.line.snapshot().places_taken


def test_one_worker_takes_a_lone_picture_all_the_way() -> None:
    scene = Scene()
    scene.admit("a")
    decode = scene.work("decode a")
    run = scene.work("run a", scene.did(decode))
    assert scene.places == 1
    finish = scene.work("finish a", scene.did(run))
    assert scene.places == 0, "its place ends with its run, before its answer is made"
    scene.work("wait", finish)


def test_a_drawing_holds_its_place_until_it_is_made() -> None:
    scene = Scene()
    scene.admit("a", draws=True)
    run = scene.work("run a", scene.did(scene.work("decode a")))
    finish = scene.work("finish a", scene.did(run))
    assert scene.places == 1
    scene.work("wait", finish)
    assert scene.places == 0


def tiled(scene: Scene, name: str, num_windows: int) -> None:
    scene.admit(name)
    scene[name].uncut.extend([WINDOW] * num_windows)


def test_windows_are_cut_a_few_at_a_time_and_go_behind_those_that_wait() -> None:
    scene = Scene(decode_threads=1)
    tiled(scene, "a", 5)
    scene.admit("bc")
    scene.decode("a")
    assert scene.line.snapshot().places_taken == 3
    run = scene.work("run aa")
    scene.decode("bc")
    run = scene.work("run bc", scene.did(run))
    cut = scene.work("decode a")
    finish = scene.work("finish b", scene.did(run))
    scene.work("finish c", finish)
    last = scene.work("decode a", scene.did(scene.work("run aa", scene.did(cut))))
    assert scene.places == 1
    finish = scene.work("finish a", scene.did(scene.work("run a", scene.did(last))))
    assert scene.places == 0
    scene.work("wait", finish)


def test_who_came_meanwhile_is_decoded_before_the_next_windows_are_cut() -> None:
    scene = Scene(decode_threads=1)
    tiled(scene, "a", 5)
    run = scene.work("run aa", scene.did(scene.work("decode a")))
    scene.admit("b")
    decode = scene.work("decode b", scene.did(run))
    scene.work("run b", scene.did(decode))
    scene.work("decode a")


def test_the_expected_wait_counts_the_windows_that_have_not_run() -> None:
    scene = Scene()
    run_one(scene, "a", seconds=1)
    tiled(scene, "b", 5)
    scene["b"].canvases_left = 5
    assert scene.line.snapshot().expected_wait_seconds == 5
    decode = scene.did(scene.work("decode b"))
    scene["b"].canvases_left = 1  # as by a file that did not say its size
    run = scene.work("run bb", decode)
    assert scene.line.snapshot().expected_wait_seconds == 5
    scene.now += 2
    scene.work("decode b", scene.did(run))
    assert scene.line.snapshot().expected_wait_seconds == pytest.approx(3)


def test_who_leaves_between_two_cuts_lets_go_of_its_picture_and_its_place() -> None:
    scene = Scene()
    tiled(scene, "a", 5)
    run = scene.work("run aa", scene.did(scene.work("decode a")))
    scene.line.leave(scene["a"])
    assert scene.places == 1, "it is on the device"
    scene.work("wait", scene.did(run))
    assert scene.places == 0


def test_all_places_or_none() -> None:
    scene = Scene(capacity=4)
    scene.admit("abc")
    with pytest.raises(QueueFull, match="3 of 4 places in the queue are taken, 16 asked for") as refused:
        scene.admit("defghijklmnopqrs")
    assert refused.value.retry_after_seconds == 1
    assert scene.places == 3
    scene.admit("d")
    assert scene.line.refusal(1, 30) is not None
    assert scene.line.refusal(0, 30) is None


def run_one(scene: Scene, name: str, seconds: float) -> None:
    scene.admit(name)
    run = scene.work(f"run {name}", scene.did(scene.work(f"decode {name}")))
    scene.now += seconds
    scene.work("wait", scene.work(f"finish {name}", scene.did(run)))


def test_the_expected_wait_is_the_canvases_ahead_over_the_rate_at_which_they_left() -> None:
    scene = Scene()
    run_one(scene, "a", seconds=4)
    assert scene.line.snapshot().expected_wait_seconds == 0
    scene.admit("bcd")
    assert scene.line.snapshot().expected_wait_seconds == 12
    refusal = scene.line.refusal(1, timeout_seconds=10)
    assert refusal is not None and refusal.retry_after_seconds == 12
    assert "expected wait of 12.0 s exceeds the limit of 10 s" in str(refusal)
    assert scene.line.refusal(1, timeout_seconds=12) is None


def test_an_empty_line_never_refuses_however_slow_the_last_run_was() -> None:
    scene = Scene()
    run_one(scene, "a", seconds=1000)
    scene.now += 5000
    assert scene.line.refusal(1, timeout_seconds=1) is None
    run_one(scene, "b", seconds=1)
    scene.admit("c")
    wait = scene.line.snapshot().expected_wait_seconds
    assert wait == pytest.approx(0.8 * 1000 + 0.2 * 1), "the newest counts a fifth, and idle time not at all"


def test_decoding_that_is_slower_than_the_device_is_in_the_expected_wait() -> None:
    scene = Scene()
    scene.admit("ab")
    decode = scene.work("decode a")
    scene.now += 3
    run = scene.work("run a", scene.did(decode))
    scene.now += 1
    scene.book(scene.did(run))
    assert scene.line.snapshot().expected_wait_seconds == 4, "b is ahead, and one left after 4 s"


def test_time_that_runs_share_counts_once() -> None:
    scene, alone = busy("abcd", lanes=2, batch=1)
    first = scene.work("run a", scene.did(alone))
    second = scene.work("run b")
    scene.now = 10
    scene.book(scene.did(first))
    scene.book(scene.did(second))
    wait = scene.line.snapshot().expected_wait_seconds
    assert wait == pytest.approx(2 * (10 * 0.8)), "the first took it all, the second none"


# Leaving, in each state.


def test_encoded_a_job_leaves_at_once() -> None:
    scene = Scene()
    scene.admit("ab")
    scene.line.leave(scene["a"])
    assert scene.places == 1
    scene.line.leave(scene["a"])
    assert scene.places == 1, "leaving twice is nothing"
    scene.work("decode b")


def test_decoding_a_job_leaves_when_its_worker_comes_back() -> None:
    scene = Scene()
    scene.admit("a")
    decode = scene.work("decode a")
    scene.line.leave(scene["a"])
    scene.line.leave(scene["a"])
    assert scene.places == 1
    scene.work("wait", scene.did(decode))
    assert scene.places == 0


def busy(names: str, deadline: float = 1e9, **settings: Any) -> tuple[Scene, Run]:
    """A scene in which z runs and these are ready."""
    scene = Scene(**settings)
    scene.admit("z")
    run = scene.work("run z", scene.did(scene.work("decode z")))
    scene.admit(names, deadline=deadline)
    scene.decode(names)
    return scene, run


def test_ready_a_job_leaves_at_once_and_is_not_run() -> None:
    scene, run = busy("ab")
    scene.line.leave(scene["a"])
    scene.line.leave(scene["a"])
    assert scene.places == 2
    scene.work("run b", scene.did(run))


def test_running_a_job_leaves_when_its_worker_comes_back() -> None:
    scene, run = busy("a")
    scene.line.leave(scene["z"])
    assert scene.places == 2
    scene.work("run a", scene.did(run))
    assert scene.places == 1


def test_a_drawing_that_is_due_leaves_at_once_and_one_being_made_with_its_worker() -> None:
    scene = Scene(decode_threads=1)
    scene.admit("ab", draws=True)
    run = scene.work("run a", scene.did(scene.work("decode a")))
    decode = scene.work("decode b")
    scene.work("wait", scene.did(run))
    second_run = scene.work("run b", scene.did(decode))
    making = scene.work("finish a")
    scene.book(scene.did(second_run))
    scene.line.leave(scene["b"])
    assert scene.places == 1
    scene.line.leave(scene["a"])
    assert scene.places == 1
    scene.work("wait", making)
    assert scene.places == 0


def test_late_in_each_state() -> None:
    scene = Scene(decode_threads=2)
    scene.admit("z")
    run = scene.work("run z", scene.did(scene.work("decode z")))
    scene.admit("ab", deadline=10)
    scene.decode("a")
    decoding = scene.work("decode b")
    scene.admit("c", deadline=10)
    scene.admit("d")
    scene.now = 10
    last = scene.work("decode d")
    assert [type(scene.error(name)) for name in "abc"] == [DeadlineExceeded] * 3
    assert scene.places == 3, "z runs, b is being decoded, d is not late"
    scene.work("wait", scene.did(decoding))
    assert scene.places == 2
    scene.work("wait", scene.did(last))
    scene.work("run d", scene.did(run))


def test_hundreds_that_are_admitted_and_leave_leave_nothing_behind() -> None:
    scene = Scene(capacity=4)
    for number in range(300):
        scene.admit("a" if number % 2 else "b")
        step = scene.take() if number % 3 else None
        for job in list(scene.names):
            scene.line.leave(job)
        if step is not None and not isinstance(step, (Wait, End)):
            scene.book(scene.did(step))
        scene.names.clear()
        assert scene.places == 0
    snapshot = scene.line.snapshot()
    assert (snapshot.encoded, snapshot.ready, snapshot.running) == (0, 0, 0)


# Faults.


def test_who_cannot_be_decoded_fails_and_leaves() -> None:
    scene = Scene()
    scene.admit("a")
    scene.work("wait", scene.failed(scene.work("decode a"), ValueError("no picture")))
    assert scene.places == 0
    assert str(scene.error("a")) == "no picture"


def test_a_failed_batch_runs_again_one_by_one_before_all_others() -> None:
    scene, run = busy("abc")
    failing = scene.work("run ab", scene.did(run))
    again = scene.work("run a", scene.failed(failing, InferenceFailed("bad")))
    assert scene.places == 3 and scene.error("a") is None
    third = scene.work("run b", scene.failed(again, InferenceFailed("a is bad")))
    assert str(scene.error("a")) == "a is bad"
    assert scene.places == 2
    scene.work("finish z", scene.did(third))
    scene.work("run c")
    assert scene.error("b") is None and scene["b"].state is State.RAN


def test_who_left_is_not_run_again() -> None:
    scene, run = busy("ab")
    failing = scene.work("run ab", scene.did(run))
    scene.line.leave(scene["a"])
    scene.work("run b", scene.failed(failing, InferenceFailed("bad")))
    assert scene.places == 1


def test_when_the_device_is_lost_everyone_that_waits_leaves_and_nobody_is_run_again() -> None:
    scene, run = busy("abcd", decode_threads=1)
    scene.admit("e")
    failing = scene.work("run ab", scene.did(run))
    scene.admit("f")
    scene.work("finish z")
    decoding = scene.work("decode e")
    scene.line.evict(NotReady("the device has failed"))
    assert [type(scene.error(name)) for name in "cdf"] == [NotReady] * 3
    scene.work("wait", scene.failed(failing, InferenceFailed("lost"), device_lost=True))
    assert [type(scene.error(name)) for name in "ab"] == [InferenceFailed] * 2
    scene.work("wait", scene.did(decoding))
    assert isinstance(scene.error("e"), NotReady), "it was being decoded"
    assert scene.places == 0


def test_the_oldest_step_of_any_kind_is_what_liveness_looks_at() -> None:
    scene = Scene()
    assert scene.line.oldest_step() is None
    scene.admit("a")
    decode = scene.work("decode a")
    scene.now = 7
    assert scene.line.oldest_step() == ("decode", 7), "a hung decode"
    run = scene.work("run a", scene.did(decode))
    scene.now = 20
    assert scene.line.oldest_step() == ("run", 13), "a hung run"
    scene.admit("b")
    scene.work("decode b")
    assert scene.line.oldest_step() == ("run", 13)
    scene.book(scene.did(run))
    assert scene.line.oldest_step() is not None


def test_a_hung_run_keeps_its_lane_and_its_places() -> None:
    scene, _ = busy("ab", deadline=1000)
    scene.line.leave(scene["z"])
    scene.now = 10_000
    scene.admit("c")
    scene.work("wait", scene.did(scene.work("decode c")))
    assert scene.places == 2, "z hangs and c waits; a and b were late"


# Reload and end.


def test_jobs_of_the_old_model_run_before_the_new_one_s_and_never_with_them() -> None:
    scene = Scene(lanes=2, batch=2)
    new = model(2, lanes=2)
    scene.admit("z")
    run = scene.work("run z", scene.did(scene.work("decode z")))
    scene.admit("ab")
    scene.decode("ab")
    scene.admit("cd", of=new)
    scene.decode("cd")
    old = scene.work("run ab", scene.did(run))
    finish = scene.work("finish z")
    scene.work("wait", finish)
    first = scene.work("run cd", scene.did(old))
    assert [part.job.model for part in first.parts] == [new, new]


def test_closing_ends_workers_when_all_is_done() -> None:
    scene, run = busy("a", batch=1)
    scene.line.close()
    last = scene.work("run a", scene.did(run))
    finish = scene.work("finish z")
    scene.work("end", finish)
    scene.work("end", scene.work("finish a", scene.did(last)))


# With threads.


class Worker(threading.Thread):
    """Does what the line says, at random speed."""

    def __init__(self, scene: Scene, seed: int) -> None:
        super().__init__(daemon=True)
        self.scene, self.random = scene, random.Random(seed)
        self.asleep = threading.Event()

    def run(self) -> None:
        done: Work | None = None
        while True:
            self.asleep.set()
            step = self.scene.line.next(done)
            self.asleep.clear()
            if isinstance(step, End):
                return
            if self.random.random() < 0.2:
                time.sleep(self.random.uniform(0, 0.002))
            if isinstance(step, Finish):
                if not step.job.gone:
                    step.job.answer("answer")
            elif self.random.random() < 0.05:
                self.scene.failed(step, InferenceFailed("by chance"))
            else:
                self.scene.did(step)
            done = step


@pytest.mark.parametrize("seed", range(6))
def test_no_worker_sleeps_while_there_is_something_to_choose(seed: int) -> None:
    """Whenever all workers have come to rest, a further one finds nothing to do, and everybody has been answered."""
    chance = random.Random(seed)
    scene = Scene(capacity=20, decode_threads=2, lanes=chance.choice((1, 2)), batch=chance.choice((1, 2, 4)))
    scene.line = Line(capacity=20, decode_threads=2, max_batch_delay_seconds=chance.choice((0, 0, 0.001)))
    workers = [Worker(scene, seed * 10 + number) for number in range(5)]
    for worker in workers:
        worker.start()
    names = itertools.count()
    for _ in range(30):
        for _ in range(chance.randrange(1, 12)):
            name, draws = f"{next(names)}", chance.random() < 0.2
            job = scene.job(name, time.monotonic() + chance.choice((60, 60, 0.001)), draws, None)
            job.uncut.extend([WINDOW] * chance.choice((0, 0, 1, 7)))
            try:
                scene.line.admit([job], timeout_seconds=60)
            except QueueFull:
                del scene.names[job]
                continue
            if chance.random() < 0.2:
                scene.line.leave(job)
                job.future.cancel()
        wait_until(lambda: all(job.future.done() or job.gone for job in scene.names))
        wait_until(lambda: all(worker.asleep.is_set() for worker in workers) and not scene.places)
        assert isinstance(scene.line.take(), Wait), "the workers sleep, and there was something to do"
    scene.line.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_admitting_wakes_as_many_workers_as_there_is_work_for() -> None:
    line = Line(capacity=8, decode_threads=3)
    scene = Scene()
    scene.line = line
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(line.next) for _ in range(4)]
        scene.admit("abcd")
        wait_until(lambda: sum(each.done() for each in waiting) == 3)
        assert sorted(scene.told(each.result()) for each in waiting if each.done()) == [
            "decode a",
            "decode b",
            "decode c",
        ]
        line.close()
        for each in waiting:
            if each.done() and isinstance(step := each.result(), Decode):
                step.error = ValueError("enough")
                line.take(step)


def test_who_leaves_makes_room_for_the_next_to_be_decoded() -> None:
    scene, _ = busy("abcdef")
    scene.admit("g")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scene.line.next)
        time.sleep(0.05)
        assert not waiting.done(), "enough is decoded"
        scene.line.leave(scene["c"])
        assert scene.told(waiting.result(10)) == "decode g"


def test_a_lane_that_opens_outside_the_line_wakes_a_worker() -> None:
    scene = Scene()
    detector = cast("FakeDetector", scene.model.detector)
    scene.admit("a")
    decode = scene.work("decode a")
    lane = detector.free_lane((64, 64), 1, concurrent=False)  # a run outside the line has it
    assert lane is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scene.line.next, scene.did(decode))
        time.sleep(0.05)
        assert not waiting.done()
        lane.free()
        assert scene.told(waiting.result(10)) == "run a"


def test_a_batch_that_waits_to_be_filled_starts_when_its_time_has_come_though_nothing_else_happens() -> None:
    line = Line(capacity=8, decode_threads=1, max_batch_delay_seconds=0.1)
    scene = Scene()
    scene.line = line
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(line.next), pool.submit(line.next)]
        scene.admit("a", deadline=time.monotonic() + 60)
        wait_until(lambda: any(worker.done() for worker in workers))
        [decoded] = [worker for worker in workers if worker.done()]
        workers.remove(decoded)
        started = time.monotonic()
        line.take(scene.did(cast("Decode", decoded.result())))
        run = workers[0].result(10)
        assert scene.told(run) == "run a"
        assert time.monotonic() - started >= 0.09


def test_a_future_is_settled_once() -> None:
    async def main() -> None:
        job = Scene().job("a", 1000, False, None)
        job.future = asyncio.get_running_loop().create_future()
        job.fail(ValueError("first"))
        job.answer("second")
        with pytest.raises(ValueError, match="first"):
            await job.future

    asyncio.run(main())
