"""`DetectError`, made of an answer or of its absence."""

import httpx

CONNECTION_LOST = "connection_lost"
UNEXPECTED_ANSWER = "unexpected_answer"
SHOWN_CHARACTERS = 200


class DetectError(Exception):
    """The service refused, failed, or was not reached. Decide by `code`, which stays the same over versions.

    `code` is the service's own (docs/http-api.md), `connection_lost` if no answer came, or `unexpected_answer` if an
    answer was not from the service. `status` is None if no answer came. `request_id` is also in the service's log.
    """

    def __init__(self, code: str, status: int | None, detail: str, request_id: str | None) -> None:
        super().__init__(code, status, detail, request_id)
        self.code = code
        self.status = status
        self.detail = detail
        self.request_id = request_id

    def __str__(self) -> str:
        status = "" if self.status is None else f" ({self.status})"
        return f"{self.code}{status}: {self.detail} [request {self.request_id}]"


def error_of(outcome: httpx.Response | httpx.TransportError, request_id: str) -> DetectError:
    """Make the error of an answer other than 2xx, or of an exception instead of an answer."""
    if isinstance(outcome, httpx.TransportError):
        return DetectError(CONNECTION_LOST, None, f"{type(outcome).__name__}: {outcome}", request_id)
    try:
        problem = outcome.json()
        return DetectError(
            str(problem["code"]), outcome.status_code, str(problem["detail"]), problem.get("request_id", request_id)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return unexpected(outcome, request_id)


def unexpected(response: httpx.Response, request_id: str) -> DetectError:
    """Make the error of an answer that is not from the service."""
    came = f"it leads to {response.headers['location']}" if response.has_redirect_location else response.text
    detail = came[:SHOWN_CHARACTERS] or response.reason_phrase
    return DetectError(UNEXPECTED_ANSWER, response.status_code, detail, request_id)
