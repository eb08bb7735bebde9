"""`Client`: single calls, or many at once on threads."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from types import TracebackType
from typing import Self, Unpack

import httpx

from retinaserve_client.answer import Answer, Model
from retinaserve_client.calls import (
    AHEAD,
    Call,
    Options,
    Query,
    Result,
    check_concurrency,
    detect_call,
    draw_call,
    headers_of,
    is_ready,
    model_call,
    query_of,
    ready_call,
)
from retinaserve_client.images import Image, encode
from retinaserve_client.progress import progress_of
from retinaserve_client.retries import Outcome, Retries, Send


class Client:
    """A service and its connections, for any number of threads; a context manager.

    `timeout` is for one attempt, and `total_timeout` for all attempts of a call with the pauses, in seconds. `attempts`
    includes the first. `transport` is httpx's, for your own TLS settings (`httpx.HTTPTransport(verify=…)`).
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 35,
        total_timeout: float = 120,
        attempts: int = 5,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = Retries(timeout, total_timeout, attempts)
        self._http = httpx.Client(
            base_url=url,
            headers=headers_of(api_key),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def detect(
        self,
        image: Image,
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        labels: Iterable[str] | str | None = None,
        tile: int | None = None,
        overlap: float | None = None,
    ) -> Answer:
        """Detect objects in a picture, see `Options`. DetectError. OSError, TypeError, ValueError: it is not a
        picture."""
        query = query_of(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            labels=labels,
            tile=tile,
            overlap=overlap,
        )
        return self._call(detect_call(query), encode(image))

    def detect_many(
        self, images: Iterable[Image], *, concurrency: int = 8, **options: Unpack[Options]
    ) -> Iterator[Answer | Exception]:
        """Give each picture's answer, in order, or the exception that `detect` would have raised for it.

        `concurrency` requests are under way; pictures are taken when they are needed. With tqdm, a terminal shows a
        progress bar.
        """
        query = query_of(**options)
        check_concurrency(concurrency)
        return self._in_order(images, concurrency, query)

    def draw(self, image: Image, **options: Unpack[Options]) -> bytes:
        """Give the picture with its boxes drawn, as PNG. Raises as `detect` does."""
        return self._call(draw_call(query_of(**options)), encode(image))

    def model(self) -> Model:
        """Return the model that serves. DetectError."""
        return self._call(model_call())

    def ready(self) -> bool:
        """Tell whether the service accepts pictures now, in one attempt. DetectError: another server answers."""
        call = ready_call()
        return is_ready(self._send(call, b"", self._retries.timeout), call.request_id)

    def _in_order(self, images: Iterable[Image], concurrency: int, query: Query) -> Iterator[Answer | Exception]:
        def outcome(image: Image) -> Answer | Exception:
            try:
                return self._call(detect_call(query), encode(image))
            except Exception as error:  # the boundary of one picture
                return error

        waiting: deque[Future[Answer | Exception]] = deque()
        pool, rest = ThreadPoolExecutor(concurrency), iter(images)
        try:
            with closing(progress_of(images)) as progress:
                waiting.extend(pool.submit(outcome, image) for image in islice(rest, AHEAD * concurrency))
                while waiting:
                    yield waiting.popleft().result()
                    progress.update()
                    waiting.extend(pool.submit(outcome, image) for image in islice(rest, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _call(self, call: Call[Result], body: bytes = b"") -> Result:
        steps = self._retries.steps(call.request_id)
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return call.result(end.value)
            if isinstance(step, Send):
                outcome = self._send(call, body, step.timeout)
            else:
                time.sleep(step.seconds)

    def _send(self, call: Call[Result], body: bytes, timeout: float) -> Outcome:
        try:
            return self._http.send(call.request(self._http, body, timeout))
        except httpx.TransportError as error:
            return error
