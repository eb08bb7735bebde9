"""When the loader loads: as a table of looks at the file, without a clock or a disk."""

import pytest

from service.core.wanted import Stamp, Wanted

OLD, NEW, OTHER = (1,), (2,), (3,)


def test_what_serves_is_not_loaded_again() -> None:
    wanted = Wanted(OLD)
    assert [wanted.is_due(OLD, now) for now in (0, 5, 10)] == [False, False, False]


@pytest.mark.parametrize("stamp", [NEW, None], ids=["changed", "missing"])
def test_a_change_is_due_at_the_second_look(stamp: Stamp) -> None:
    wanted = Wanted(OLD)
    assert [wanted.is_due(stamp, now) for now in (0, 5)] == [False, True]


def test_a_file_that_changes_with_each_look_is_never_due() -> None:
    wanted = Wanted(OLD)
    assert not any(wanted.is_due((size,), size) for size in range(2, 10))


def test_the_wait_after_a_failure_doubles_to_five_minutes() -> None:
    wanted = Wanted(OLD)
    now, waits = 0.0, []
    for _ in range(8):
        wanted.failed(NEW, now)
        wait = wanted.seconds_to_wait(0, now)
        assert wait is not None
        assert not wanted.is_due(NEW, now + wait - 0.01)
        now += wait
        assert wanted.is_due(NEW, now)
        waits.append(wait)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


def test_another_file_is_tried_at_once_and_waits_from_the_beginning() -> None:
    wanted = Wanted(OLD)
    for now in (0.0, 10.0, 30.0):
        wanted.failed(NEW, now)
    wanted.is_due(OTHER, 31)
    assert wanted.is_due(OTHER, 32)
    wanted.failed(OTHER, 32)
    assert wanted.seconds_to_wait(0, 32) == 5


def test_back_at_the_old_file_nothing_is_due() -> None:
    wanted = Wanted(OLD)
    wanted.failed(NEW, 0)
    assert [wanted.is_due(OLD, now) for now in (1000, 1005)] == [False, False]
    assert wanted.seconds_to_wait(0, 1005) is None


def test_a_success_ends_the_retries() -> None:
    wanted = Wanted(OLD)
    wanted.failed(NEW, 0)
    wanted.loaded(NEW)
    assert not wanted.is_due(NEW, 1000)
    assert wanted.seconds_to_wait(5, 1000) == 5
    assert wanted.seconds_to_wait(0, 1000) is None
