"""The results: lines of JSON, each on the disk before the next is measured, and the markdown made of them.

{"section": "options", "head": [...]}   a table begins
{"section": "options", "row": [...]}
{"section": "options", "note": "..."}   or "failure", or "seconds": the section has ended
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTLE_RUNS = 3
"""Before what counts: the first run plans the convolutions, the next two may still take memory."""
Action = Callable[[], object]


@dataclass(frozen=True)
class Report:
    """Where one section writes its results, and reads those of earlier ones."""

    path: Path
    section: str

    def table(self, *head: str) -> None:
        """Begin one; the rows that follow are its."""
        self._write(head=head)

    def add(self, *row: Any) -> None:
        self._write(row=row)

    def attempt(self, key: Sequence[Any], measure: Callable[[], Sequence[Any]]) -> None:
        """Add a row of the key and what is measured, or of the key and why not."""
        try:
            self.add(*key, *measure())
        except Exception as error:  # a row's boundary: out of memory, or not supported; the next may do
            traceback.print_exc()
            self.add(*key, f"failed: {one_line(error)}")

    def note(self, text: str) -> None:
        self._write(note=text)

    def end(self, seconds: float, failure: str | None) -> None:
        self._write(seconds=round(seconds, 1), **({} if failure is None else {"failure": failure}))

    def tables(self, section: str) -> list[list[dict[str, Any]]]:
        """The tables of a section so far, each row by its head."""
        found: list[list[dict[str, Any]]] = []
        head: list[str] = []
        for line in lines(self.path):
            if line["section"] == section and "head" in line:
                head = line["head"]
                found.append([])
            elif line["section"] == section and "row" in line:
                found[-1].append(dict(zip(head, line["row"], strict=False)))
        return found

    def _write(self, **content: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"section": self.section, **content}) + "\n")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def markdown(found: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Draw the tables in the order in which they were made, each with its notes below."""
    section, width = None, 0
    notes: list[str] = []
    for line in found:
        if "row" not in line and "note" not in line:
            yield from notes
            notes = []
        if line["section"] != section:
            section = line["section"]
            yield f"\n## {section}"
        match line:
            case {"head": head}:
                width = len(head)
                yield "\n| " + " | ".join(head) + " |\n" + "|---" * width + "|"
            case {"row": row}:
                yield "| " + " | ".join(str(value) for value in [*row, *[""] * (width - len(row))]) + " |"
            case {"note": text}:
                notes.append(f"\n{text}")
            case {"failure": text, "seconds": seconds}:
                yield f"\n**{text}**, after {seconds} s"
            case {"seconds": seconds}:
                yield f"\n(took {seconds} s)"
    yield from notes


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def significant(value: float, digits: int = 4) -> float:
    """Round to this many digits: what a slow machine reaches is not rounded to nothing."""
    return float(f"{value:.{digits}g}")


def milliseconds(seconds: float) -> float:
    return significant(seconds * 1e3)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return the action's result and its seconds."""
    started = time.perf_counter()
    answer = action()
    return answer, time.perf_counter() - started


def median_seconds(seconds: float, *actions: Action) -> list[float]:
    """The median of each, measured in turns: what slows the machine down slows all of them."""
    for action in actions * SETTLE_RUNS:
        action()
    taken: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + seconds * len(actions)
    while len(taken[0]) < 5 or time.perf_counter() < end:
        for each, action in zip(taken, actions, strict=True):
            each.append(timed(action)[1])
    return [statistics.median(each) for each in taken]
