"""Every section of the GPU benchmark runs, on a CPU and tiny models, and agrees with itself."""

from pathlib import Path

import pytest

from tests.benchmarks.gpu.__main__ import SECTIONS
from tests.benchmarks.gpu.report import Report, lines
from tests.benchmarks.test_gpu import run


@pytest.mark.timeout(1500)
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    finished = run(tmp_path, "--device", "cpu", "--quick")
    assert finished.returncode == 0, finished.stdout
    assert "failed" not in finished.stdout
    report = Report(tmp_path / "gpu.jsonl", "")
    assert all(report.tables(name) for name in SECTIONS)
    notes = {line["section"]: line["note"] for line in lines(report.path) if str(line.get("note")).startswith("with ")}
    assert "'fuse_conv_bias': True" in notes["graph"]
    assert all("'fuse_conv_bias': False" in notes[name] for name in ("memory", "runtime", "runtime_graph")), "as served"
    [agreement] = report.tables("agree")
    assert [row["verdict"] for row in agreement] == ["agrees"] * 4, "three files, and the service"
    [made] = report.tables("models")
    assert [row["of them with a bias"] for row in made] == [row["convolutions"] for row in made]
    _, beside = report.tables("torch")
    assert all(row["largest score difference"] < 1e-3 for row in beside), "the same weights"
