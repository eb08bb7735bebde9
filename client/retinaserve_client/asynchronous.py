"""`AsyncClient`: `Client` for asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
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


class AsyncClient:
    """A service and its connections, for one event loop; an asynchronous context manager. Arguments are `Client`'s."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 35,
        total_timeout: float = 120,
        attempts: int = 5,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = Retries(timeout, total_timeout, attempts)
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers_of(api_key),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def detect(
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
        """See `Client.detect`."""
        query = query_of(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            labels=labels,
            tile=tile,
            overlap=overlap,
        )
        return await self._ask(detect_call(query), image)

    def detect_many(
        self, images: Iterable[Image], *, concurrency: int = 8, **options: Unpack[Options]
    ) -> AsyncIterator[Answer | Exception]:
        """See `Client.detect_many`."""
        check_concurrency(concurrency)
        return self._in_order(images, concurrency, query_of(**options))

    async def draw(self, image: Image, **options: Unpack[Options]) -> bytes:
        """See `Client.draw`."""
        return await self._ask(draw_call(query_of(**options)), image)

    async def model(self) -> Model:
        """See `Client.model`."""
        return await self._call(model_call())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        call = ready_call()
        return is_ready(await self._send(call, b"", self._retries.timeout), call.request_id)

    async def _in_order(
        self, images: Iterable[Image], concurrency: int, query: Query
    ) -> AsyncIterator[Answer | Exception]:
        free = asyncio.Semaphore(concurrency)

        async def outcome(image: Image) -> Answer | Exception:
            async with free:
                try:
                    return await self._ask(detect_call(query), image)
                except Exception as error:  # the boundary of one picture
                    return error

        rest = iter(images)
        waiting = deque(asyncio.create_task(outcome(image)) for image in islice(rest, AHEAD * concurrency))
        try:
            with closing(progress_of(images)) as progress:
                while waiting:
                    yield await waiting[0]
                    waiting.popleft()
                    progress.update()
                    waiting.extend(asyncio.create_task(outcome(image)) for image in islice(rest, 1))
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _ask(self, call: Call[Result], image: Image) -> Result:
        return await self._call(call, await asyncio.to_thread(encode, image))

    async def _call(self, call: Call[Result], body: bytes = b"") -> Result:
        steps = self._retries.steps(call.request_id)
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return call.result(end.value)
            if isinstance(step, Send):
                outcome = await self._send(call, body, step.timeout)
            else:
                await asyncio.sleep(step.seconds)

    async def _send(self, call: Call[Result], body: bytes, timeout: float) -> Outcome:
        try:
            return await self._http.send(call.request(self._http, body, timeout))
        except httpx.TransportError as error:
            return error
