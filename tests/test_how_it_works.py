"""docs/how-it-works.md: each file and call that it names is there, and the ways are as short as it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "how-it-works.md").read_text()
ROW = re.compile(r"^\| (\d+) \| `([^`]+)` \| ([^|]*) \|", re.MULTILINE)
CALL = re.compile(r"`([A-Za-z_.]+)`")
ROWS = [(int(number), file, CALL.findall(calls)) for number, file, calls in ROW.findall(TEXT)]


@pytest.mark.parametrize(("file", "calls"), [row[1:] for row in ROWS], ids=[row[1] for row in ROWS])
def test_the_calls_are_defined_in_the_files(file: str, calls: list[str]) -> None:
    source = (ROOT / file).read_text()
    for call in calls:
        for name in call.split("."):
            assert re.search(rf"^ *(async )?(def|class) {name}\b", source, re.MULTILINE), f"{file} has no {name}"


def test_an_upload_passes_nine_files_and_a_sample_ten() -> None:
    numbers = [number for number, _, _ in ROWS]
    assert numbers == [*range(1, 10), *range(1, 11)]


def test_six_calls_lead_to_onnx_runtime_and_five_to_the_focal_loss() -> None:
    [to_runtime] = re.findall(r"Six calls lead .*?`session.run`", TEXT, re.DOTALL)
    [to_loss] = re.findall(r"Five calls lead .*?`_FocalLossSum.forward`", TEXT, re.DOTALL)
    assert to_runtime.count("→") == 6
    assert to_loss.count("→") + 1 == 5


def test_every_file_that_is_named_exists() -> None:
    folders = ("service/api", "service/core", "model/runtime", "")
    for name in re.findall(r"`([a-z_/]+\.(?:py|md))`", TEXT):
        assert any((ROOT / folder / name).exists() for folder in folders), name
