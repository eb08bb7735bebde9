"""The GPU benchmark's own logic, on a CPU and a tiny model; tests/slow runs every section."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.runtime.session import has_cuda_build
from model.types import Detections
from tests.benchmarks.gpu.agreement import EXACT, matched
from tests.benchmarks.gpu.report import Report, lines, markdown
from tests.support.serving import wait_until

COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, "--out", str(folder / "gpu.jsonl"), "--models", str(folder / "models"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_section_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    finished = run(tmp_path, "--device", "cpu", "--quick", "--sections", "graph,selection,published")
    assert finished.returncode == 1
    written = list(lines(tmp_path / "gpu.jsonl"))
    assert [line["section"] for line in written if "failure" in line] == ["selection"], "it lacks a file"
    assert "failed: FileNotFoundError" in next(str(line["row"]) for line in written if "row" in line)
    assert len(Report(tmp_path / "gpu.jsonl", "").tables("published")[0]) == 4


@pytest.mark.slow
@pytest.mark.skipif(has_cuda_build(), reason="there may be a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    finished = run(tmp_path)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert [line.startswith("no GPU to measure: ") for line in finished.stderr.splitlines()] == [True]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_when_it_is_ended_no_section_is_left_behind(tmp_path: Path) -> None:
    files = ["--out", str(tmp_path / "gpu.jsonl"), "--models", str(tmp_path / "models")]
    process = subprocess.Popen([*COMMAND, *files, "--device", "cpu", "--quick", "--sections", "models"])
    try:
        wait_until((tmp_path / "gpu.jsonl").exists)
        [section] = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(30) == 143
        assert not section.is_running()
    finally:
        process.kill()


def test_results_are_on_the_disk_at_once_and_become_tables(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    report = Report(path, "options")
    report.table("batch", "ms")
    report.note("on the device")
    report.add(1, 2.5)
    report.attempt([8], lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert [json.loads(line)["section"] for line in path.read_text().splitlines()] == ["options"] * 4
    report.end(3.21, "stopped: the time was up")
    assert "\n".join(markdown(lines(path))).splitlines() == [
        "", "## options", "", "| batch | ms |", "|---|---|", "| 1 | 2.5 |",
        "| 8 | failed: ZeroDivisionError: division by zero |", "", "on the device", "",
        "**stopped: the time was up**, after 3.2 s",
    ]  # fmt: skip
    assert report.tables("options") == [[{"batch": 1, "ms": 2.5}, {"batch": 8, "ms": "failed: ZeroDivisionError: "
                                                                                    "division by zero"}]]  # fmt: skip


def detections(*rows: tuple[float, float, int]) -> Detections:
    """Squares of side 10 at (x, 0): of each its x, score and label."""
    corners = [[x, 0, x + 10, 10] for x, _, _ in rows]
    scores, labels = ([row[column] for row in rows] for column in (1, 2))
    return Detections(
        np.array(corners, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64)
    )


def test_a_detection_is_matched_by_label_box_and_score_together() -> None:
    wanted = detections((0, 0.9, 1), (50, 0.8, 2), (90, 0.7, 1), (120, 0.0505, 1))
    found = detections((50, 0.8, 1), (90.03, 0.7004, 1), (0.01, 0.9, 1))
    distances = matched(wanted, found, EXACT)
    assert distances.shape == (3, 2), "what scores near the threshold is left out"
    assert distances[0] == pytest.approx([0, 0.01], abs=1e-5)
    assert distances[1].tolist() == [np.inf, np.inf], "another label does not count"
    assert distances[2] == pytest.approx([4e-4, 0.03], abs=1e-5)
    assert np.isinf(matched(wanted, detections(), EXACT)).all()
