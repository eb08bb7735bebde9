"""The layers around every request, as plain ASGI (the function kind of middleware hides disconnects).

BelowPrefix: --root-path. Observe: request id, HTTP metrics, one log line. Linger: an answer given before the body was
read still reaches its client. RequireKey: API keys. Shed: early refusals. FileProblems: a bad Range of the docs' files.
"""

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.connections import PROTOCOL_ERROR
from service.api.errors import OUTCOME_OF_STATUS, PROBLEM_MEDIA_TYPE, Unauthorized, code_of, headers_of, problem_of
from service.api.keys import ApiKeys
from service.api.paths import DETECTION_ROUTES, OPEN_PATHS, QUIET_PATHS, route_of, speaks_open_inference
from service.api.playground import is_playground
from service.api.uploads import MalformedRequest
from service.core.job import Stopwatch
from service.metrics import UNMATCHED, Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass
class RequestContext:
    """The facts of one request, for its answer and its log line."""

    request_id: str
    watch: Stopwatch = field(default_factory=Stopwatch)
    fields: dict[str, Any] = field(default_factory=dict)
    """Further values of the log line."""


def context_of(scope: Scope) -> RequestContext:
    context: RequestContext = scope["state"]["context"]
    return context


class BelowPrefix:
    """Removes the prefix from the path, for a proxy that passes it on; most proxies remove it themselves."""

    def __init__(self, app: ASGIApp, *, prefix: str, routes: Collection[str]) -> None:
        self._app = app
        self._prefix = prefix
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.startswith(self._prefix + "/") and route_of(path) not in self._routes:  # a prefix may be called /detect
            scope = {**scope, "path": path.removeprefix(self._prefix)}
        await self._app(scope, receive, send)


class Observe:
    """Gives every request an id. Counts and logs it when its answer begins, so that an answered request is counted."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, routes: Collection[str], is_draining: Callable[[], bool]
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(self._request_id(Headers(scope=scope)))
        scope.setdefault("state", {})["context"] = context
        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._count(scope, context, message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = context.request_id
                if self._is_draining():
                    headers["Connection"] = "close"  # the next request shall go to another replica
            await send(message)

        with self._metrics.http.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:  # the outermost boundary: a bug is logged, and answered too
                if code_of(error) == "internal_error":
                    logger.exception("a request failed", extra={"fields": {"request_id": context.request_id}})
                if not answered:
                    await problem_response(error, scope)(scope, receive, send_with_id)

    def _request_id(self, headers: Headers) -> str:
        given = headers.get("x-request-id", "")
        return given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"  # no secret

    def _count(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.perf_counter() - context.watch.started
        path, method, route = scope["path"], scope["method"], route_of(scope["path"])
        route = route if route in self._routes else UNMATCHED
        self._metrics.http.observe(method, route, status, seconds)
        fields = {"request_id": context.request_id, "method": method, "route": route, "status": status}
        if route in DETECTION_ROUTES and method == "POST":
            fields["outcome"] = outcome = OUTCOME_OF_STATUS[status]
            self._metrics.requests.labels(outcome).inc()
        quiet = path in QUIET_PATHS and status == 200
        fields |= {"duration_ms": round(seconds * 1000, 1)} | context.fields
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


class Linger:
    """Reads and discards the rest of the body, for a while, after an answer that came before the body was read.

    Closing at once would reset the connection, and a client still sending would see that instead of its answer. A
    request that the protocol cannot read (see service.api.connections) gets its answer here if the head was wrong, and
    by an exception from `receive` if the body was.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, unread = self._app, scope.get("state", {}).pop(PROTOCOL_ERROR, None)
        if unread is not None:
            app = problem_response(unread, scope)
        elif scope["type"] != "http" or not has_body(Headers(scope=scope)):
            await app(scope, receive, send)
            return
        complete = answered = False

        async def watched_receive() -> Message:
            nonlocal complete
            message = await receive()
            error = scope["state"].pop(PROTOCOL_ERROR, None)
            if error is not None and not answered:
                raise error
            complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def lingering_send(message: Message) -> None:
            nonlocal answered
            answered = True
            if complete:
                await send(message)
            elif message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
                await send(message)
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        while not complete:
                            await watched_receive()
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await app(scope, watched_receive, lingering_send)


class Shed:
    """Refuses a detection request whose body has come already while no place is free. This happens before routing and
    parsing, so that many refusals take little time from admitted requests. A request whose body is still arriving is
    refused later, so that its connection can be used again."""

    def __init__(self, app: ASGIApp, *, refusal: Callable[[], Exception | None]) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        refusal = self._refusal() if is_post and route_of(scope["path"]) in DETECTION_ROUTES else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        first = await receive()
        if first["type"] == "http.request" and not first.get("more_body", False):
            context = context_of(scope)
            context.fields["body_bytes"] = len(first.get("body", b""))
            await problem_response(refusal, scope)(scope, receive, send)
            return
        unread = [first]

        async def from_the_start() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, from_the_start, send)


class FileProblems:
    """Turns the plain-text refusal of the framework's file server, for a bad Range, into a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        is_bad_range = False

        async def send_unless_bad_range(message: Message) -> None:
            nonlocal is_bad_range
            if message["type"] == "http.response.start":
                plain = Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
                is_bad_range = plain and message["status"] in (400, 416)
            if not is_bad_range:
                await send(message)

        await self._app(scope, receive, send_unless_bad_range)
        if is_bad_range:
            error = MalformedRequest("the Range is not one of the file's: ask for bytes=FIRST-LAST, or for all of it")
            await problem_response(error, scope)(scope, receive, send)


class RequireKey:
    """Answers 401 to a request without a key, as `Authorization: Bearer` or `X-API-Key`.

    The probes and the playground's files need no key.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or is_playground(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        name = self._keys.name_of(given_key(Headers(scope=scope)))
        if name is None:
            error = Unauthorized("send a valid key as Authorization: Bearer KEY or as X-API-Key: KEY")
            await problem_response(error, scope)(scope, receive, send)
            return
        context.fields["key"] = name
        await self._app(scope, receive, send)


def given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def problem_response(error: BaseException, scope: Scope) -> Response:
    return response_of(problem_of(error, context_of(scope).request_id), scope, headers_of(error))


def response_of(problem: dict[str, Any], scope: Scope, headers: Mapping[str, str] | None) -> Response:
    """Make the problem's response for this path: clients of /v2 want `error`, and application/json."""
    if speaks_open_inference(scope["path"]):
        message = {"error": f"{problem['code']}: {problem['detail']}"}
        return Response(to_json(message | problem), problem["status"], headers, "application/json")
    return Response(to_json(problem), problem["status"], headers, PROBLEM_MEDIA_TYPE)
