"""The routes: HTTP in, HTTP out, around an `Engine` that knows nothing of it.

One upload: route → uploads (bytes) → engine → model.image → batcher → model.detector → model.suppress → route. The
event loop only moves bytes; decoding, inference, post-processing and encoding run on the engine's threads.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from model.image import decode_image
from service.api.errors import CODES, KINDS, PROBLEM_MEDIA_TYPE, InvalidParameter, problem, problem_of
from service.api.middleware import Linger, Observe, RequireKey, Shed, problem_response, record_of
from service.api.openapi import (
    BATCH_BODY,
    EVERYWHERE,
    MAX_BATCH_IMAGES,
    ONE_IMAGE,
    ONE_IMAGE_BODY,
    PARAMETERS,
    PICTURE_ANSWER,
    UPLOAD,
    problems,
)
from service.api.schemas import (
    Answer,
    BatchAnswer,
    DetectQuery,
    ModelCard,
    Status,
    Thresholds,
    answer,
    encode,
    model_card,
    timing_ms,
)
from service.api.uploads import ClientGone, Uploads
from service.config import Settings
from service.core.engine import Engine
from service.core.job import DeadlineExceeded, Detected, Finish, Job, Options
from service.core.store import LoadedModel, ModelStore, NotReady
from service.drawing import PictureFormat, draw, encode_picture
from service.metrics import METHODS, OTHER_METHOD, UNMATCHED, Metrics, program_version

SHOWN_LABELS = 20

Value = TypeVar("Value", int, float)


@dataclass
class Life:
    """Where the process stands between start and end."""

    draining: bool = False


@dataclass(frozen=True)
class Reply:
    """One image's answer, encoded."""

    body: bytes
    media_type: str
    timing: dict[str, float]
    detected: Detected


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, store: ModelStore, engine: Engine, metrics: Metrics) -> None:
        self.store = store
        self.engine = engine
        self.metrics = metrics
        self.life = Life()
        self.max_batch_images = min(MAX_BATCH_IMAGES, settings.queue_capacity)
        self._settings = settings
        self._uploads = Uploads(
            max_image_bytes=settings.max_image_bytes,
            max_bytes_in_flight=settings.max_upload_bytes_in_flight,
            timeout_seconds=settings.upload_timeout_seconds,
        )
        metrics.upload_bytes_in_flight.set_function(lambda: self._uploads.bytes_in_flight)
        metrics.ready.set_function(lambda: self.why_not_ready() is None)

    def why_not_alive(self) -> str | None:
        if self.store.device_fault is not None:
            return f"the device has failed: {self.store.device_fault}"
        step, seconds = self.engine.line.oldest_step() or ("", 0)
        if seconds > 2 * self._settings.request_timeout_seconds:
            return f"one {step} has been under way for {seconds:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        if self.life.draining:
            return "draining"
        if self.store.current is None:
            return "loading the model"
        return self.why_not_alive()

    def refusal(self) -> Exception | None:
        """Why no image can be admitted now."""
        return self.engine.refusal(1, self._settings.request_timeout_seconds)

    def thresholds(self, model: LoadedModel) -> Thresholds:
        """What holds where the query says nothing: the settings, then the model file."""
        settings, metadata = self._settings, model.detector.metadata
        return Thresholds(
            score_threshold=_first(settings.score_threshold, metadata.score_threshold),
            nms_threshold=_first(settings.nms_threshold, metadata.nms_threshold),
            max_detections=_first(settings.max_detections, metadata.max_detections),
        )

    def options(self, query: DetectQuery, model: LoadedModel) -> Options:
        """InvalidParameter: the model has no such label."""
        defaults = self.thresholds(model)
        unknown = [label for label in query.label if label not in model.label_ids]
        if unknown:
            known = list(model.label_ids)
            more = f" and {len(known) - SHOWN_LABELS} more" if len(known) > SHOWN_LABELS else ""
            raise InvalidParameter(f"label: {unknown[0]!r} is not one of {', '.join(known[:SHOWN_LABELS])}{more}")
        return Options(
            score_threshold=_first(query.score_threshold, defaults.score_threshold),
            nms_threshold=_first(query.nms_threshold, defaults.nms_threshold),
            max_detections=_first(query.max_detections, defaults.max_detections),
            label_ids=frozenset(model.label_ids[label] for label in query.label) or None,
        )

    async def detect(self, request: Request) -> Response:
        """One image in, its answer or its drawing out."""
        model = self.store.serving()
        options = self.options(read_query(request.query_params), model)
        [image] = await self._receive(request, max_images=1)
        record = record_of(request.scope)
        picture_format = picture_wanted(request.headers.get("accept", ""))
        finish: Finish = partial(as_json, request_id=record.request_id)
        if picture_format is not None:
            finish = partial(
                as_picture,
                max_pixels=self._settings.max_image_pixels,
                picture_format=picture_format,
            )
        drawn = picture_format is not None
        [reply] = await self._answers(request, [image], model, options, finish, draws=drawn)
        if isinstance(reply, BaseException):
            raise reply
        self._note(request, [reply])
        timing = ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in reply.timing.items())
        return Response(reply.body, media_type=reply.media_type, headers={"Server-Timing": timing, "Vary": "Accept"})

    async def detect_batch(self, request: Request) -> Response:
        """Up to 16 images in, for each an answer or a problem out."""
        model = self.store.serving()
        options = self.options(read_query(request.query_params), model)
        images = await self._receive(request, max_images=self.max_batch_images)
        request_id = record_of(request.scope).request_id
        finish: Finish = partial(as_json, request_id=request_id)
        replies = await self._answers(request, images, model, options, finish)
        self._note(request, [reply for reply in replies if isinstance(reply, Reply)])
        parts = [reply.body if isinstance(reply, Reply) else encode(problem_of(reply, request_id)) for reply in replies]
        return Response(b'{"results":[' + b",".join(parts) + b"]}", media_type="application/json")

    async def _receive(self, request: Request, max_images: int) -> list[bytearray]:
        record = record_of(request.scope)
        images, size = await self._uploads.receive(request.headers, request.receive, max_images=max_images)
        record.watch.lap("read")
        record.fields["body_bytes"] = size
        self.metrics.http_request_size.observe(size)
        return images

    async def _answers(
        self,
        request: Request,
        images: Sequence[bytearray],
        model: LoadedModel,
        options: Options,
        finish: Finish,
        *,
        draws: bool = False,
    ) -> list[Any]:
        """A Reply or an exception for each image. QueueFull, ClientGone."""
        timeout = self._settings.request_timeout_seconds
        watch = record_of(request.scope).watch
        jobs = self.engine.submit(images, model, options, finish, timeout_seconds=timeout, watch=watch, draws=draws)
        return await answers_of(jobs, request.receive, timeout, self.engine.cancel)

    def _note(self, request: Request, replies: Sequence[Reply]) -> None:
        """Count the request's duration; leave what its log line says."""
        record = record_of(request.scope)
        if not replies:
            return
        first = replies[0].detected
        self.metrics.request_duration.observe(max(reply.detected.watch.total for reply in replies))
        record.fields |= {
            "images": [f"{reply.detected.original_size[1]}x{reply.detected.original_size[0]}" for reply in replies],
            "detections": [len(reply.detected.detections) for reply in replies],
            "model": first.model.name,
            "model_sha256": first.model.detector.sha256[:12],
            "timing_ms": replies[0].timing,
        }


async def answers_of(
    jobs: Sequence[Job], receive: Receive, timeout_seconds: float, cancel: Callable[[Job], None]
) -> list[Any]:
    """Each job's result or exception; DeadlineExceeded for those not done in time. ClientGone: nobody waits any more.

    Whatever happens, work that nobody will read is not begun.
    """
    loop = asyncio.get_running_loop()
    enough, unfinished = loop.create_future(), len(jobs)

    def wake(_: object = None) -> None:
        if not enough.done():
            enough.set_result(None)

    def job_done(_: object) -> None:
        nonlocal unfinished
        unfinished -= 1
        if not unfinished:
            wake()

    gone = loop.create_task(_disconnected(receive))
    gone.add_done_callback(wake)
    timer = loop.call_later(timeout_seconds, wake)
    for job in jobs:
        job.future.add_done_callback(job_done)
    try:
        await enough
        if unfinished and gone.done():
            raise ClientGone("the connection was closed before the answer")
        late = DeadlineExceeded(f"the answer was not ready within {timeout_seconds:g} s")
        return [(job.future.exception() or job.future.result()) if job.future.done() else late for job in jobs]
    finally:
        timer.cancel()
        gone.cancel()
        for job in jobs:
            if not job.future.done():
                cancel(job)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_json(detected: Detected, data: bytearray, *, request_id: str) -> Reply:
    values = answer(detected, request_id)
    return Reply(encode(values), "application/json", values["timing_ms"], detected)


def as_picture(detected: Detected, data: bytearray, *, max_pixels: int, picture_format: PictureFormat) -> Reply:
    """Decodes again: holding every upload's pixels for the few that want a drawing would cost more."""
    timing = timing_ms(detected)
    pixels = decode_image(bytes(data), max_pixels=max_pixels)
    picture = draw(pixels, detected.detections, detected.model.label_names)
    return Reply(encode_picture(picture, picture_format), f"image/{picture_format}", timing, detected)


def read_query(parameters: QueryParams) -> DetectQuery:
    """Of a value given twice the last counts. InvalidParameter: mend the query.

    FastAPI could do this; it takes a quarter of the time that the event loop has for a request.
    """
    values: dict[str, Any] = dict(parameters)
    if "label" in values:
        values["label"] = parameters.getlist("label")
    try:
        return DetectQuery.model_validate(values)
    except ValidationError as error:
        raise InvalidParameter("; ".join(map(_explain, error.errors()))) from error


def picture_wanted(accept: str) -> PictureFormat | None:
    """The picture format that this Accept header names and ranks above JSON. A browser's header gets JSON."""
    quality: dict[str, float] = {}
    for entry in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        q = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            quality[media_type] = float(q)
        except ValueError:
            return None
    if "text/html" in quality:
        return None
    json = next((quality[name] for name in ("application/json", "application/*", "*/*") if name in quality), 0)
    png, jpeg = quality.get("image/png", 0), quality.get("image/jpeg", 0)
    if max(png, jpeg) <= json:
        return None
    return "png" if png >= jpeg else "jpeg"


def _first(given: Value | None, default: Value) -> Value:
    return default if given is None else given


def create_app(service: Service, settings: Settings) -> ASGIApp:
    """The ASGI application: FastAPI in our layers, and none of its own around them, so that refusals take little."""
    make_app = partial(FastAPIOffline, docs_url="/docs") if settings.docs else partial(FastAPI, openapi_url=None)
    app = make_app(
        title="retinaserve",
        version=program_version(),
        summary="A RetinaNet object detector over HTTP.",
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_detection(app, service)
    _add_operations(app, service)
    _add_errors(app)
    routes = sorted({route.path for route in app.routes if isinstance(route, Route)})
    _make_series(app, service.metrics, routes)
    return _layers(app, service, settings, routes)


class DirectRoute(APIRoute):
    """Of an endpoint that reads the request and writes the answer itself: FastAPI describes it and need do no more."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def _add_detection(app: FastAPI, service: Service) -> None:
    post = partial(app.router.add_api_route, methods=["POST"], route_class_override=DirectRoute)
    post(
        "/detect",
        service.detect,
        summary="Detect objects in one image",
        response_model=Answer,
        responses=problems(*ONE_IMAGE) | PICTURE_ANSWER,
        openapi_extra={"parameters": PARAMETERS, "requestBody": ONE_IMAGE_BODY},
    )
    post(
        "/detect/batch",
        service.detect_batch,
        summary="Detect objects in up to 16 images",
        response_model=BatchAnswer,
        responses=problems(*UPLOAD),
        openapi_extra={"parameters": PARAMETERS, "requestBody": BATCH_BODY},
    )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get(
        "/model",
        summary="The model that serves",
        response_model=ModelCard,
        responses=problems("not_ready", *EVERYWHERE),
    )
    async def model() -> ModelCard:
        loaded = service.store.serving()
        return model_card(loaded, service.thresholds(loaded))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Alive?", responses=problems("not_ready", *EVERYWHERE))
    async def healthz() -> Status:
        return _status("alive", service.why_not_alive())

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Able to serve?", responses=problems("not_ready", *EVERYWHERE))
    async def readyz() -> Status:
        return _status("ready", service.why_not_ready())

    @app.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    def metrics() -> Response:  # not async: on a thread, because it takes milliseconds
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _status(good: str, why_not: str | None) -> Status:
    if why_not is not None:
        raise NotReady(why_not)
    return Status(status=good)


def _add_errors(app: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return problem_response(error, record_of(request.scope).request_id)

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = next((code for code, kind in KINDS.items() if kind.status == error.status_code), "malformed_request")
        body = problem(code, f"{request.method} {request.url.path}", record_of(request.scope).request_id)
        return Response(encode(body), body["status"], error.headers, PROBLEM_MEDIA_TYPE)

    for kind in (*CODES, Exception):  # FastAPI raises the last on, for Observe to log
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, by_framework)


def _explain(error: ErrorDetails) -> str:
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such parameter; there are {', '.join(DetectQuery.model_fields)}"
    return f"{name}: {error['msg']}, not {error['input']!r}"


def _layers(app: ASGIApp, service: Service, settings: Settings, routes: Sequence[str]) -> ASGIApp:
    """Innermost first."""
    app = Shed(app, refusal=service.refusal)
    if settings.api_keys:
        app = RequireKey(app, keys=[key.get_secret_value() for key in settings.api_keys])
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
        )
    app = Linger(app, seconds=settings.upload_timeout_seconds)
    return Observe(app, metrics=service.metrics, routes=routes, is_draining=lambda: service.life.draining)


def _make_series(app: FastAPI, metrics: Metrics, routes: Sequence[str]) -> None:
    """Every series that HTTP requests can have, from the start."""
    methods = (*METHODS, OTHER_METHOD)
    for path in routes:
        answers: dict[str, tuple[int, ...]] = dict.fromkeys(methods, (401, 405))
        for route in app.routes:
            if isinstance(route, Route) and route.path == path:
                answers |= dict.fromkeys(route.methods or (), _statuses(path))
        metrics.make_http_series(path, answers)
    answers = dict.fromkeys(methods, (200, 400, 401, 404, 405))
    files = dict.fromkeys(("GET", "HEAD"), (200, 206, 304, 400, 401, 404, 416))  # of the docs page
    metrics.make_http_series(UNMATCHED, answers | files)


def _statuses(path: str) -> tuple[int, ...]:
    if path.startswith("/detect"):
        return (200, *sorted({kind.status for kind in KINDS.values()} - {404, 405}))
    return 200, 401, 500, 503
