"""How much memory requests may hold together, by the limit of a container or machine."""

from pathlib import Path

import pytest

from service.core.memory import BYTES_PER_DECODER, Budget, HeldBytes, MemoryFull, memory_limit

GIB = 2**30


def test_the_parts_of_the_budget_are_its_whole() -> None:
    for threads in (1, 2, 16):
        budget = Budget.of(threads, 64 * GIB)
        assert budget.total == max(2, threads) * GIB // 2
        assert budget.decoding + budget.bodies + budget.answers + budget.canvases == budget.total


def test_a_container_s_limit_bounds_the_budget() -> None:
    assert Budget.of(16, 2 * GIB).total == GIB


def test_what_does_not_fit_is_refused_and_what_is_given_back_has_room_again() -> None:
    held = HeldBytes(100)
    held.change(60)
    held.check(40)
    with pytest.raises(MemoryFull):
        held.check(41)
    held.change(-60)
    held.check(100)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "1073741824\n"}, GIB),
        ({"memory/memory.limit_in_bytes": "536870912\n"}, GIB // 2),
        ({"memory.max": "max\n"}, None),
        ({}, None),
    ],
)
def test_the_limit_is_the_container_s_or_the_machine_s(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = memory_limit(tmp_path / "nothing")
    assert machine > BYTES_PER_DECODER
    assert memory_limit(tmp_path) == (machine if limit is None else limit)
