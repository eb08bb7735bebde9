"""For every test: torch on one thread. What tests need from other processes begins with the session.

At its end come minutes by folder against the budget of `make test`. It imports the standard library alone, and what
does the same (tests/support/background.py): the environments of tests/foreign read it too.
"""

import collections
import os
from pathlib import PurePosixPath

import pytest

from tests.support import background

BUDGET_MINUTES = {"model": 2, "training": 5, "service": 4, "system": 5, "deploy": 2, "client": 2}
"""On two quiet cores."""

# Before torch is imported. Networks this small gain nothing from a second thread. Beside other jobs OpenMP's threads
# wait for each other: 120 steps of the tiny network took 148 s on two threads and 21 s on one (ten jobs on 2 cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")


def folder_of(node_id: str) -> str:
    """The folder of tests/ that a test is in, however deep; `.` for those in none."""
    parts = PurePosixPath(node_id.partition("::")[0]).parts
    return parts[1] if len(parts) > 2 else "."


def pytest_collection_finish(session: pytest.Session) -> None:
    needs = [(item, marker.args) for item in session.items for marker in item.iter_markers("needs")]
    for item, _ in needs:
        item.add_marker(pytest.mark.timeout(900))  # where others keep the machine busy, exports take minutes
    if not session.config.option.collectonly:
        background.begin(call for _, calls in needs for call in calls)


def pytest_sessionfinish() -> None:
    background.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    minutes = collections.Counter[str]()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            minutes[folder_of(report.nodeid)] += report.duration / 60  # type: ignore[assignment]
    told = [
        f"{folder} {spent:.1f}" + (f" of {BUDGET_MINUTES[folder]}" if folder in BUDGET_MINUTES else "")
        for folder, spent in minutes.most_common()
    ]
    if told:
        terminalreporter.write_line(f"minutes by folder, of the budget on two quiet cores: {', '.join(told)}")
