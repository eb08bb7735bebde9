"""The GPU benchmark's own logic, on a CPU and a tiny model: every section runs, and none takes another with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.runtime.session import has_cuda_build

COMMAND = [sys.executable, "-m", "tests.benchmarks.gpu"]
QUICK = ["--device", "cpu", "--quick"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


def content(folder: Path, section: str) -> dict[str, Any]:
    return json.loads((folder / f"{section}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    finished = run(*QUICK, "--out", str(tmp_path), "--minutes", "18")
    assert finished.returncode == 0, finished.stdout
    assert "failed" not in finished.stdout
    # 2 canvases, 2 precisions, 2 batches; and no number is missing for want of another section
    speed = content(tmp_path, "speed")
    assert [len(row) for row in speed["rows"]] == [7] * 8
    assert all(row[6].endswith("%") for row in speed["rows"])
    assert "CUDAExecutionProvider runs: nothing" in speed["notes"]
    assert [row[1] for row in content(tmp_path, "torch")["rows"]] == ["torch eager", "torch compiled"] * 2
    assert len(content(tmp_path, "options")["rows"]) == 8
    assert [row[1] for row in content(tmp_path, "stages")["rows"]][:2] == [
        "network", "top-k, with the maxima before and the gathers between",
    ]  # fmt: skip
    bare, served = content(tmp_path, "service")["rows"]
    assert bare[1] > 0 and float(served[4]) > 0


@pytest.mark.slow
def test_a_section_that_fails_or_has_no_time_left_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    finished = run(*QUICK, "--out", str(tmp_path), "--sections", "graph,options,published")
    assert finished.returncode == 1
    assert "fp32.onnx" in content(tmp_path, "options")["failure"], "the file that it lacks"
    assert len(content(tmp_path, "published")["rows"]) == 3
    finished = run(*QUICK, "--out", str(tmp_path), "--sections", "published", "--minutes", "0")
    assert finished.returncode == 1
    assert content(tmp_path, "published")["failure"] == "not run: the time was up"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and has_cuda_build(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    finished = run("--out", str(tmp_path))
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert [line.startswith("no GPU to measure: ") for line in finished.stderr.splitlines()] == [True]
    assert not list(tmp_path.iterdir())
