"""The table of problems is whole."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import get_args

import pytest

import service.api
import service.core
from model.detector import InferenceFailed
from model.image import InvalidImage, TooManyPixels
from service.api.errors import CODES, OUTCOME_OF_STATUS, PROBLEM_TYPES, Unauthorized, code_of, headers_of, problem_of
from service.api.keys import InvalidKeys
from service.api.schemas import Problem
from service.core.memory import MemoryFull
from service.core.refusals import QueueFull, Refusal
from service.core.store import NotReady
from service.metrics import Outcome

CONTRACT = {
    "malformed_request": 400, "unauthorized": 401, "not_found": 404, "method_not_allowed": 405, "not_acceptable": 406,
    "upload_timeout": 408, "uri_too_long": 414, "headers_too_large": 431,
    "body_too_large": 413, "too_many_pixels": 413, "unsupported_media_type": 415, "invalid_parameter": 422,
    "invalid_image": 422, "overloaded": 429, "not_ready": 503, "deadline_exceeded": 504, "inference_failed": 500,
}  # fmt: skip


def test_the_codes_have_the_statuses_promised() -> None:
    ours = {code: kind.status for code, kind in PROBLEM_TYPES.items()}
    assert ours == CONTRACT | {"internal_error": 500, "client_closed_request": 499}


def test_every_status_has_one_outcome_that_the_metrics_know() -> None:
    for kind in PROBLEM_TYPES.values():
        assert OUTCOME_OF_STATUS[kind.status] == kind.outcome
    assert set(OUTCOME_OF_STATUS.values()) == set(get_args(Outcome))


def exceptions_of(package: ModuleType) -> Iterator[type[Exception]]:
    """Yield the exceptions that the package's modules define."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.name:
                yield value


def test_every_exception_that_we_define_has_a_code() -> None:
    ours = {*exceptions_of(service.api), *exceptions_of(service.core), InferenceFailed, InvalidImage}
    assert len(ours) > 10
    assert ours - set(CODES) == {Refusal, InvalidKeys}  # a base, and what ends a start before any request


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TooManyPixels("x"), "too_many_pixels"),
        (InvalidImage("x"), "invalid_image"),
        (KeyError("x"), "internal_error"),
    ],
)
def test_the_nearest_class_decides(error: Exception, code: str) -> None:
    assert code_of(error) == code


def test_what_failed_inside_is_not_told_to_the_client() -> None:
    for error in (InferenceFailed("secret path"), ZeroDivisionError("secret path")):
        assert "secret" not in Problem.model_validate(problem_of(error, "id")).detail


def test_who_may_try_again_is_told_when() -> None:
    assert headers_of(QueueFull("x", 7)) == {"Retry-After": "7"}
    assert int(headers_of(MemoryFull("x"))["Retry-After"]) >= 1
    assert int(headers_of(NotReady("x"))["Retry-After"]) >= 1
    assert headers_of(Unauthorized("x")) == {"WWW-Authenticate": "Bearer"}
    assert headers_of(InvalidImage("x")) == {}
