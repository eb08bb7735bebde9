"""The ASGI application: routes, errors, and the layers around them.

One upload: middleware → detection → uploads (bytes) → core → model → replies → detection. The event loop only moves
bytes; decoding, inference, post-processing and encoding run on the engine's threads.
"""

import gzip
from collections.abc import Collection
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from service.api.detection import Detection
from service.api.errors import CODES, PROBLEM_TYPES, problem
from service.api.huggingface import HuggingFace
from service.api.keys import ApiKeys
from service.api.middleware import (
    BelowPrefix,
    FileProblems,
    Linger,
    Observe,
    RequireKey,
    Shed,
    context_of,
    problem_response,
    response_of,
)
from service.api.openapi import EVERYWHERE, ONE_IMAGE, UPLOAD, add_detection, docs_page, problems
from service.api.openinference.routes import OpenInference
from service.api.parameters import thresholds
from service.api.paths import DETECT_BATCH, INFER, OPEN_INFERENCE_MODEL, route_of
from service.api.playground import routes as playground_routes
from service.api.schemas import ModelCard, Status, model_card
from service.api.service import Service
from service.core.store import NotReady
from service.metrics import OTHER_METHOD, UNMATCHED, HttpMetrics, program_version


def create_app(service: Service) -> ASGIApp:
    """Make the ASGI application: FastAPI inside our own layers, so that a refusal passes none of FastAPI's.

    InvalidKeys: the file of API keys is invalid.
    """
    documented, detection = service.settings.docs, Detection(service)
    make_app = partial(FastAPIOffline, docs_url=None) if documented else partial(FastAPI, openapi_url=None)
    api = make_app(
        title="retinaserve",
        version=program_version(),
        summary="A RetinaNet object detector over HTTP.",
        redoc_url=None,
        redirect_slashes=False,
        routes=[
            *detection.routes,
            *HuggingFace(detection, service.settings.max_image_bytes).routes,
            *OpenInference(service, detection).routes,
            *playground_routes(with_page=documented),
        ],
        servers=[{"url": service.settings.root_path}] if service.settings.root_path else None,
    )
    _add_operations(api, service)
    _add_errors(api)
    if documented:
        api.get("/docs", include_in_schema=False)(docs_page)
        add_detection(api.openapi())
    routes = [route for route in api.routes if isinstance(route, Route)]
    _answer_head(routes)
    keys = ApiKeys([key.get_secret_value() for key in service.settings.api_keys], service.settings.api_keys_file)
    _make_series(service.metrics.http, routes, keyed=bool(keys), cross_origin=bool(service.settings.cors_origins))
    app: ASGIApp = api
    for layer, args, kwargs in reversed(_layers(service, keys, {route_of(route.path) for route in routes})):
        app = layer(app, *args, **kwargs)
    return app


def _layers(service: Service, keys: ApiKeys, routes: Collection[str]) -> list[Middleware]:
    """List the layers around the routes, outermost first."""
    settings = service.settings
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],  # such as traceparent; a header harms nobody
        expose_headers=["Inference-Header-Content-Length", "Retry-After", "Server-Timing", "X-Request-ID"],
    )
    return [
        *([Middleware(BelowPrefix, prefix=settings.root_path, routes=routes)] if settings.root_path else []),
        Middleware(Observe, metrics=service.metrics, routes=routes, is_draining=lambda: service.draining),
        Middleware(Linger, seconds=settings.upload_timeout_seconds),
        *([cross_origin] if settings.cors_origins else []),
        *([Middleware(RequireKey, keys=keys)] if keys else []),
        Middleware(Shed, refusal=service.refusal),
        Middleware(FileProblems),
    ]


def _answer_head(routes: list[Route]) -> None:
    """Add HEAD to each route that has GET, as RFC 9110 demands and FastAPI does not. Call it after the OpenAPI document
    is made, which lists GET alone."""
    for route in routes:
        if route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


def _add_operations(api: FastAPI, service: Service) -> None:
    @api.get(
        "/model",
        summary="The model that serves",
        response_model=ModelCard,
        responses=problems("not_ready", *EVERYWHERE),
    )
    async def model() -> ModelCard:
        loaded = service.store.serving()
        return model_card(loaded, thresholds(service.settings, loaded.detector.metadata))

    @api.get("/healthz", summary="Alive?", responses=problems("not_ready", *EVERYWHERE))
    async def healthz() -> Status:
        return _status("alive", service.why_not_alive())

    @api.get("/readyz", summary="Able to serve?", responses=problems("not_ready", *EVERYWHERE))
    async def readyz() -> Status:
        return _status("ready", service.why_not_ready())

    @api.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:  # not async: on a thread, because it takes milliseconds
        response = Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
        response.headers["Vary"] = "Accept-Encoding"
        if "gzip" in request.headers.get("accept-encoding", ""):
            response.body = gzip.compress(response.body, compresslevel=1)
            response.headers.update({"Content-Encoding": "gzip", "Content-Length": str(len(response.body))})
        return response


def _status(good: str, why_not: str | None) -> Status:
    if why_not is not None:
        raise NotReady(why_not)
    return Status(status=good)


def _add_errors(api: FastAPI) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return problem_response(error, request.scope)

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        codes = (code for code, kind in PROBLEM_TYPES.items() if kind.status == error.status_code)
        detail = f"{request.method} {request.url.path}"
        body = problem(next(codes, "malformed_request"), detail, context_of(request.scope).request_id)
        allow = {"Allow": _methods_of(api, request)} if error.status_code == 405 else {}
        return response_of(body, request.scope, {**(error.headers or {}), **allow})

    for kind in (*CODES, Exception):  # FastAPI raises the last on, for Observe to log
        api.add_exception_handler(kind, known)
    api.add_exception_handler(HTTPException, by_framework)


def _methods_of(api: FastAPI, request: Request) -> str:
    """List the methods of all routes with this path."""
    routes = [route for route in api.routes if isinstance(route, Route)]
    found = (route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for methods in found for method in methods}))


def _make_series(metrics: HttpMetrics, routes: list[Route], *, keyed: bool, cross_origin: bool) -> None:
    """Make every series that HTTP requests can have."""
    refused = {401} if keyed else set()
    preflight = {200, 400} if cross_origin else set()
    for path in sorted({route_of(each.path) for each in routes}):
        methods = {method for each in routes if route_of(each.path) == path for method in each.methods or ()}
        metrics.make_series(OTHER_METHOD, path, {405} | preflight)
        if "GET" in methods:
            unknown_model = {404} if path.startswith(OPEN_INFERENCE_MODEL) else set()
            metrics.make_series("GET", path, {200, 503} | refused | unknown_model)
        if "POST" in methods:
            metrics.make_series("POST", path, _statuses(path) | refused, timed=True)
    files = {200, 206, 304, 400, 404}  # of the docs page
    metrics.make_series("GET", UNMATCHED, files | refused)
    metrics.make_series(OTHER_METHOD, UNMATCHED, {400, 404, 405, 414, 431, 500} | refused | preflight)


def _statuses(route: str) -> set[int]:
    """Return the statuses that a detecting route can give, without those that any request can get."""
    codes = {DETECT_BATCH: UPLOAD, INFER: {*ONE_IMAGE, "not_found"} - {"not_acceptable"}}.get(route, ONE_IMAGE)
    return {200, 499} | {PROBLEM_TYPES[code].status for code in codes} - {401, 414, 431}
