"""A worker's next step, as a table: waiting jobs, work under way, lanes and time in; the choice out.

Jobs are letters. The model `m` takes batches of two, `n` serves after a reload. Nothing here runs or waits.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from model.detector import Lane
from model.types import CanvasImage
from service.core.choice import Decode, End, Finish, Run, Step, Wait, Waiting, Work, choose
from service.core.job import Job, Options, Part, State, Stopwatch
from service.core.store import LoadedModel

SQUARE, WIDE = (64, 64), (64, 96)
NOW = 100.0


@dataclass
class Device:
    """Lanes, as a detector offers them: `closed` canvases have none yet."""

    lanes: int = 1
    taken: int = 0
    closed: Collection[tuple[int, int]] = ()
    concurrent: list[bool] = field(default_factory=list)
    """The argument of each call."""

    def free_lane(self, canvas_size: tuple[int, int], count: int, *, concurrent: bool) -> Lane | None:
        self.concurrent.append(concurrent)
        return cast("Lane", object()) if self.taken < self.lanes and canvas_size not in self.closed else None


def model(device: Device, max_batch_size: int = 2) -> LoadedModel:
    return LoadedModel(cast("Any", device), {}, {}, max_batch_size, "fake")


class Scene:
    """A line at one moment, made of letters: capitals have wide canvases."""

    def __init__(self, lanes: int = 1, *, decode_threads: int = 2, delay: float = 0, closed: str = "") -> None:
        canvases = {"square": SQUARE, "wide": WIDE}
        self.device = Device(lanes, closed=[canvases[name] for name in closed.split()])
        self.m, self.n = model(self.device), model(self.device)
        self.m.__dict__["canvas_bytes"] = self.n.__dict__["canvas_bytes"] = 1000
        self.waiting = Waiting(decode_threads, delay)
        self.jobs: dict[str, Job] = {}
        self.bytes: dict[str, int] = {}
        """Bytes that decoding takes, if not 10."""

    def encoded(self, names: str, of: LoadedModel | None = None) -> "Scene":
        for name in names:
            self.waiting.append(self.job(name, of))
        return self

    def ready(self, names: str, of: LoadedModel | None = None, *, since: float = NOW, alone: bool = False) -> "Scene":
        for name in names:
            job = self.job(name, of, State.READY)
            self.waiting.insert(self.part(job, since, alone))
        return self

    def running(self, names: str, of: LoadedModel | None = None) -> "Scene":
        parts = [self.part(self.job(name, of, State.RUNNING)) for name in names]
        self.device.taken += 1
        return self.under_way(Run(parts, cast("Lane", None)))

    def decoding(self, names: str) -> "Scene":
        for name in names:
            self.under_way(Decode(self.job(name, None, State.DECODING)))
        return self

    def drawing(self, names: str) -> "Scene":
        for name in names:
            self.under_way(Finish(self.job(name, None, State.RAN, draws=True)))
        return self

    def under_way(self, work: Work) -> "Scene":
        self.waiting.under_way[work] = None
        return self

    def ran(self, *batches: str) -> "Scene":
        for names in batches:
            self.waiting.ran.append(deque(self.job(name, None, State.RAN) for name in names))
        return self

    def holding(self, name: str) -> "Scene":
        """A picture with tiles, of which some windows are on the device and some not yet cut."""
        job = self.job(name, None, State.RUNNING)
        self.waiting.cut[job] = self.bytes.get(name, 10)
        return self

    def cutting(self, name: str) -> "Scene":
        """Its next windows are due."""
        self.jobs[name].state = State.ENCODED
        self.waiting.append(self.jobs[name])
        return self

    def drawn(self, names: str) -> "Scene":
        """Drawings that are due, admitted after all that was named before."""
        for name in names:
            job = self.job(name, None, State.RAN, draws=True)
            job.parts = [self.part(job)]
            self.waiting.drawings.append(job)
        return self

    def closing(self) -> "Scene":
        self.waiting.closing = True
        return self

    def job(self, name: str, of: LoadedModel | None, state: State = State.ENCODED, draws: bool = False) -> Job:
        options = Options(0.05, 0.5, 300)
        job = Job(
            bytearray(),
            of or self.m,
            options,
            1000,
            Stopwatch(),
            lambda *_: None,
            draws,
            cast("Any", None),
            state=state,
        )
        if state is not State.ENCODED:
            job.turn = next(self.waiting.turns)
        job.decode_bytes = self.bytes.get(name, 10)
        self.jobs[name] = job
        return job

    def part(self, job: Job, since: float = NOW, alone: bool = False) -> Part:
        name = next(name for name, each in self.jobs.items() if each is job)
        part = Part(job, CanvasImage.uniform(WIDE if name.isupper() else SQUARE), since, alone)
        job.parts.append(part)
        return part

    def choice(self) -> str:
        return self.told(choose(self.waiting, NOW))

    def told(self, step: Step) -> str:
        names = {job: name for name, job in self.jobs.items()}
        if isinstance(step, Run):
            return "run " + "".join(names[part.job] for part in step.parts)
        if isinstance(step, Wait):
            return "wait" if step.until is None else f"wait until {step.until:g}"
        if isinstance(step, End):
            return "end"
        return f"{'decode' if isinstance(step, Decode) else 'finish'} {names[step.job]}"


def s(lanes: int = 1, **settings: Any) -> Scene:
    return Scene(lanes, **settings)


def of_n(scene: Scene, running: str, ready: str) -> Scene:
    """Model n was loaded while m's jobs run."""
    return scene.running(running, scene.m).ready(ready, scene.n)


def far_ahead(scene: Scene) -> Scene:
    scene.waiting.max_decoded_bytes, scene.m.__dict__["canvas_bytes"] = 100, 50
    return scene


def memory(scene: Scene, *, limit: int = 100) -> Scene:
    scene.waiting.max_decode_bytes, scene.waiting.large_bytes = limit, 50
    scene.bytes = {"x": 95, "l": 60, "m": 60, "t": 1}
    for name, job in scene.jobs.items():
        job.decode_bytes = scene.bytes.get(name, 10)
    return scene


def after_a_large_one(scene: Scene) -> Scene:
    memory(scene).waiting.large_last = True
    return scene


TABLE = [
    ("nothing to do", s(), "wait"),
    ("one picture has come", s().encoded("a"), "decode a"),
    ("one picture is decoded", s().ready("a"), "run a"),
    ("one picture runs", s().running("a"), "wait"),
    ("one picture has run", s().ran("a"), "finish a"),
    # Run before finish, finish before decode.
    ("the device comes first", s().ready("a").ran("b").encoded("c"), "run a"),
    ("answers come second", s().running("a").ready("b").ran("c").encoded("d"), "finish c"),
    ("decoding comes third", s().running("a").ready("b").encoded("c"), "decode c"),
    # Batches.
    ("the oldest lead, and others of their canvas join", s().ready("abC"), "run ab"),
    ("a batch is no larger than the model takes", s().ready("abc"), "run ab"),
    ("a rare canvas has its turn among common ones", s().ready("Abcde"), "run A"),
    ("a picture of the leader's canvas overtakes others", s().ready("aBc"), "run ac"),
    ("a full batch starts beside a run", s(2).running("ab").ready("cd"), "run cd"),
    ("a part batch waits for the run to end", s(2).running("ab").ready("c"), "wait"),
    ("nobody passes a part batch that waits", s(2).running("ab").ready("Cde"), "wait"),
    ("all lanes are taken", s(2).running("ab").running("cd").ready("ef"), "wait"),
    ("a canvas without a lane yet holds no other up", s(2, closed="wide").ready("ABcd"), "run cd"),
    # A batch may fill.
    ("a batch waits to be filled", s(delay=5).ready("a", since=NOW - 1), "wait until 104"),
    ("it has waited long enough", s(delay=5).ready("a", since=NOW - 5), "run a"),
    ("a full batch does not wait", s(delay=5).ready("ab"), "run ab"),
    ("others work while a batch fills", s(delay=5).ready("a").encoded("b"), "decode b"),
    ("closing waits for no batch to fill", s(delay=5).ready("a").closing(), "run a"),
    # A failed batch is run again, one by one and first.
    ("who failed with others runs alone and first", s().ready("a").ready("bc", alone=True), "run b"),
    ("beside a run too: its batch is as full as it gets", s(2).running("xy").ready("b", alone=True), "run b"),
    ("nobody joins who runs alone", s().ready("b", alone=True).ready("c"), "run b"),
    # Finishing is bounded.
    ("two batches wait to be answered: nothing runs", s().ready("a").ran("bc", "de"), "finish b"),
    ("one does: the next runs", s().ready("a").ran("bc"), "run a"),
    # Decoding ahead is bounded: twice what the device takes at once, and one for each decoder.
    ("as many are decoded as the device takes next", s().running("z").ready("abcde").encoded("f"), "decode f"),
    ("no more than that", s().running("z").ready("abcdef").encoded("g"), "wait"),
    ("those being decoded count", s().running("z").ready("abcde").decoding("f").encoded("g"), "wait"),
    ("two lanes take more", s(2).running("xy").running("wz").ready("abcdef").encoded("g"), "decode g"),
    ("canvases ahead are bounded in bytes", far_ahead(s().running("z").ready("ab").encoded("c")), "wait"),
    ("but one is always decoded", far_ahead(far_ahead(s()).encoded("a")), "decode a"),
    ("decoding is slower than the device: it idles, and decodes", s().decoding("a").encoded("b"), "decode b"),
    ("no more workers decode than may", s().decoding("ab").encoded("c"), "wait"),
    ("a hung decode leaves the others to the rest", s(decode_threads=2).decoding("a").encoded("b"), "decode b"),
    ("a hung run leaves decoding to the rest", s().running("a").encoded("b"), "decode b"),
    # Drawings are made where pictures are decoded.
    ("a drawing is due", s().drawn("a"), "finish a"),
    ("the older of a drawing and a picture is first", s().drawn("a").encoded("b"), "finish a"),
    ("a drawing counts as decoding", s().drawing("a").decoding("b").encoded("c"), "wait"),
    ("drawings keep no answer waiting", s().drawing("ab").drawn("c").ran("d"), "finish d"),
    ("drawings keep no lane waiting", s().drawing("ab").drawn("c").ready("d"), "run d"),
    # Memory of what is decoded or drawn; "large" pictures take 60 of 100, the others 10.
    ("a large picture beside a small one", memory(s().decoding("a")).encoded("l"), "decode l"),
    ("no two large ones at once", memory(s().decoding("l")).encoded("m"), "wait"),
    ("small ones pass while a large one is decoded", memory(s().decoding("l")).encoded("mb"), "decode b"),
    (
        "they do not pass when small ones are decoded",
        memory(s(decode_threads=6).decoding("abcde")).encoded("lf"),
        "wait",
    ),
    ("the largest of all is decoded alone", memory(s(), limit=50).encoded("l"), "decode l"),
    ("a drawing counts alike", memory(s().drawing("l")).encoded("mb"), "decode b"),
    ("beside the largest there is room for a small one", memory(s().decoding("l"), limit=50).encoded("t"), "decode t"),
    ("large ones leave a decoder to the small", memory(s().decoding("l"), limit=200).encoded("mb"), "decode b"),
    ("they take all others", memory(s(decode_threads=3).decoding("l"), limit=200).encoded("mb"), "decode m"),
    ("the only decoder is for the large too", memory(s(decode_threads=1)).encoded("lb"), "decode l"),
    ("and then for a small one", after_a_large_one(s(decode_threads=1)).encoded("lb"), "decode b"),
    ("or for the next, if no small one waits", after_a_large_one(s(decode_threads=1)).encoded("lm"), "decode l"),
    ("what windows are cut from counts, too", memory(s()).holding("l").encoded("m"), "wait"),
    (
        "windows are cut though the one before them must wait",
        memory(s()).holding("a").encoded("x").cutting("a"),
        "decode a",
    ),
    ("windows are cut however short memory is", memory(s()).holding("l").decoding("m").cutting("l"), "decode l"),
    # Reload: the device is busy, not a model.
    ("runs of two models are never together", of_n(s(2), running="ab", ready="cd"), "wait"),
    ("the old model's jobs run first", s().ready("ab").ready("c"), "run ab"),
    # The end.
    ("closed, nothing left", s().closing(), "end"),
    ("closed, a picture is still encoded", s().encoded("a").closing(), "decode a"),
    ("closed, a picture waits for a lane", s().running("a").ready("b").closing(), "wait"),
    ("closed, a drawing is due and the decoders are busy", s().drawing("ab").drawn("c").closing(), "wait"),
    ("closed, what runs is its own worker's to end", s().running("a").closing(), "end"),
]


@pytest.mark.parametrize(("scene", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_choice(scene: Scene, expected: str) -> None:
    assert scene.choice() == expected


@pytest.mark.parametrize(
    ("scene", "concurrent"),
    [
        (s().ready("a"), False),
        (s().ready("ab"), False),
        (s().ready("abc"), True),
        (s(2).running("xy").ready("ab"), True),
        (s().encoded("b").ready("a"), False),
    ],
    ids=[
        "alone",
        "a batch takes all",
        "more are ready than it takes",
        "beside a run",
        "who is not decoded does not count",
    ],
)
def test_a_run_is_concurrent_beside_another_or_when_more_is_ready_than_it_takes(scene: Scene, concurrent: bool) -> None:
    assert scene.choice().startswith("run")
    assert scene.device.concurrent == [concurrent]


def test_one_model_s_part_batch_does_not_join_the_other_s() -> None:
    scene = s()
    scene.ready("a", scene.m).ready("b", scene.n)
    assert scene.choice() == "run a"


def test_what_is_left_of_a_job_goes_behind_those_that_wait() -> None:
    """A job of many parts takes its turn again and again; within a turn its parts keep their order."""
    scene = s().ready("a").ready("b")
    many = scene.jobs["a"]
    for _ in range(4):
        scene.waiting.insert(scene.part(many))
    many.parts_left = 5
    order = []
    while isinstance(step := choose(scene.waiting, NOW), Run):
        scene.waiting.begin(step)
        del scene.waiting.under_way[step]
        order.append(scene.told(step).removeprefix("run "))
    assert order == ["aa", "ba", "aa"]
