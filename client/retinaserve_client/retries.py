"""When a call is sent, how long it waits, and when it is given up: one generator, which both clients drive.

It yields what to do next, `Send` or `Pause`, and is sent what became of a `Send`: a response, or the error instead.
A detection changes nothing, so what was lost on the way is sent again. Nothing else is but what the service asks for.
"""

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from retinaserve_client.errors import error_of

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
MORE = 0.25
"""A pause is longer by up to this share, so that clients refused together do not come back together."""

Outcome = httpx.Response | httpx.TransportError
NEVER_SENT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
"""Errors of the call itself: the next time they would be the same."""


@dataclass(frozen=True)
class Send:
    timeout: float


@dataclass(frozen=True)
class Pause:
    seconds: float


Steps = Generator[Send | Pause, Outcome | None, httpx.Response]


@dataclass(frozen=True)
class Retries:
    timeout: float
    """Seconds for one attempt."""
    total_timeout: float
    """Seconds for all attempts and the pauses between them."""
    attempts: int
    """The first one counts."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout <= 0 or self.total_timeout <= 0:
            raise ValueError(f"at least one attempt within more than 0 seconds, not {self}")

    def steps(self, request_id: str, clock: Callable[[], float] = time.monotonic) -> Steps:
        """The steps of one call; returns its 2xx. DetectError: what became of the last attempt."""
        end = clock() + self.total_timeout
        attempt = 0
        while True:
            attempt += 1
            outcome = yield Send(min(self.timeout, end - clock()))
            assert outcome is not None
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            seconds = seconds_before_repeating(outcome, attempt)
            if seconds is None or attempt == self.attempts or clock() + seconds >= end:
                raise error_of(outcome, request_id) from (outcome if isinstance(outcome, Exception) else None)
            yield Pause(seconds)


def seconds_before_repeating(outcome: Outcome, attempt: int) -> float | None:
    """None: it is not repeated. 429 and 503 say how long; what was lost waits longer each time."""
    if isinstance(outcome, NEVER_SENT):
        return None
    told = None
    if isinstance(outcome, httpx.Response):
        if outcome.status_code in (429, 503):
            told = retry_after_seconds(outcome)
        elif not was_lost(outcome):
            return None
    seconds = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS) if told is None else told
    return seconds * random.uniform(1, 1 + MORE)


def was_lost(response: httpx.Response) -> bool:
    """Tell whether a proxy answers that it lost the replica: 502, or the plain-text 500 of Ray Serve."""
    is_plain = response.headers.get("content-type", "").startswith("text/plain")
    return response.status_code == 502 or (response.status_code == 500 and is_plain)


def retry_after_seconds(response: httpx.Response) -> float | None:
    """Read what `Retry-After` says, in seconds or as a date; None: it says nothing that is understood."""
    text = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
