"""Retries of the client: the generator alone, with a clock of its own."""

import datetime
from collections.abc import Iterator, Sequence
from email.utils import format_datetime

import httpx
import pytest

from retinaserve_client import DetectError
from retinaserve_client.retries import MORE, Outcome, Pause, Retries, Send, Steps, seconds_before_repeating

OK = httpx.Response(200)
LOST = httpx.Response(502, json={"code": "replica_lost", "status": 502, "detail": "gone", "request_id": "x"})
PLAIN_500 = httpx.Response(500, text="Internal Server Error")


def problem(status: int, code: str = "a_code", **headers: str) -> httpx.Response:
    body = {"code": code, "status": status, "detail": "what came", "request_id": "theirs"}
    return httpx.Response(status, json=body, headers=headers)


def steps_of(steps: Steps, outcomes: Sequence[Outcome]) -> Iterator[Send | Pause]:
    """The steps while these come of the attempts. Raises what the generator raises."""
    coming = iter(outcomes)
    step = next(steps)
    while True:
        yield step
        try:
            step = steps.send(next(coming) if isinstance(step, Send) else None)
        except StopIteration:
            return


def attempts_with(*outcomes: Outcome, attempts: int = 5) -> int:
    """Count the attempts with these answers."""
    taken = list(steps_of(Retries(35, 120, attempts).steps("mine"), outcomes))
    return sum(isinstance(step, Send) for step in taken)


@pytest.mark.parametrize(
    "outcome",
    [
        LOST,
        PLAIN_500,
        problem(429),
        problem(503),
        httpx.Response(502, html="<h1>502 Bad Gateway</h1>"),
        httpx.Response(503, html="<h1>No server is available</h1>"),
        httpx.ConnectError("refused"),
        httpx.RemoteProtocolError("closed"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.ReadTimeout("silent"),
    ],
    ids=repr,
)
def test_what_was_refused_or_lost_is_sent_again(outcome: Outcome) -> None:
    assert attempts_with(outcome, outcome, OK) == 3
    with pytest.raises(DetectError):
        attempts_with(outcome, OK, attempts=1)


@pytest.mark.parametrize("status", [400, 401, 404, 405, 406, 408, 413, 414, 415, 422, 431, 500, 504])
def test_another_problem_is_raised_at_once(status: int) -> None:
    with pytest.raises(DetectError) as error:
        attempts_with(problem(status, "its_code"), OK)
    assert (error.value.code, error.value.status, error.value.request_id) == ("its_code", status, "theirs")


def test_a_url_that_cannot_be_sent_to_is_told_at_once() -> None:
    with pytest.raises(DetectError, match="ftp"):
        attempts_with(httpx.UnsupportedProtocol("no ftp"), OK)


def test_the_first_attempt_counts_and_the_last_outcome_is_the_error() -> None:
    assert attempts_with(LOST, LOST, OK, attempts=3) == 3
    with pytest.raises(DetectError) as error:
        attempts_with(LOST, httpx.ReadError("reset"), OK, attempts=2)
    assert (error.value.code, error.value.status, error.value.request_id) == ("connection_lost", None, "mine")
    assert isinstance(error.value.__cause__, httpx.ReadError)


@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_told_and_no_less(status: int) -> None:
    pauses = [seconds_before_repeating(problem(status, **{"Retry-After": "2"}), 1) for _ in range(100)]
    assert all(pause is not None and 2 <= pause <= 2 * (1 + MORE) for pause in pauses)
    assert len(set(pauses)) > 50, "all come back at once"
    then = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100), usegmt=True)
    pause = seconds_before_repeating(problem(status, **{"Retry-After": then}), 1)
    assert pause is not None and 50 < pause <= 125


@pytest.mark.parametrize("said", ["", "soon", "-3", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_where_nothing_is_told_or_the_time_has_passed_it_waits_a_little(said: str) -> None:
    pause = seconds_before_repeating(problem(429, **{"Retry-After": said}), 1)
    assert pause is not None and 0 <= pause < 1


def test_pauses_after_losses_grow() -> None:
    pauses = [seconds_before_repeating(LOST, attempt) or 0 for attempt in range(1, 12)]
    assert pauses[0] < pauses[1] < pauses[2] < pauses[3]
    assert max(pauses) <= 5 * (1 + MORE)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_no_attempt_and_no_pause_goes_beyond_the_total() -> None:
    clock = Clock()
    steps = Retries(timeout=35, total_timeout=60, attempts=9).steps("mine", clock)
    assert next(steps) == Send(35)
    clock.now += 35
    assert isinstance(steps.send(httpx.ReadTimeout("silent")), Pause)
    clock.now += 1
    assert next(steps) == Send(24), "what is left"
    clock.now += 20
    with pytest.raises(DetectError) as error:
        steps.send(problem(503, "not_ready", **{"Retry-After": "5"}))
    assert error.value.code == "not_ready", "4 s are left, and 5 are asked for"


@pytest.mark.parametrize("wrong", [(35, 120, 0), (0, 120, 5), (35, 0, 5)])
def test_times_and_attempts_that_allow_nothing_are_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="at least one attempt"):
        Retries(*wrong)
