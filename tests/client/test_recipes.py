"""The recipes of docs/clients.md, each run as it stands but for the address."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import playwright
import pytest
from PIL import Image
from pycocotools.coco import COCO

from model.metadata import Label
from tests.support.serving import FakeDetector, picture, serving

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
NODE = Path(playwright.__file__).parent / "driver" / "node"


def recipes(heading: str, language: str) -> list[str]:
    page = (ROOT / "docs" / "clients.md").read_text()
    [section] = [part for part in page.split("\n## ") if part.startswith(heading)]
    return [code for kind, code in BLOCK.findall(section) if kind == language]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    labels = (Label(1, "circle"), Label(4, "star"))
    with serving(FakeDetector(labels=labels)) as server:
        yield server.url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name, width in (("photo.jpg", 80), ("photos/b.jpg", 90), ("photos/a.jpg", 100)):
        (tmp_path / name).write_bytes(picture(width, kind="JPEG"))
    for name in ("broken.jpg", "photos/aa.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    home = {"PYTHONPATH": f"{ROOT / 'client'}:{ROOT}", "HF_HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(code: str, url: str, folder: Path) -> list[str]:
    return run([sys.executable, "-c", code.replace(ADDRESS, url)], folder).splitlines()


def drawn_size(folder: Path) -> tuple[int, int]:
    with Image.open(folder / "drawn.png") as drawn:
        return drawn.size


def test_the_readme_s_python(url: str) -> None:
    [code] = [code for kind, code in BLOCK.findall((ROOT / "README.md").read_text()) if kind == "python"]
    [found] = run_python(code, url, ROOT)
    assert found.startswith("circle 0.5") and found.endswith(" Box(xmin=0.0, ymin=0.0, xmax=672.0, ymax=480.0)")


def test_python(url: str, folder: Path) -> None:
    synchronous, asynchronous = recipes("Python", "python")
    found, good, bad, model = run_python(synchronous, url, folder)
    assert found.startswith("circle 1 0.7") and found.endswith(" 0.0 0.0 80.0 64.0")
    assert good == "photo.jpg 1" and bad.startswith("broken.jpg failed: invalid_image")
    assert model == "fake True"
    assert drawn_size(folder) == (80, 64)
    count, *answers = run_python(asynchronous, url, folder)
    assert count == "1" and len(answers) == 2 and answers[0].startswith("Answer(detections=(Detection(")


def test_hugging_face(url: str, folder: Path) -> None:
    [code] = recipes("Hugging Face", "python")
    [found] = run_python(code, url, folder)
    assert found.startswith("circle 0.7")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(url: str, folder: Path) -> None:
    [lines] = recipes("curl", "sh")
    detect, draw = lines.strip().splitlines()
    answer = json.loads(run(["sh", "-c", detect.replace(ADDRESS, url)], folder))
    assert [found["label"] for found in answer["detections"]] == ["circle"]
    run(["sh", "-c", draw.replace(ADDRESS, url)], folder)
    assert drawn_size(folder) == (80, 64)


def test_javascript(url: str, folder: Path) -> None:
    [code] = recipes("JavaScript", "js")
    call = '\nrequire("fs").openAsBlob("photo.jpg").then(detect).then((found) => console.log(JSON.stringify(found)));'
    [found] = json.loads(run([str(NODE), "-e", code.replace(ADDRESS, url) + call], folder))
    assert (found["label"], found["box"]["xmax"]) == ("circle", 80)


def test_label_studio(folder: Path) -> None:
    [line] = recipes("Label Studio", "sh")
    (folder / "photos" / "aa.jpg").unlink()
    rectangles = '<RectangleLabels name="l" toName="i"><Label value="star"/></RectangleLabels>'
    (folder / "project.xml").write_text(f'<View><Image name="i" value="$image"/>{rectangles}</View>')
    run(["sh", "-c", line.replace("python", sys.executable, 1)], folder)
    tasks = json.loads((folder / "tasks.json").read_text())
    assert [task["data"] for task in tasks] == [{"image": f"/data/local-files/?d=photos/{name}.jpg"} for name in "ab"]


def test_coco(url: str, folder: Path) -> None:
    [code] = recipes("COCO", "python")
    run_python(code, url, folder)
    with contextlib.redirect_stdout(io.StringIO()):
        ours = COCO(folder / "instances.json")
        results = COCO(folder / "instances.json").loadRes(str(folder / "results.json"))
    assert [(each["id"], each["file_name"]) for each in ours.loadImgs(ours.getImgIds())] == [(1, "a.jpg"), (3, "b.jpg")]
    for found in (ours, results):
        annotations = found.loadAnns(found.getAnnIds())
        assert [(each["image_id"], each["bbox"]) for each in annotations] == [(1, [0, 0, 100, 64]), (3, [0, 0, 90, 64])]
        assert [each["name"] for each in found.loadCats(annotations[0]["category_id"])] == ["circle"]
