"""The routes that detect: bytes received, images submitted, answers awaited, a response made.

The routes are plain Starlette's, described in `service.api.openapi`: FastAPI's parsing of a request would take a tenth
of the event loop's time for it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.answers import answers_of
from service.api.errors import problem_of
from service.api.middleware import context_of
from service.api.parameters import options, read_query, with_parameters
from service.api.paths import DETECT, DETECT_BATCH
from service.api.replies import Answered, Reply, as_json, as_picture, picture_wanted
from service.api.service import Service
from service.api.uploads import JsonImage
from service.config import MAX_BATCH_IMAGES
from service.core.job import Finish, Options
from service.core.store import LoadedModel


class Detection:
    """The endpoints, around the parts of the service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.max_batch_images = min(MAX_BATCH_IMAGES, service.settings.queue_capacity)

    @property
    def routes(self) -> list[Route]:
        return [
            Route(DETECT, self.detect, methods=["POST"]),
            Route(DETECT_BATCH, self.detect_batch, methods=["POST"]),
        ]

    async def detect(self, request: Request) -> Response:
        """Answer one image with its detections or its drawing."""
        picture_format = picture_wanted(request.headers.get("accept", ""))
        if picture_format is None:
            return await self.respond(request, self._as_json(request))
        finish = partial(as_picture, decoders=self._service.engine.decoders, picture_format=picture_format)
        return await self.respond(request, finish, draws=True)

    async def detect_batch(self, request: Request) -> Response:
        """Answer each of up to 16 images with its detections or its problem."""
        replies = await self._replies(request, self._as_json(request), max_images=self.max_batch_images)
        request_id = context_of(request.scope).request_id
        parts = (
            reply.body if isinstance(reply, Reply) else to_json(problem_of(reply, request_id)) for reply in replies
        )
        return Response(b'{"results":[' + b",".join(parts) + b"]}", media_type="application/json")

    def _as_json(self, request: Request) -> Finish:
        return partial(as_json, request_id=context_of(request.scope).request_id)

    async def respond(
        self, request: Request, finish: Finish, *, draws: bool = False, json: JsonImage | None = None
    ) -> Response:
        """Answer one image with what `finish` makes of it. Raises the image's error. `json`: see `Uploads.receive`."""
        [reply] = await self._replies(request, finish, max_images=1, draws=draws, json=json)
        if isinstance(reply, BaseException):
            raise reply
        timing = ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in reply.timing.items())
        return Response(reply.body, media_type=reply.media_type, headers={"Server-Timing": timing, "Vary": "Accept"})

    async def _replies(
        self,
        request: Request,
        finish: Finish,
        *,
        max_images: int,
        draws: bool = False,
        json: JsonImage | None = None,
    ) -> list[Reply | BaseException]:
        """Detect in each image; return the result or error of each, in order. Raises errors of the whole request."""
        service = self._service
        model = service.store.serving()
        query = read_query(request.query_params)
        asked = options(query, service.settings, model)
        images, size = await service.uploads.receive(request.headers, request.receive, max_images=max_images, json=json)
        if json is not None and json.parameters:
            asked = options(with_parameters(query, json.parameters, strict=True), service.settings, model)
        return await self.run(request, images, size, model, asked, finish, draws=draws)

    async def run(
        self,
        request: Request,
        images: Sequence[bytearray],
        body_bytes: int,
        model: LoadedModel,
        asked: Options,
        finish: Finish,
        *,
        draws: bool = False,
        timeout_seconds: float = math.inf,
    ) -> list[Any]:
        """Return what `finish` makes of each image (an `Answered` at least), or its exception, in order.

        `body_bytes` is the size of the request's body, `timeout_seconds` the client's own limit. Raises errors of the
        whole request.
        """
        service, context = self._service, context_of(request.scope)
        context.watch.lap("read")
        context.fields["body_bytes"] = body_bytes
        service.metrics.http.request_size.observe(body_bytes)
        timeout_seconds = min(timeout_seconds, service.settings.request_timeout_seconds)
        jobs = service.engine.submit(
            images, model, asked, finish, timeout_seconds=timeout_seconds, watch=context.watch, draws=draws
        )
        replies = await answers_of(jobs, request.receive, timeout_seconds, service.engine.cancel)
        if answered := [reply for reply in replies if not isinstance(reply, BaseException)]:
            service.metrics.request_duration.observe(max(reply.detected.watch.total for reply in answered))
            context.fields |= _log_fields(answered)
        return replies


def _log_fields(replies: Sequence[Answered]) -> dict[str, Any]:
    results = [reply.detected for reply in replies]
    model = results[0].model
    return {
        "images": [f"{width}x{height}" for height, width in (detected.original_size for detected in results)],
        "detections": [len(detected.detections) for detected in results],
        "model": model.name,
        "model_sha256": model.detector.sha256[:12],
        "timing_ms": replies[0].timing,
    }
