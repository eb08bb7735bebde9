"""The runner: what is done is kept, a fault ends a gate and is told, a build with a fault is found; and brief gates."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import __main__ as program
from tests.reliability.gate import Figures, Gate, Work
from tests.reliability.gates import GATES
from tests.support.faulty_service import FAULTS, FLAGS

PROMISE = "A promise."


def gate(run: Callable[[Work], Figures], **others: object) -> Gate:
    given = {"full": 10, "step": 4, "control": "a fault", "control_units": 3} | others
    return Gate("one", PROMISE, "things", run=run, **given)  # type: ignore[arg-type]


@pytest.fixture
def reliability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command on one gate of ours; its exit code and the page."""

    def run(one: Gate, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(program, "GATES", {"one": one})
        files = ["--state", str(tmp_path / "state.jsonl"), "--report", str(tmp_path / "page.md")]
        return program.main([*arguments, *files]), (tmp_path / "page.md").read_text()

    return run


def test_a_gate_is_done_in_chunks_and_none_twice(reliability: Callable[..., tuple[int, str]]) -> None:
    works: list[tuple[int, int]] = []

    def run(work: Work) -> Figures:
        works.append((work.first, work.count))
        return {"found": work.count, "most_ms": work.first}

    code, page = reliability(gate(run), "--scale", "0.5")
    assert (code, works) == (0, [(0, 4), (4, 4)])
    assert "not at full length: 8 of 10 things" in page
    code, page = reliability(gate(run))
    assert works[2:] == [(8, 4)]
    assert "| 12 things |" in page and "| found | 12 |" in page and "| ms (maximum) | 8 |" in page
    reliability(gate(run))
    assert len(works) == 3


def test_a_line_that_was_cut_off_is_done_again(reliability: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    works: list[int] = []

    def run(work: Work) -> Figures:
        works.append(work.first)
        return {}

    reliability(gate(run))
    file = tmp_path / "state.jsonl"
    file.write_text(file.read_text()[:-10])
    reliability(gate(run))
    assert works == [0, 4, 8, 8]
    assert [json.loads(line)["first"] for line in file.read_text().splitlines() if line.endswith("}")] == [0, 4, 8]


def broken(work: Work) -> Figures:
    raise AssertionError("broken at last")


def test_a_broken_promise_ends_the_gate_and_stands_in_the_report(reliability: Callable[..., tuple[int, str]]) -> None:
    for _ in range(2):
        code, page = reliability(gate(broken))
        assert code == 1
        assert "**failed**" in page and page.count("AssertionError: broken at last") == 1
        assert 'File "tests/reliability/test_reliability.py"' in page
    assert reliability(gate(lambda work: {}), "--anew")[0] == 0


def test_a_control_passes_when_the_build_with_the_fault_fails(reliability: Callable[..., tuple[int, str]]) -> None:
    code, page = reliability(gate(broken), "--control")
    assert code == 0 and "a fault: found" in page and "not run" in page


def test_a_control_passes_however_long_the_fault_is_told(reliability: Callable[..., tuple[int, str]]) -> None:
    def run(work: Work) -> Figures:
        raise AssertionError("line\n" * 10_000)

    assert reliability(gate(run), "--control")[0] == 0


@pytest.mark.parametrize("run", [lambda work: {}, lambda work: 1 / 0])
def test_a_control_fails_when_the_build_with_the_fault_passes_or_something_else_breaks(
    reliability: Callable[..., tuple[int, str]], run: Callable[[Work], Figures]
) -> None:
    code, page = reliability(gate(run), "--control")
    assert code == 1 and "**not found**" in page


def test_what_stands_around_the_figures_stays(reliability: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    reliability(gate(lambda work: {}))
    page.write_text(f"# Before\n\n{page.read_text()}\nAfter.\n")
    _, text = reliability(gate(lambda work: {"found": 1}))
    assert text.startswith("# Before\n\n<!--") and text.endswith("end -->\n\nAfter.\n")
    assert text.count(PROMISE) == 1


def test_an_unknown_gate_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["nonsense"])
    assert ended.value.code == 2
    assert "no gate nonsense: there are conservation, " in capsys.readouterr().err


def test_every_gate_has_a_control_whose_fault_exists() -> None:
    for each in GATES.values():
        assert set(each.control.split(",")) <= {*FAULTS, *FLAGS}


BRIEF = {"requests": 60, "counters": 60, "network": 9, "alerts": 1}
"""Units of those that no other test runs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIEF)
def test_a_brief_run_passes(name: str, tmp_path: Path) -> None:
    if reason := GATES[name].missing():
        pytest.skip(reason)
    assert GATES[name].run(Work(tmp_path, 0, BRIEF[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["requests", "counters"])
def test_a_brief_run_finds_the_fault_of_its_control(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELIABILITY_FAULT", GATES[name].control)
    with pytest.raises(AssertionError):
        GATES[name].run(Work(tmp_path, 0, BRIEF[name]))
