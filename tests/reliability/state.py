"""The chunks that are done, a line of JSON each: what a killed run goes on from, and all that the report is made of."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import machine


@dataclass(frozen=True)
class Chunk:
    gate: str
    first: int
    count: int
    seconds: float
    figures: Mapping[str, Any]
    fault: str
    """The traceback; empty: it passed."""
    control: str
    """The fault that the build had; empty: none."""
    machine: str
    commit: str
    ended: str
    """ISO 8601, UTC."""

    @property
    def found(self) -> bool:
        """A promise was seen broken; any other exception says nothing of it."""
        return "\nAssertionError" in self.fault


def now() -> tuple[str, str, str]:
    """The machine, the commit and the time, for a chunk."""
    described = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    return machine().rpartition(", commit ")[0], described.stdout.strip() or "unknown", ended


class State:
    """A file; what it holds is read once. A line that a killed run left half written is dropped."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.chunks = [Chunk(**json.loads(line)) for line in lines if line.endswith("}")]

    def keep(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a+b") as file:
            if file.tell() and not self._ends_a_line():
                file.write(b"\n")
            file.write(json.dumps(dataclasses.asdict(chunk)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, gate: str) -> list[Chunk]:
        """Its chunks, the controls left out."""
        return [chunk for chunk in self.chunks if chunk.gate == gate and not chunk.control]

    def units(self, gate: str) -> int:
        return sum(chunk.count for chunk in self.of(gate) if not chunk.fault)

    def faults(self, gate: str) -> list[str]:
        return [chunk.fault for chunk in self.of(gate) if chunk.fault]

    def control(self, gate: str) -> Chunk | None:
        """The last run of its negative control."""
        controls = [chunk for chunk in self.chunks if chunk.gate == gate and chunk.control]
        return controls[-1] if controls else None

    def forget(self, gates: list[str]) -> None:
        """Drop the chunks of these gates, controls too."""
        self.chunks = [chunk for chunk in self.chunks if chunk.gate not in gates]
        lines = [json.dumps(dataclasses.asdict(chunk)) + "\n" for chunk in self.chunks]
        if self._file.exists():
            self._file.write_text("".join(lines))

    def _ends_a_line(self) -> bool:
        return self._file.read_bytes().endswith(b"\n")
