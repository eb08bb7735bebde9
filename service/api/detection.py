"""The routes that detect: bytes received, images submitted, answers awaited, a response made.

Plain Starlette routes, described in `service.api.openapi`: FastAPI's own reading of a request takes a tenth of the time
that the event loop has for one.
"""

from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.answers import answers_of
from service.api.errors import problem_of
from service.api.middleware import context_of
from service.api.openapi import DETECT, DETECT_BATCH
from service.api.parameters import options, read_query
from service.api.replies import Reply, as_json, as_picture, picture_wanted
from service.api.schemas import encode
from service.api.service import Service
from service.config import MAX_BATCH_IMAGES
from service.core.job import Finish, Options
from service.core.store import LoadedModel


class Detection:
    """The endpoints, around the parts of the service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._max_batch_images = min(MAX_BATCH_IMAGES, service.settings.queue_capacity)

    @property
    def routes(self) -> list[Route]:
        return [
            Route(DETECT, self.detect, methods=["POST"]),
            Route(DETECT_BATCH, self.detect_batch, methods=["POST"]),
        ]

    async def detect(self, request: Request) -> Response:
        """Answer one image with its detections or its drawing."""
        model, asked = self._asked(request)
        [image] = await self._receive(request, max_images=1)
        finish: Finish = partial(as_json, request_id=context_of(request.scope).request_id)
        picture_format = picture_wanted(request.headers.get("accept", ""))
        if picture_format is not None:
            max_pixels = self._service.settings.max_image_pixels
            finish = partial(as_picture, max_pixels=max_pixels, picture_format=picture_format)
        drawn = picture_format is not None
        [reply] = await self._answers(request, [image], model, asked, finish, draws=drawn)
        if isinstance(reply, BaseException):
            raise reply
        self._note(request, [reply])
        timing = ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in reply.timing.items())
        return Response(reply.body, media_type=reply.media_type, headers={"Server-Timing": timing, "Vary": "Accept"})

    async def detect_batch(self, request: Request) -> Response:
        """Answer each of up to 16 images with its detections or its problem."""
        model, asked = self._asked(request)
        images = await self._receive(request, max_images=self._max_batch_images)
        request_id = context_of(request.scope).request_id
        replies = await self._answers(request, images, model, asked, partial(as_json, request_id=request_id))
        self._note(request, [reply for reply in replies if isinstance(reply, Reply)])
        parts = [reply.body if isinstance(reply, Reply) else encode(problem_of(reply, request_id)) for reply in replies]
        return Response(b'{"results":[' + b",".join(parts) + b"]}", media_type="application/json")

    def _asked(self, request: Request) -> tuple[LoadedModel, Options]:
        """The model that serves, and what the query asks of it. NotReady, InvalidParameter."""
        model = self._service.store.serving()
        return model, options(read_query(request.query_params), self._service.settings, model)

    async def _receive(self, request: Request, max_images: int) -> list[bytearray]:
        images, size = await self._service.uploads.receive(request.headers, request.receive, max_images=max_images)
        context = context_of(request.scope)
        context.watch.lap("read")
        context.fields["body_bytes"] = size
        self._service.metrics.http.request_size.observe(size)
        return images

    async def _answers(
        self,
        request: Request,
        images: Sequence[bytearray],
        model: LoadedModel,
        asked: Options,
        finish: Finish,
        *,
        draws: bool = False,
    ) -> list[Reply | BaseException]:
        """What became of each image, in order. QueueFull, ClientGone."""
        engine, timeout_seconds = self._service.engine, self._service.settings.request_timeout_seconds
        jobs = engine.submit(
            images,
            model,
            asked,
            finish,
            timeout_seconds=timeout_seconds,
            watch=context_of(request.scope).watch,
            draws=draws,
        )
        return await answers_of(jobs, request.receive, timeout_seconds, engine.cancel)

    def _note(self, request: Request, replies: Sequence[Reply]) -> None:
        """Count the request's duration; leave what its log line says."""
        if not replies:
            return
        results = [reply.detected for reply in replies]
        model = results[0].model
        self._service.metrics.request_duration.observe(max(detected.watch.total for detected in results))
        context_of(request.scope).fields |= {
            "images": [f"{width}x{height}" for height, width in (detected.original_size for detected in results)],
            "detections": [len(detected.detections) for detected in results],
            "model": model.name,
            "model_sha256": model.detector.sha256[:12],
            "timing_ms": replies[0].timing,
        }
