"""The service with a fault put into it, which a test has to find: python -m tests.support.faulty_service NAME,… [FLAG…]

Faults are put into this process alone; some are no more than flags that undo a bound. `timed-device` is no fault: it
lets a test know how long inference takes.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers

from model import image
from model.detector import Detector
from model.image import InvalidImage
from service import __main__ as program
from service.api import errors, uploads
from service.api.middleware import Observe
from service.api.service import Service
from service.core import engine
from service.core.store import ModelStore

DEVICE_SECONDS = 0.04
kept: list[bytes] = []
LEAKS: dict[str, Callable[[], object]] = {
    "memory": lambda: kept.append(bytes(1500)),
    "descriptors": lambda: os.dup(2),
    "threads": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
}


def leak(what: str) -> None:
    """Leave something behind: memory for each body, anything else for one in a hundred."""
    numbers, every = itertools.count(1), 1 if what == "memory" else 100

    class LeakingUploads(program.Uploads):  # which leaks something else already, perhaps
        async def receive_form(
            self, form: uploads.Form[uploads.Content], max_body_bytes: int, headers: Headers, receive: uploads.Receive
        ) -> tuple[uploads.Content, int]:
            if next(numbers) % every == 0:
                LEAKS[what]()
            return await super().receive_form(form, max_body_bytes, headers, receive)

    program.Uploads = LeakingUploads  # type: ignore[misc]


def count_twice() -> None:
    """Count one request in twenty once more."""
    count, numbers = Observe._count, itertools.count(1)

    def sometimes_twice(self: Observe, scope: Any, context: Any, status: int) -> None:
        count(self, scope, context, status)
        if next(numbers) % 20 == 0:
            self._metrics.requests.labels("ok").inc()

    Observe._count = sometimes_twice  # type: ignore[method-assign]


def mix_answers() -> None:
    """Answer one picture in fifty with the candidates of the one before it."""
    own, numbers, before = engine.postprocess, itertools.count(1), list[Any]()

    def mixed(candidates: Any, canvas: Any, options: Any) -> Any:
        before[:] = [*before[-1:], candidates]
        return own(before[0] if next(numbers) % 50 == 0 else candidates, canvas, options)

    engine.postprocess = mixed


def close_at_once() -> None:
    """End the listener at SIGTERM, before anyone has seen that this replica is not ready."""
    program.Lifecycle._stop = lambda self, number: self._close_listener()  # type: ignore[method-assign]


def serve_nothing_while_loading() -> None:
    """Let go of the model that serves before the next is there."""
    reload = ModelStore.reload

    def with_a_gap(self: ModelStore) -> bool:
        self.current = None
        return reload(self)

    ModelStore.reload = with_a_gap  # type: ignore[method-assign]


def forget_an_error() -> None:
    """Take what is wrong with a picture or a body for a bug of the server."""
    for error in (InvalidImage, uploads.MalformedRequest):
        del errors.CODES[error]


def never_ill() -> None:
    Service.why_not_alive = lambda self: None  # type: ignore[method-assign]


def walk_slowly() -> None:
    """Read a large file's claim for two seconds, on the event loop."""
    own = engine.claim_of

    def slow(data: bytearray) -> Any:
        end = time.thread_time() + (2 if len(data) > 5000 else 0)
        while time.thread_time() < end:
            pass
        return own(data)

    engine.claim_of = slow  # type: ignore[assignment]


def swap_colours() -> None:
    """Take blue for red."""
    own = image.decode_image
    image.decode_image = lambda data, **options: own(data, **options)[:, :, ::-1]


def time_device() -> None:
    """Let each image of a batch take DEVICE_SECONDS, one batch at a time, as on a device that is nobody's core."""
    own, device = Detector.run, threading.Lock()

    def timed(self: Detector, canvases: Any, lane: Any = None) -> Any:
        with device:
            end = time.monotonic() + DEVICE_SECONDS * len(canvases)
            candidates = own(self, canvases, lane)
            time.sleep(max(0.0, end - time.monotonic()))
        return candidates

    Detector.run = timed  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    **{what: lambda what=what: leak(what) for what in LEAKS},  # type: ignore[misc]
    "count-twice": count_twice,
    "mix-answers": mix_answers,
    "close-at-once": close_at_once,
    "reload-gap": serve_nothing_while_loading,
    "forget-an-error": forget_an_error,
    "never-ill": never_ill,
    "slow-walk": walk_slowly,
    "swap-colours": swap_colours,
    "timed-device": time_device,
}
FLAGS = {
    "no-queue-bound": ("--queue-capacity", "100000", "--request-timeout-seconds", "20"),
    "patient": ("--upload-timeout-seconds", "100000", "--write-timeout-seconds", "100000"),
}
"""Behind those of the test, so that they win."""


def put_in(faults: str) -> list[str]:
    """Put them into this process; the flags that are part of them."""
    for name in faults.split(","):
        if name not in FLAGS:
            FAULTS[name]()
    return [flag for name in faults.split(",") for flag in FLAGS.get(name, ())]


if __name__ == "__main__":
    sys.exit(program.main([*sys.argv[2:], *put_in(sys.argv[1])]))
