"""Every error a client can see, in one table: code → status, title, outcome in the metrics; and exception → code.

Errors are RFC 9457 problems (application/problem+json) with a `code` that stays the same over versions; `detail` says
what came and what is allowed. Exceptions are defined where they are raised and named here only.

    malformed_request 400      unauthorized 401           not_found 404          method_not_allowed 405
    upload_timeout 408         body_too_large 413         too_many_pixels 413    unsupported_media_type 415
    invalid_parameter 422      invalid_image 422          overloaded 429         inference_failed 500
    internal_error 500         not_ready 503              deadline_exceeded 504

`client_closed_request` 499 is for the log and the metrics: nobody is there to read it.
"""

from dataclasses import dataclass
from typing import Any

from model.detector import InferenceFailed
from model.image import InvalidImage, TooManyPixels
from service.api.uploads import (
    BodyTooLarge,
    ClientGone,
    MalformedRequest,
    UnsupportedMediaType,
    UploadsBusy,
    UploadTimeout,
)
from service.core.job import DeadlineExceeded
from service.core.line import QueueFull
from service.core.store import NotReady

PROBLEM_MEDIA_TYPE = "application/problem+json"


class InvalidParameter(Exception):
    """A query parameter is out of range, or a label is unknown: mend the query."""


class Unauthorized(Exception):
    """No valid API key came with the request."""


@dataclass(frozen=True)
class Kind:
    status: int
    title: str
    outcome: str
    """In retinaserve_requests_total."""


KINDS = {
    "malformed_request": Kind(400, "The request cannot be read", "invalid"),
    "unauthorized": Kind(401, "A valid API key is needed", "invalid"),
    "not_found": Kind(404, "There is nothing at this path", "invalid"),
    "method_not_allowed": Kind(405, "The path does not take this method", "invalid"),
    "upload_timeout": Kind(408, "The body took too long to arrive", "timeout"),
    "body_too_large": Kind(413, "The body is too large", "too_large"),
    "too_many_pixels": Kind(413, "The image has too many pixels", "too_large"),
    "unsupported_media_type": Kind(415, "The body comes in a form that is not read", "unsupported"),
    "invalid_parameter": Kind(422, "A query parameter is not valid", "invalid"),
    "invalid_image": Kind(422, "The image cannot be decoded", "invalid"),
    "overloaded": Kind(429, "The server is at its limit: try again later", "overloaded"),
    "client_closed_request": Kind(499, "The client closed the connection", "cancelled"),
    "inference_failed": Kind(500, "The model failed on this image", "error"),
    "internal_error": Kind(500, "The server has a bug", "error"),
    "not_ready": Kind(503, "The server cannot detect now", "unavailable"),
    "deadline_exceeded": Kind(504, "The answer was not ready in time", "timeout"),
}

CODES: dict[type[Exception], str] = {
    MalformedRequest: "malformed_request",
    Unauthorized: "unauthorized",
    UploadTimeout: "upload_timeout",
    BodyTooLarge: "body_too_large",
    TooManyPixels: "too_many_pixels",
    UnsupportedMediaType: "unsupported_media_type",
    InvalidParameter: "invalid_parameter",
    InvalidImage: "invalid_image",
    QueueFull: "overloaded",
    UploadsBusy: "overloaded",
    ClientGone: "client_closed_request",
    InferenceFailed: "inference_failed",
    NotReady: "not_ready",
    DeadlineExceeded: "deadline_exceeded",
}

OUTCOMES = {200: "ok"} | {kind.status: kind.outcome for kind in KINDS.values()}

INTERNAL_DETAILS = {
    "inference_failed": "the model failed on this image; the server's log says why, under this request_id",
    "internal_error": "the server's log says why, under this request_id",
}
"""Codes whose exception text is for the log alone."""


def code_of(error: BaseException) -> str:
    """The code of the nearest class in the table; internal_error for what should not happen."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), "internal_error")


def problem(code: str, detail: str, request_id: str) -> dict[str, Any]:
    """The body of an error's answer."""
    kind = KINDS[code]
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
    """What the client should know beside the body."""
    if isinstance(error, (QueueFull, UploadsBusy, NotReady)):
        return {"Retry-After": str(error.retry_after_seconds)}
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    return {}
