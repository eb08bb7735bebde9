"""The README is true: its curl, sent to the service on the shipped model, gets the detections it shows."""

import json
import re
from pathlib import Path

import httpx
import pytest

from service.config import Settings, flag
from tests.support.serving import server_process
from training.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CURL = re.compile(r"curl -s -F image=@(\S+) 'http://127\.0\.0\.1:8000(/detect\?\S+)'")


@pytest.mark.slow
def test_the_readmes_curl_prints_the_detections_that_it_shows(tmp_path: Path) -> None:
    example, path = CURL.findall(README)[0]
    shown = json.loads(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0])
    with server_process(tmp_path, model_path=ROOT / "model" / "pretrained" / "shapes.onnx") as server:
        answer = httpx.post(server.url + path, files={"image": (ROOT / example).read_bytes()}, timeout=60).json()
    assert set(answer) == set(shown)
    assert answer["model"] == shown["model"]
    assert answer["image"] == shown["image"]
    assert len(answer["detections"]) == len(shown["detections"]) > 2
    for found, expected in zip(answer["detections"], shown["detections"], strict=True):
        assert (found["label"], found["class_id"]) == (expected["label"], expected["class_id"])
        assert found["score"] == pytest.approx(expected["score"], abs=0.01)
        assert found["box"] == pytest.approx(expected["box"], abs=1)


def test_every_setting_that_the_readme_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    of_training = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    named = set(re.findall(r"^\| `(--[a-z0-9-]+)`", README, re.MULTILINE))
    assert named
    assert named <= of_training | {flag(name) for name in Settings.model_fields}


def test_every_file_that_the_readme_links_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_test_and_setting_that_the_security_page_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(?:…|test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in source] == []
    files = set(re.findall(r"`(test_\w+\.py)[`:]", page))
    assert [name for name in files if not list((ROOT / "tests").rglob(name))] == []
    settings = set(re.findall(r"`(--[a-z0-9-]+)", page)) - {"--draw", "--out"}
    assert settings <= {flag(name) for name in Settings.model_fields}
