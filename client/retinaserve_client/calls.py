"""The request of each method and the reading of its answer, for both clients."""

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypedDict, TypeVar

import httpx

from retinaserve_client.answer import Answer, Model, answer_of, model_of
from retinaserve_client.errors import error_of, unexpected
from retinaserve_client.retries import NEVER_SENT, Outcome

AHEAD = 4
"""Pictures sent ahead of the next answer to give, in multiples of the concurrency: a slow picture delays no others."""
Query = tuple[tuple[str, str], ...]
Result = TypeVar("Result")


class Options(TypedDict, total=False):
    """Options of a detection; for None, or a missing one, the service's default holds."""

    score_threshold: float | None
    """Keep detections with a higher score, in [0, 1]."""
    nms_threshold: float | None
    """Drop the lower scoring one of two boxes of one class with a larger IoU, in [0, 1]."""
    max_detections: int | None
    """Keep at most this many detections, the best, 1…5000."""
    labels: Iterable[str] | str | None
    """Keep only these labels."""
    tile: int | None
    """Detect in windows of this side too, pixels, for small objects in large pictures."""
    overlap: float | None
    """Share of a window that its neighbour has too, in [0, 0.9]."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    method: str
    path: str
    read: Callable[[httpx.Response], Result]
    query: Query = ()
    headers: dict[str, str] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def request(self, http: httpx.Client | httpx.AsyncClient, body: bytes, timeout: float) -> httpx.Request:
        headers = {**self.headers, "X-Request-ID": self.request_id}
        if self.method == "POST":
            headers["Content-Type"] = "application/octet-stream"
        return http.build_request(
            self.method, self.path, params=self.query, headers=headers, content=body, timeout=timeout
        )

    def result(self, response: httpx.Response) -> Result:
        """Read the answer. DetectError: it is not from the service."""
        try:
            return self.read(response)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unexpected(response, self.request_id) from error


def detect_call(query: Query) -> Call[Answer]:
    return Call("POST", "/detect", lambda response: answer_of(response.json()), query, {"Accept": "application/json"})


def draw_call(query: Query) -> Call[bytes]:
    return Call("POST", "/detect", _picture, query, {"Accept": "image/png"})


def model_call() -> Call[Model]:
    return Call("GET", "/model", lambda response: model_of(response.json()))


def ready_call() -> Call[object]:
    return Call("GET", "/readyz", lambda response: response.json())


def is_ready(outcome: Outcome, request_id: str) -> bool:
    """Tell whether an answer to `ready_call` is yes. DetectError: it is neither yes nor no."""
    if isinstance(outcome, httpx.TransportError) and not isinstance(outcome, NEVER_SENT):
        return False
    if isinstance(outcome, httpx.Response) and outcome.status_code in (200, 502, 503):
        return outcome.status_code == 200
    raise error_of(outcome, request_id)


def check_concurrency(concurrency: int) -> None:
    """Raise ValueError for a concurrency below 1."""
    if concurrency < 1:
        raise ValueError(f"concurrency is at least 1, not {concurrency}")


def query_of(
    *,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    max_detections: int | None = None,
    labels: Iterable[str] | str | None = None,
    tile: int | None = None,
    overlap: float | None = None,
) -> Query:
    """Make the query of a detection; values of None are not sent."""
    given = {
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "max_detections": max_detections,
        "tile": tile,
        "overlap": overlap,
    }
    named = [labels] if isinstance(labels, str) else labels or ()
    return (
        *((name, str(value)) for name, value in given.items() if value is not None),
        *(("label", label) for label in named),
    )


def headers_of(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _picture(response: httpx.Response) -> bytes:
    if response.headers["content-type"] != "image/png":
        raise ValueError("it is no picture")
    return response.content
