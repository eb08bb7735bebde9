"""The attempts and pauses of a call: one generator, which both clients drive.

It yields the next step, `Send` or `Pause`, and receives the result of a `Send`: a response, or an error. A detection
changes nothing on the service, so a lost request is sent again. Otherwise a request is repeated only if the service
asks for it.
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
"""Largest random share added to a pause, so that clients that were refused together do not return together."""

Outcome = httpx.Response | httpx.TransportError
NEVER_SENT = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
"""Errors of the call itself, which would be the same the next time."""


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
    """Number of attempts, the first one included."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout <= 0 or self.total_timeout <= 0:
            raise ValueError(f"at least one attempt within more than 0 seconds, not {self}")

    def steps(self, request_id: str, clock: Callable[[], float] = time.monotonic) -> Steps:
        """Yield the steps of one call; return its 2xx answer. DetectError: the last attempt failed."""
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
    """Return the pause before the next attempt; None: there is none. 429 and 503 name it; after losses it grows."""
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
    """Tell whether a proxy reports a lost replica: 502, or the plain-text 500 of Ray Serve."""
    is_plain = response.headers.get("content-type", "").startswith("text/plain")
    return response.status_code == 502 or (response.status_code == 500 and is_plain)


def retry_after_seconds(response: httpx.Response) -> float | None:
    """Read `Retry-After`, in seconds or as a date; None: it is missing or malformed."""
    text = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
