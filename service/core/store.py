"""The model that serves, and its replacement while it serves.

One thread, "model loader", has a new file opened, verified and warmed up while the old model serves, and then swaps it
in by one assignment. A further thread opens each file, so that the loader waits no longer than a deadline. An opening
that is stuck is told to end, and its file is not tried again before it has ended. Jobs keep the `LoadedModel` that they
began with, so batches in flight finish on the old one. A bad file leaves the old model serving. The loader looks for a
changed file (equal over two polls, so half-copied files are left alone), retries one that failed (`wanted`), and
reloads on request.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from model.detector import Detector, DeviceUnavailable, InferenceFailed
from model.files import Stamp, stamp_of
from model.metadata import InvalidModel
from model.runtime.session import Stopper
from service.core.refusals import Refusal
from service.core.wanted import FIRST_RETRY_SECONDS, Wanted
from service.metrics import Metrics

logger = logging.getLogger(__name__)


class NotReady(Refusal):
    """No model serves now: it is loading, or the device is lost. Try later, or try another replica."""

    retry_after_seconds = 2


OPENER = "model opener"
FORESEEN = (InvalidModel, DeviceUnavailable, InferenceFailed, OSError)
"""Reasons why a model cannot be loaded; anything else is a bug, and its traceback is logged."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    detector: Detector
    label_names: dict[int, str]
    label_ids: dict[str, int]
    max_batch_size: int
    name: str

    @cached_property
    def canvas_bytes(self) -> int:
        """Most bytes that the canvas of one picture takes."""
        return math.prod(self.detector.metadata.resize.largest_canvas) * 3


Loaded = tuple[LoadedModel, float, float]
"""The model, and the seconds that opening and warming it up took."""


class ModelStore:
    def __init__(
        self,
        path: Path,
        open_detector: Callable[[Path], Detector],
        metrics: Metrics,
        *,
        name: str | None = None,
        load_timeout_seconds: float | None = None,
        poll_seconds: float = 0,
        max_batch_size: int | None = None,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        """Make a store without a model. `name` replaces the name in the model file."""
        self._path = path
        self._name = name
        self._open_detector = open_detector
        self._metrics = metrics
        self._load_timeout_seconds = load_timeout_seconds
        self._poll_seconds = poll_seconds
        self._max_batch_size = max_batch_size
        self._first_retry_seconds = first_retry_seconds
        self.wake = threading.Event()
        """Event that makes the loader look at the file now."""
        self._reload_asked = False
        self._closing = False
        self._last_failure = ""
        """The last failure, which is logged already."""
        self.current: LoadedModel | None = None
        self._stuck: dict[Stamp, Future[Loaded]] = {}
        """Openings that have not ended. Their files are not tried again meanwhile: each try would leave a thread."""
        self.device_fault: str | None = None
        """The reason why the device can serve no more, for the rest of the process's life."""

    def serving(self) -> LoadedModel:
        """Return the model for a new request. NotReady: there is none."""
        if self.device_fault is not None:
            raise NotReady(f"the device has failed: {self.device_fault}")
        if self.current is None:
            raise NotReady("the model is being loaded")
        return self.current

    def start(self, on_failure: Callable[[str], None], on_loaded: Callable[[], None] = lambda: None) -> None:
        """Load, then watch the file. After the first load the loader's thread calls `on_loaded`, or `on_failure` with
        the reason."""
        threading.Thread(target=self._live, args=(on_failure, on_loaded), name="model loader", daemon=True).start()

    def close(self) -> None:
        self._closing = True
        self.wake.set()

    def ask_reload(self) -> None:
        """Have the file reloaded soon, changed or not. Safe in a signal handler."""
        self._reload_asked = True
        self.wake.set()

    def load(self) -> None:
        """Replace the model. On an error in FORESEEN, which is raised, the old model stays."""
        stamp = stamp_of(self._path)
        if stamp in self._stuck and not self._stuck[stamp].done():
            raise TimeoutError("the model is still stuck in being opened, and is not tried again before that ends")
        opening = Opening(self._open)
        self._stuck = {file: each for file, each in self._stuck.items() if not each.done()} | {stamp: opening.outcome}
        self.current, load_seconds, warmup_seconds = opening.result(self._load_timeout_seconds)
        self._report(self.current, load_seconds, warmup_seconds)

    def _open(self) -> Loaded:
        """Return the model, and the seconds that opening and warming it up took."""
        started = time.perf_counter()
        detector = self._open_detector(self._path)
        opened = time.perf_counter()
        max_batch_size = self._max_batch_size or detector.batch_size
        detector.warm_up(max_batch_size)
        labels = detector.metadata.labels
        model = LoadedModel(
            detector,
            label_names={label.class_id: label.label for label in labels},
            label_ids={label.label: label.class_id for label in labels},
            max_batch_size=max_batch_size,
            name=self._name or detector.metadata.name,
        )
        return model, opened - started, time.perf_counter() - opened

    @property
    def is_opening(self) -> bool:
        """Tell whether a file is being opened or warmed up, or is stuck in that."""
        return any(thread.name == OPENER for thread in threading.enumerate())

    def reload(self) -> bool:
        """Load again and count it; False: that failed, and the old model keeps serving."""
        try:
            self.load()
        except Exception as error:  # the loader's boundary: it must outlive any file, and look for the next
            unforeseen = not isinstance(error, FORESEEN)
            level = logging.DEBUG if str(error) == self._last_failure else logging.ERROR
            logger.log(level, "the model was not reloaded, the old one serves on: %s", error, exc_info=unforeseen)
            self._last_failure = str(error)
            self._metrics.model_reloads.labels("failure").inc()
            return False
        self._last_failure = ""
        self._metrics.model_reloads.labels("success").inc()
        return True

    def _report(self, model: LoadedModel, load_seconds: float, warmup_seconds: float) -> None:
        detector, metadata = model.detector, model.detector.metadata
        self._metrics.model_info.info(
            {
                "name": model.name,
                "sha256": detector.sha256,
                "precision": metadata.precision,
                "provider": detector.provider,
                "input": f"{metadata.resize.shorter_side}/{metadata.resize.longest_side}",
            }
        )
        self._metrics.provider_fallback.set(detector.fell_back)
        self._metrics.model_load_seconds.set(load_seconds)
        self._metrics.warmup_seconds.set(warmup_seconds)
        logger.info(
            "serving model %s (%s) from %s on %s, loaded in %.2f s, warmed up in %.2f s",
            model.name, detector.sha256[:12], self._path, detector.provider, load_seconds, warmup_seconds,
        )  # fmt: skip
        if detector.fell_back:
            logger.warning("CUDA was wanted and cannot be used: the model runs on the CPU")

    def _live(self, on_failure: Callable[[str], None], on_loaded: Callable[[], None]) -> None:
        wanted = Wanted(stamp_of(self._path), self._first_retry_seconds)
        try:
            self.load()
        except Exception as error:  # a boundary: end with the reason, do not sit there unready
            if not isinstance(error, FORESEEN):
                logger.exception("the model cannot be loaded")
            on_failure(str(error))
            return
        on_loaded()
        while True:
            self.wake.wait(wanted.seconds_to_wait(self._poll_seconds, time.monotonic()))
            self.wake.clear()
            if self._closing:
                return
            stamp = stamp_of(self._path)
            self._metrics.model_wanted_differs.set(stamp != wanted.served)
            if wanted.is_due(stamp, time.monotonic()) or self._reload_asked:
                self._reload_asked = False
                if self.reload():
                    wanted.loaded(stamp)
                    self._metrics.model_wanted_differs.set(0)
                else:
                    wanted.failed(stamp, time.monotonic())


@dataclass(frozen=True)
class Opening:
    """A call on a thread of its own, for which the caller waits for a limited time."""

    call: Callable[[], "Loaded"]
    stopper: Stopper = field(default_factory=Stopper)
    outcome: "Future[Loaded]" = field(default_factory=Future)

    def result(self, seconds: float | None) -> "Loaded":
        """Return or raise what `call` does. TimeoutError: it takes longer; it is told to end, and not waited for."""
        threading.Thread(target=self._run, name=OPENER, daemon=True).start()
        try:
            return self.outcome.result(seconds)
        except TimeoutError as error:
            if self.outcome.done():  # its own
                raise
            self.stopper.stop()
            raise TimeoutError(f"the model was not loaded and warmed up within {seconds:g} s") from error

    def _run(self) -> None:
        try:
            with self.stopper:
                self.outcome.set_result(self.call())
        except BaseException as error:
            self.outcome.set_exception(error)
