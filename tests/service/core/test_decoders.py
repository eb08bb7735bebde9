"""Decoders in child processes: their answers are the same, and none outlives its deadline, its client or its parent."""

import functools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry

from model.formats.claim import claim_of
from model.image import MAX_PIXELS, InvalidImage, TooManyPixels, decode_image, to_canvas
from model.types import CanvasImage, Detections
from service.core.decoder_process import MAX_ANSWER_BYTES, receive_into, receive_json
from service.core.decoders import Decoders
from service.core.job import DeadlineExceeded, Job, Options, Stopwatch
from service.core.store import LoadedModel
from service.drawing import draw, encode_picture
from service.metrics import DecoderMetrics
from tests.model.formats.test_bmp import bmp
from tests.support.serving import SMALL, FakeDetector, picture, wait_until

NO_CANDIDATES = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


class Kills(DecoderMetrics):
    def __init__(self) -> None:
        super().__init__(CollectorRegistry())

    def __eq__(self, reasons: object) -> bool:
        """Compare the counted reasons, as a list."""
        samples = [sample for metric in self.kills.collect() for sample in metric.samples]
        return reasons == [sample.labels["reason"] for sample in samples for _ in range(int(sample.value))]

    __hash__ = None  # type: ignore[assignment]


@pytest.fixture
def kills() -> Kills:
    return Kills()


@pytest.fixture
def others() -> set[psutil.Process]:
    """Children that were there before."""
    return set(psutil.Process().children())


@pytest.fixture
def decoders(kills: Kills, others: set[psutil.Process]) -> Iterator[Decoders]:
    made = Decoders(1, kills)
    made.start()
    yield made
    made.close()
    assert set(psutil.Process().children()) <= others


def job_of(data: bytes, *, seconds: float = 60) -> Job:
    model = LoadedModel(cast("Any", FakeDetector()), {}, {}, 1, "fake")
    deadline = time.monotonic() + seconds
    return Job(
        bytearray(data),
        model,
        Options(0.05, 0.5, 300),
        deadline,
        Stopwatch(),
        lambda *_: None,
        False,
        cast("Any", None),
        decode_bytes=claim_of(data).decode_bytes(MAX_PIXELS),
    )


def canvas(decoders: Decoders, job: Job) -> CanvasImage:
    return decoders.canvas(job, SMALL)


@functools.cache
def slow_picture() -> bytes:
    """A legal picture that takes about half a second."""
    return picture(6000, 6000)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_a_child_s_canvas_is_what_would_be_decoded_here(decoders: Decoders, kind: str) -> None:
    data = picture(200, 150, kind=kind)
    job = job_of(data)
    found = canvas(decoders, job)
    expected = to_canvas(decode_image(data), SMALL)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (found.size, found.original_size) == (expected.size, expected.original_size)
    assert set(job.watch.stages) == {"decode", "preprocess"}


def test_a_child_s_drawing_is_what_would_be_drawn_here(decoders: Decoders) -> None:
    data = picture(200, 150)
    detections = Detections(np.array([[10, 20, 90, 80]], np.float32), np.array([0.5], np.float32), np.array([1]))
    drawn = decoders.drawing(job_of(data), detections, {1: "circle"}, "png")
    assert drawn == encode_picture(draw(decode_image(data), detections, {1: "circle"}), "png")


def test_what_is_wrong_with_a_picture_is_said_and_the_child_lives_on(
    decoders: Decoders, kills: Kills, others: set[psutil.Process]
) -> None:
    [child] = set(psutil.Process().children()) - others
    with pytest.raises(InvalidImage, match="not an image"):
        canvas(decoders, job_of(b"no image at all"))
    with pytest.raises(TooManyPixels):
        canvas(decoders, job_of(picture(10_000, 6_000, kind="GIF")))
    assert canvas(decoders, job_of(picture())).original_size == (64, 80)
    assert set(psutil.Process().children()) - others == {child} and kills == []


def test_at_its_deadline_a_decode_ends_and_the_next_finds_a_child(decoders: Decoders, kills: Kills) -> None:
    canvas(decoders, job_of(picture()))  # it has started
    slow_picture()
    with pytest.raises(DeadlineExceeded):
        canvas(decoders, job_of(slow_picture(), seconds=0.1))
    assert kills == ["deadline"]
    assert canvas(decoders, job_of(picture())).original_size == (64, 80)


def test_a_decode_that_nobody_waits_for_ends(decoders: Decoders, kills: Kills) -> None:
    canvas(decoders, job_of(picture()))
    job = job_of(slow_picture())
    job.gone = True
    with pytest.raises(DeadlineExceeded):
        canvas(decoders, job)
    assert kills == ["cancelled"]


def test_a_picture_that_takes_too_much_memory_is_refused(kills: Kills) -> None:
    small = Decoders(1, kills, memory_bytes=100 * 2**20)
    small.start()
    try:
        with pytest.raises(InvalidImage, match="memory"):
            canvas(small, job_of(slow_picture()))
        assert canvas(small, job_of(picture())).original_size == (64, 80)
    finally:
        small.close()


def test_a_picture_takes_no_more_memory_than_was_planned_for_it(decoders: Decoders, kills: Kills) -> None:
    job = job_of(slow_picture())
    job.decode_bytes = 0
    with pytest.raises(InvalidImage, match="memory"):
        canvas(decoders, job)
    assert canvas(decoders, job_of(slow_picture())).original_size == (6000, 6000), "the next may take more"
    assert kills == []


def test_a_picture_takes_no_more_cpu_time_than_one_of_its_size_should(
    decoders: Decoders, kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.core.decoders.LEAST_SECONDS", 0)
    code = (b"\1\5" * 3000 + b"\0\0") * 3000 + b"\0\1"  # nine million runs: seconds for any machine
    job = job_of(bmp(3000, 3000, 8, code, compression=1))
    job.max_pixels = 9_000_000
    monkeypatch.setattr("service.core.decoders.SECONDS_PER_PIXEL", 0)
    with pytest.raises(InvalidImage, match="more time"):
        canvas(decoders, job)
    assert kills == ["cpu"]


def test_an_answer_that_dribbles_is_late_as_a_whole() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def dribble() -> None:
        while not over.wait(0.02):
            theirs.send(b"x")

    with ours, theirs, ThreadPoolExecutor(1) as pool:
        pool.submit(dribble)
        with pytest.raises(TimeoutError):
            receive_into(ours, memoryview(bytearray(10_000)), time.monotonic() + 0.2)
        over.set()


def test_a_child_that_dies_is_replaced_and_its_picture_refused(
    decoders: Decoders, kills: Kills, others: set[psutil.Process]
) -> None:
    [child] = set(psutil.Process().children()) - others
    child.kill()
    with pytest.raises(InvalidImage, match="broke"):
        canvas(decoders, job_of(picture()))
    assert kills == ["died"]
    assert canvas(decoders, job_of(picture())).original_size == (64, 80)


def test_where_no_process_could_be_started_the_next_picture_tries_again(
    kills: Kills, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Decoders(1, kills)
    with monkeypatch.context() as patched, pytest.raises(BlockingIOError):
        patched.setattr(subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(BlockingIOError("no process")))
        canvas(made, job_of(picture()))
    try:
        assert canvas(made, job_of(picture())).original_size == (64, 80)
    finally:
        made.close()


def test_a_decoder_cannot_announce_more_than_an_answer_has() -> None:
    """A decoder is not trusted, and memory for the announced bytes would be taken here."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((2**32 - 1).to_bytes(4, "little"))
        with pytest.raises(ValueError, match="at most 65536 are taken"):
            receive_json(ours, MAX_ANSWER_BYTES)
        theirs.sendall((2).to_bytes(4, "little") + b"{}")
        assert receive_json(ours, MAX_ANSWER_BYTES) == {}


def test_a_size_that_the_file_does_not_claim_is_refused(decoders: Decoders) -> None:
    """Memory was planned by the claim."""
    lying = bytearray(picture(80, 64, kind="GIF"))
    lying[6:10] = (8).to_bytes(2, "little") * 2  # the screen; the frame reaches beyond it, and both count
    assert canvas(decoders, job_of(bytes(lying))).original_size == (64, 80)


PARENT = """
import sys, time
from service.core.decoder_process import MAX_ANSWER_BYTES, receive_json
from service.core.decoders import Decoders
from prometheus_client import CollectorRegistry
from service.metrics import DecoderMetrics
decoders = Decoders(2, DecoderMetrics(CollectorRegistry()))
decoders.start()
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_children_end_with_their_parent_however_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
