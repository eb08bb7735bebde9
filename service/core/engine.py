"""One image's way: encoded bytes → (decode pool) canvas → (device thread) candidates → detections → what the caller
makes of them. Knows no HTTP.

A decode thread that finds the device idle runs its image itself, if another one is left to decode meanwhile. A device
thread finishes the first image of its batch itself, while another thread runs the next batch; the others go to the
finish pool. So an image that is alone changes threads as rarely as can be, and has all of the CPU's cores; a crowd's
images run side by side, where the detector was opened for that. Of a crowd only as many are decoded as the device takes
next; the others wait as the bytes they came in.

A `Job` is owned by one stage at a time, and each of its timestamps ends one stage and begins the next. Waiting for a
decode thread and waiting for the device are both `queue`. The model and the parameters are the job's own from the
start: neither a reload nor a neighbour in the batch can change them.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from model.detector import InferenceFailed
from model.image import decode_image, to_canvas, to_original
from model.suppress import suppress
from model.types import Candidates, CanvasImage, Detections
from service.core.batcher import Batcher
from service.core.store import LoadedModel, ModelStore
from service.metrics import Metrics

logger = logging.getLogger(__name__)

FINISH_THREADS = 2
TURNS_AHEAD = 2
"""Images decoded ahead of the device, in all that it takes at once. To decode all at once that came at once would delay
the first of them by the decoding of the last, and hold the pixels of all."""
FAILURES_BEFORE_SELF_TEST = 3


class DeadlineExceeded(Exception):
    """The answer was not there in time; work not begun by then is not done. Try again when there is less load."""


@dataclass(frozen=True)
class Options:
    """What one request asks of its detections."""

    score_threshold: float
    nms_threshold: float
    max_detections: int
    label_ids: Collection[int] | None = None


@dataclass
class Stopwatch:
    """Seconds by stage. The stages touch: each lap begins where the last one ended."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    _last: float = 0

    def __post_init__(self) -> None:
        self._last = self._last or self.started

    def lap(self, stage: str, end: float | None = None) -> None:
        """The time since the last lap was spent in this stage, up to `end` (time.perf_counter(); now)."""
        now = time.perf_counter() if end is None else end
        self.stages[stage] = self.stages.get(stage, 0) + now - self._last
        self._last = now

    def copy(self) -> "Stopwatch":
        return Stopwatch(self.started, dict(self.stages), self._last)

    @property
    def total(self) -> float:
        return self._last - self.started


@dataclass(frozen=True, eq=False)
class Detected:
    """What became of one image: detections in original pixels."""

    detections: Detections
    original_size: tuple[int, int]
    model: LoadedModel
    watch: Stopwatch


Finish = Callable[[Detected], Any]


@dataclass(eq=False)
class Job:
    data: bytearray
    model: LoadedModel
    options: Options
    deadline: float
    """time.monotonic() after which nobody waits."""
    admitted: float
    """time.monotonic()"""
    watch: Stopwatch
    finish: Finish
    """Makes the answer; its result is the future's."""
    slow_finish: bool
    future: "asyncio.Future[Any]"
    canvas: CanvasImage | None = None
    cancelled: bool = False

    @property
    def gone(self) -> bool:
        return self.cancelled or time.monotonic() >= self.deadline

    @property
    def group(self) -> Hashable:
        assert self.canvas is not None
        return id(self.model), self.canvas.canvas_size

    @property
    def max_batch_size(self) -> int:
        return self.model.max_batch_size

    def settle(self, result: Any, error: BaseException | None = None) -> None:
        """Hand over the result or the error, from any thread."""
        self.future.get_loop().call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done() or self.cancelled:
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Engine:
    """Takes images in, bounded, and answers each. One for each device."""

    def __init__(
        self,
        store: ModelStore,
        metrics: Metrics,
        *,
        queue_capacity: int = 32,
        max_batch_delay_seconds: float = 0,
        runs_at_once: int = 1,
        decode_threads: int = 1,
        max_image_pixels: int = 50_000_000,
    ) -> None:
        self.store = store
        self.batcher: Batcher[Job, Candidates | Exception] = Batcher(
            self._run,
            self._deliver,
            capacity=queue_capacity,
            max_delay_seconds=max_batch_delay_seconds,
            runs_at_once=runs_at_once,
            shares=self._shares,
        )
        self._metrics = metrics
        self._max_image_pixels = max_image_pixels
        self._decoders = ThreadPoolExecutor(decode_threads, "decode")
        self._decode_threads, self._runs_at_once = decode_threads, runs_at_once
        self._undecoded: deque[Job] = deque()  # first admitted first; the lock guards both
        self._decoding = 0
        self._decoding_lock = threading.Lock()
        self._put = self.batcher.put_or_run if decode_threads > 1 else self.batcher.put
        self._finishers = ThreadPoolExecutor(FINISH_THREADS, "finish")
        self._failures_in_a_row = 0
        self._failures_lock = threading.Lock()
        metrics.watch_queue(lambda: self.batcher.depth, lambda: self.batcher.running, queue_capacity)

    def start(self) -> None:
        self.batcher.start()

    def _shares(self, crowded: bool) -> bool:
        model = self.store.current
        return model is None or model.detector.shares_device(crowded)

    def close(self, timeout_seconds: float = 5) -> bool:
        """Finish what was admitted; False: the device is stuck."""
        ended = self.batcher.close(timeout_seconds)
        with self._decoding_lock:
            self._undecoded.clear()  # only a stuck device has left any
        self._decoders.shutdown(wait=ended, cancel_futures=True)
        self._finishers.shutdown(wait=ended)
        return ended

    def submit(
        self, images: Sequence[bytearray], model: LoadedModel, options: Options, finish: Sequence[Finish], *,
        timeout_seconds: float, watch: Stopwatch, slow_finish: bool = False,
    ) -> list[Job]:  # fmt: skip
        """Admit all the images or none (QueueFull). Call on the event loop; each job's future has its answer.

        A `slow_finish` runs where images are decoded: there it delays no other answer, and its backlog fills the queue.
        A future fails with InvalidImage, TooManyPixels or InferenceFailed; cancel jobs that nobody waits for.
        """
        self.batcher.take_places(len(images), timeout_seconds)
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        jobs = [
            Job(
                data,
                model,
                options,
                now + timeout_seconds,
                now,
                watch.copy(),
                each_finish,
                slow_finish,
                loop.create_future(),
            )
            for data, each_finish in zip(images, finish, strict=True)
        ]
        with self._decoding_lock:
            self._undecoded.extend(jobs)
        self._decode_more()
        return jobs

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: do none of the work not yet begun, and free its place."""
        job.cancelled = True
        with self._decoding_lock:
            undecoded = job in self._undecoded
            if undecoded:
                self._undecoded.remove(job)
        if undecoded:
            self.batcher.give_back_place()
        if undecoded or self.batcher.remove(job):
            job.future.cancel()
        self._decode_more()

    def _decode_more(self) -> None:
        """Call whenever an image has come, or one that was decoded has gone on: to the device, or for good."""
        with self._decoding_lock:
            while self._undecoded:
                ahead = TURNS_AHEAD * self._runs_at_once * self._undecoded[0].max_batch_size + self._decode_threads
                if self._decoding + self.batcher.waiting >= ahead:
                    return
                self._decoding += 1
                self._decoders.submit(self._prepare, self._undecoded.popleft())

    def _prepare(self, job: Job) -> None:
        """On a decode thread."""
        error = self._decode(job)
        with self._decoding_lock:
            self._decoding -= 1
        if error is None and not job.gone:
            self._put(job)
            return
        self.batcher.give_back_place()
        if error is not None:
            job.settle(None, error)
        self._decode_more()

    def _decode(self, job: Job) -> Exception | None:
        """Why it could not be done."""
        if job.gone:
            return None
        job.watch.lap("queue")
        try:
            image = decode_image(bytes(job.data), max_pixels=self._max_image_pixels)
            job.watch.lap("decode")
            job.canvas = to_canvas(image, job.model.detector.metadata.resize)
            job.watch.lap("preprocess")
        except Exception as error:  # a pool's boundary: whatever it is, the request is answered and its place freed
            return error
        job.data = bytearray()
        return None

    def _run(self, batch: list[Job], shares: bool) -> list[Candidates | Exception]:
        """On a device thread, or the decode thread of an image that is alone."""
        self._decode_more()
        started = time.perf_counter()
        results = self._attempt(batch, shares)
        if len(batch) > 1 and isinstance(results[0], InferenceFailed) and not results[0].fatal:
            results = [self._attempt([job], shares)[0] for job in batch]  # only the image that fails alone shall fail
        ended = time.perf_counter()
        for job in batch:
            job.watch.lap("queue", started)
            job.watch.lap("inference", ended)
        return results

    def _attempt(self, batch: list[Job], shares: bool) -> list[Candidates | Exception]:
        """The candidates of each, or one error for all."""
        self._metrics.batch_size.observe(len(batch))
        detector = batch[0].model.detector
        try:
            candidates = detector.run([job.canvas for job in batch if job.canvas is not None], beside_others=shares)
        except Exception as error:  # the device thread's boundary: it must outlive any failure
            self._note_failure(error, batch[0].model)
            return [error] * len(batch)
        self._failures_in_a_row = 0
        return list(candidates)

    def _note_failure(self, error: Exception, model: LoadedModel) -> None:
        kind, fatal = (error.kind, error.fatal) if isinstance(error, InferenceFailed) else ("other", False)
        logger.error("inference failed (%s): %s", kind, error, exc_info=not isinstance(error, InferenceFailed))
        self._metrics.device_errors.labels(kind).inc()
        with self._failures_lock:
            self._failures_in_a_row += 1
            suspicious = self._failures_in_a_row % FAILURES_BEFORE_SELF_TEST == 0
        if fatal:
            self._condemn(str(error))
        elif suspicious:
            self._self_test(model)

    def _self_test(self, model: LoadedModel) -> None:
        """Tell a broken device from bad luck with images: run a grey one."""
        side = model.detector.metadata.resize.divisor
        try:
            model.detector.run([CanvasImage.uniform((side, side), 128)])
        except Exception as error:  # as in _attempt
            self._condemn(f"{self._failures_in_a_row} runs failed one after the other, and so did a self-test: {error}")

    def _condemn(self, reason: str) -> None:
        logger.critical("the device can serve no more: %s", reason)
        self.store.device_fault = reason

    def _deliver(self, batch: list[Job], results: list[Candidates | Exception]) -> None:
        """On the thread that ran it, after the batch's places are free."""
        mine: tuple[Job, Candidates] | None = None
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                job.settle(None, result)
            elif job.slow_finish:
                self._decoders.submit(self._finish, job, result)
            elif mine is None:
                mine = job, result
            else:
                self._finishers.submit(self._finish, job, result)
        if mine is not None:
            self._finish(*mine)

    def _finish(self, job: Job, candidates: Candidates) -> None:
        """On a device, finish or decode thread."""
        if job.gone:
            return
        assert job.canvas is not None
        try:
            detections = conclude(candidates, job.canvas, job.options)
            job.watch.lap("postprocess")
            size = job.canvas.original_size
            answer = job.finish(Detected(detections, size, job.model, job.watch))
            job.watch.lap("encode")
        except Exception as error:  # a pool's boundary, as in _prepare
            job.settle(None, error)
            return
        self._metrics.observe_image(job.watch.stages, size[0] * size[1], len(detections))
        job.settle(answer)


def conclude(candidates: Candidates, canvas: CanvasImage, options: Options) -> Detections:
    """The detections that these options leave, original pixels, best score first."""
    kept = suppress(
        candidates,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        max_detections=options.max_detections,
        label_ids=options.label_ids,
    )
    return to_original(kept, canvas)
