"""Every error that a client can see, in one table: code → status, title, outcome in the metrics, exceptions.

Errors are RFC 9457 problems (application/problem+json) with a `code` that stays the same over versions; `detail` says
what came and what is allowed. Exceptions are defined where they are raised:

    Exception
    ├── HeadersTooLarge, UriTooLong                                                         api.connections
    ├── MalformedRequest, UnsupportedMediaType, BodyTooLarge, UploadTimeout, ClientGone     api.uploads
    ├── InvalidParameter, UnknownModel, Unauthorized                                        here
    ├── InvalidImage                                                                        model.image
    │   └── TooManyPixels
    ├── SideTooLong                                                                         drawing
    ├── InferenceFailed                                                                     model.detector
    ├── TooManyWindows                                                                      core.cutting
    ├── DeadlineExceeded                                                                    core.job
    └── Refusal: not now, and when to try again                                             core.refusals
        ├── QueueFull                                                                       core.refusals
        ├── MemoryFull                                                                      core.memory
        └── NotReady                                                                        core.store

Every other exception is a bug. `client_closed_request` is for the log and the metrics; no client reads it.
"""

from dataclasses import dataclass
from typing import Any

from model.detector import InferenceFailed
from model.image import InvalidImage, TooManyPixels
from service.api.connections import HeadersTooLarge, UriTooLong
from service.api.uploads import (
    BodyTooLarge,
    ClientGone,
    MalformedRequest,
    UnsupportedMediaType,
    UploadTimeout,
)
from service.core.cutting import TooManyWindows
from service.core.job import DeadlineExceeded
from service.core.memory import MemoryFull
from service.core.refusals import QueueFull, Refusal
from service.core.store import NotReady
from service.drawing import SideTooLong
from service.metrics import Outcome

PROBLEM_MEDIA_TYPE = "application/problem+json"


class InvalidParameter(Exception):
    """A query parameter is out of range, or a label is unknown: correct the query."""


class UnknownModel(Exception):
    """The path names a model, or a version of it, that is not the one that serves."""


class Unauthorized(Exception):
    """No valid API key came with the request."""


@dataclass(frozen=True)
class ProblemType:
    status: int
    title: str
    outcome: Outcome
    """In retinaserve_requests_total."""
    errors: tuple[type[Exception], ...] = ()


PROBLEM_TYPES = {
    "malformed_request": ProblemType(400, "The request cannot be read", "invalid", (MalformedRequest,)),
    "unauthorized": ProblemType(401, "A valid API key is needed", "invalid", (Unauthorized,)),
    "not_found": ProblemType(404, "There is nothing at this path", "invalid", (UnknownModel,)),
    "method_not_allowed": ProblemType(405, "The path does not take this method", "invalid"),
    "not_acceptable": ProblemType(406, "The picture does not fit into the format asked for", "invalid", (SideTooLong,)),
    "upload_timeout": ProblemType(408, "The body took too long to arrive", "timeout", (UploadTimeout,)),
    "body_too_large": ProblemType(413, "The body is too large", "too_large", (BodyTooLarge,)),
    "too_many_pixels": ProblemType(413, "The image has too many pixels", "too_large", (TooManyPixels,)),
    "uri_too_long": ProblemType(414, "The URL is too long", "too_large", (UriTooLong,)),
    "unsupported_media_type": ProblemType(
        415, "The body comes in a form that is not read", "unsupported", (UnsupportedMediaType,)
    ),
    "invalid_parameter": ProblemType(
        422, "A query parameter is not valid", "invalid", (InvalidParameter, TooManyWindows)
    ),
    "invalid_image": ProblemType(422, "The image cannot be decoded", "invalid", (InvalidImage,)),
    "overloaded": ProblemType(
        429, "The server is at its limit: try again later", "overloaded", (QueueFull, MemoryFull)
    ),
    "headers_too_large": ProblemType(431, "The header fields are too large", "too_large", (HeadersTooLarge,)),
    "client_closed_request": ProblemType(499, "The client closed the connection", "cancelled", (ClientGone,)),
    "inference_failed": ProblemType(500, "The model failed on this image", "error", (InferenceFailed,)),
    "internal_error": ProblemType(500, "The server has a bug", "error"),
    "not_ready": ProblemType(503, "The server cannot detect now", "unavailable", (NotReady,)),
    "deadline_exceeded": ProblemType(504, "The answer was not ready in time", "timeout", (DeadlineExceeded,)),
}
CODES = {error: code for code, kind in PROBLEM_TYPES.items() for error in kind.errors}
OUTCOME_OF_STATUS: dict[int, Outcome] = {200: "ok", **{kind.status: kind.outcome for kind in PROBLEM_TYPES.values()}}
INTERNAL_DETAILS = {
    "inference_failed": "the model failed on this image; the server's log says why, under this request_id",
    "internal_error": "the server's log says why, under this request_id",
}
"""Codes whose exception text is for the log alone."""


def code_of(error: BaseException) -> str:
    """Return the code of the nearest class in the table; internal_error for an exception that is a bug."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), "internal_error")


def problem(code: str, detail: str, request_id: str) -> dict[str, Any]:
    """Make the body of an error's answer."""
    kind = PROBLEM_TYPES[code]
    return {
        "type": f"urn:retinaserve:problem:{code}",
        "title": kind.title,
        "status": kind.status,
        "code": code,
        "detail": INTERNAL_DETAILS.get(code, detail),
        "request_id": request_id,
    }


def problem_of(error: BaseException, request_id: str) -> dict[str, Any]:
    return problem(code_of(error), str(error), request_id)


def headers_of(error: BaseException) -> dict[str, str]:
    """Choose the headers of an error's answer, such as Retry-After."""
    if isinstance(error, Refusal):
        return {"Retry-After": str(error.retry_after_seconds)}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    return {}
