"""The workers: each takes a step from the line, does it, and comes back for the next.

encoded bytes --Decode--> canvas --Run--> candidates --Finish--> detections → the caller's result. Knows no HTTP. Each
lap of a job's stopwatch ends one stage and begins the next; waiting for a worker and for the device are both `queue`.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence

from model.detector import InferenceFailed
from model.formats.claim import claim_of
from model.image import decode_soon, to_canvas, to_original
from model.suppress import suppress
from model.types import Candidates, CanvasImage, Detections
from service.core.choice import Decode, End, Run, Work
from service.core.cutting import TooManyWindows, begin_cutting, check_windows, cut, merged
from service.core.decoders import Decoders
from service.core.job import Detected, Finish, Job, Options, Part, Stopwatch
from service.core.line import Line
from service.core.memory import Budget, HeldBytes
from service.core.refusals import QueueFull, Refusal
from service.core.store import LoadedModel, ModelStore, NotReady
from service.drawing import BYTES_PER_PIXEL as DRAWING_BYTES_PER_PIXEL
from service.metrics import Metrics

logger = logging.getLogger(__name__)

FAILURES_BEFORE_SELF_TEST = 3
PICTURE_BYTES_PER_PIXEL = 3
"""Bytes per pixel of a picture with tiles, which leaves its decoder as a whole."""
COPIES = 3
"""Copies of a picture's encoded bytes that are in memory while it is decoded."""


class Engine:
    """Admits pictures, within bounds, and answers each. There is one for each device."""

    def __init__(
        self,
        store: ModelStore,
        decoders: Decoders,
        metrics: Metrics,
        *,
        budget: Budget,
        bodies: HeldBytes,
        answers: HeldBytes,
        queue_capacity: int,
        max_batch_delay_seconds: float,
        runs_at_once: int,
        decode_threads: int,
        max_image_pixels: int,
        max_tiles: int,
    ) -> None:
        self.line = Line(
            capacity=queue_capacity,
            decode_threads=decode_threads,
            max_batch_delay_seconds=max_batch_delay_seconds,
            max_decode_bytes=budget.decoding,
            max_decoded_bytes=budget.canvases,
        )
        self.decoders = decoders
        self.bodies, self.answers = bodies, answers
        self._store = store
        self._metrics = metrics
        self._max_image_pixels = max_image_pixels
        self._max_tiles = max_tiles
        self._failures_in_a_row = 0
        self._failures_lock = threading.Lock()
        # While all lanes run and all decoders decode, one more can finish.
        self._workers = [
            threading.Thread(target=self._work, name=f"worker_{number}", daemon=True)
            for number in range(runs_at_once + decode_threads + 1)
        ]
        metrics.watch_queue(
            lambda: self.line.snapshot().places_taken, lambda: self.line.snapshot().running, queue_capacity
        )

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def close(self, timeout_seconds: float = 5) -> bool:
        """Finish all admitted work; False: a worker is stuck."""
        end = time.monotonic() + timeout_seconds
        self.line.close()
        for worker in self._workers:
            worker.join(max(0.0, end - time.monotonic()))
        return not any(worker.is_alive() for worker in self._workers)

    def submit(
        self, images: Sequence[bytearray], model: LoadedModel, options: Options, finish: Finish, *,
        timeout_seconds: float, watch: Stopwatch, draws: bool = False,
    ) -> list[Job]:  # fmt: skip
        """Admit all the images or none (QueueFull, MemoryFull). Call on the event loop; a job's future has its answer.

        `draws`: the answers are drawings, see Job. A future fails with InvalidImage, TooManyPixels, TooManyWindows,
        InferenceFailed, DeadlineExceeded or NotReady; cancel jobs that nobody waits for.
        """
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + timeout_seconds
        jobs: list[Job] = []
        try:
            for data in images:
                jobs.append(Job(data, model, options, deadline, watch.copy(), finish, draws, loop.create_future()))
                self._plan(jobs[-1])
            if planned := [job for job in jobs if not job.future.done()]:
                self.line.admit(planned, timeout_seconds)
        except Refusal:
            for job in jobs:
                job.future.cancel()
            raise
        return jobs

    def _plan(self, job: Job) -> None:
        """Set the bounds of the job's work by its file's claim, and hold that memory. MemoryFull: no room."""
        claim, tiling = claim_of(job.data), job.options.tiling
        job.max_pixels = claim.pixels_allowed(self._max_image_pixels)
        job.decode_bytes = claim.decode_bytes(self._max_image_pixels) + COPIES * len(job.data)
        job.drawing_bytes = DRAWING_BYTES_PER_PIXEL * job.max_pixels if job.draws else 0
        if tiling is not None:
            job.decode_bytes += PICTURE_BYTES_PER_PIXEL * job.max_pixels
            try:
                job.canvases_left = 1 + (check_windows(claim.size, tiling, self._max_tiles) if claim.size else 0)
            except TooManyWindows as error:
                job.future.set_exception(error)
                return
        self._hold(job)

    def _hold(self, job: Job) -> None:
        """Count the job's bytes, and its drawing's, until it is answered or nobody waits. MemoryFull: no room."""
        if job.draws and self.answers.taken:
            self.answers.check(job.drawing_bytes)
        for held, count in ((self.bodies, len(job.data)), (self.answers, job.drawing_bytes)):
            held.hold_until_done(job.future, count)

    def cancel(self, job: Job) -> None:
        """Begin no more work of the job, because nobody waits for it. Call on the event loop."""
        self.line.leave(job)
        job.future.cancel()

    def refusal(self, num_images: int, timeout_seconds: float) -> QueueFull | None:
        """Say why so many images cannot be admitted now."""
        return self.line.refusal(num_images, timeout_seconds)

    def _work(self) -> None:
        done: Work | None = None
        while not isinstance(step := self.line.next(done), End):
            if isinstance(step, Decode):
                self._decode(step)
            elif isinstance(step, Run):
                self._run(step)
            else:
                self._finish(step.job)
            done = step

    def _decode(self, step: Decode) -> None:
        job = step.job
        job.watch.lap("queue")
        try:
            step.parts = [Part(job, self._canvas(job))] if job.options.tiling is None else self._cut(job)
        except Exception as error:  # a worker's boundary: whatever it is, the request is answered and its place freed
            step.error = error
        if not job.draws:
            job.data = bytearray()

    def _canvas(self, job: Job) -> CanvasImage:
        """Decode a picture here if that is sure to end soon, else in a child process."""
        resize = job.model.detector.metadata.resize
        image = decode_soon(job.data, max_pixels=job.max_pixels)
        if image is None:
            return self.decoders.canvas(job, resize)
        job.watch.lap("decode")
        canvas = to_canvas(image, resize)
        job.watch.lap("preprocess")
        return canvas

    def _cut(self, job: Job) -> list[Part]:
        """Cut the next windows; for the first of them, decode the whole picture."""
        if job.picture is None:
            assert job.options.tiling is not None
            picture = decode_soon(job.data, max_pixels=job.max_pixels)
            if picture is None:
                picture = self.decoders.picture(job)
            job.watch.lap("decode")
            begin_cutting(job, job.options.tiling, picture, self._max_tiles)
        parts = cut(job)
        job.watch.lap("preprocess")
        return parts

    def _run(self, step: Run) -> None:
        self._metrics.batch_size.observe(len(step.parts))
        try:
            step.candidates = step.model.detector.run([part.canvas for part in step.parts], step.lane)
        except Exception as error:  # a worker's boundary: it must outlive any failure
            step.error = error
            step.device_lost = self._note_failure(error, step.model)
        else:
            self._failures_in_a_row = 0

    def _finish(self, job: Job) -> None:
        if job.gone or time.monotonic() >= job.deadline:
            return
        try:
            detections, size = detected(job)
            job.watch.lap("postprocess")
            answer = job.finish(Detected(detections, size, job.model, job.watch), job)
            job.watch.lap("encode")
        except Exception as error:  # a worker's boundary, as in _decode
            job.fail(error)
            return
        self._metrics.observe_image(job.watch.stages, size[0] * size[1], len(detections))
        job.answer(answer)

    def _note_failure(self, error: Exception, model: LoadedModel) -> bool:
        """Count and log a failed run; True: the device can serve no more."""
        kind, fatal = (error.kind, error.fatal) if isinstance(error, InferenceFailed) else ("other", False)
        logger.error("inference failed (%s): %s", kind, error, exc_info=not isinstance(error, InferenceFailed))
        self._metrics.device_errors.labels(kind).inc()
        with self._failures_lock:
            self._failures_in_a_row += 1
            suspicious = self._failures_in_a_row % FAILURES_BEFORE_SELF_TEST == 0
        reason = str(error) if fatal else self._self_test(model) if suspicious else None
        if reason is not None:
            logger.critical("the device can serve no more: %s", reason)
            self._store.device_fault = reason
            self.line.evict(NotReady(f"the device has failed: {reason}"))
        return reason is not None

    def _self_test(self, model: LoadedModel) -> str | None:
        """Run a grey image, to tell a broken device from images that fail. Return what is wrong with the device."""
        side = model.detector.metadata.resize.divisor
        try:
            model.detector.run([CanvasImage.uniform((side, side), 128)])
        except Exception as error:  # as in _run
            return f"{self._failures_in_a_row} runs failed one after the other, and so did a self-test: {error}"
        return None


def detected(job: Job) -> tuple[Detections, tuple[int, int]]:
    """Make the detections of a job that has run, with its picture's height and width."""
    if job.options.tiling is not None:
        return merged(job), job.picture_size
    [part] = job.parts
    assert part.candidates is not None
    return postprocess(part.candidates, part.canvas, job.options), part.canvas.original_size


def postprocess(candidates: Candidates, canvas: CanvasImage, options: Options) -> Detections:
    """Make detections of candidates by these options: original pixels, best score first."""
    kept = suppress(
        candidates,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        max_detections=options.max_detections,
        label_ids=options.label_ids,
    )
    return to_original(kept, canvas)
