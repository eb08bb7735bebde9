"""docs/tutorial.md is true: its commands and programs are run as they stand, in order, on a small data set."""

import json
import re
import runpy
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.detector import Detector
from service.__main__ import main as service
from tests.support.serving import ServerProcess, server_process
from training.__main__ import main as training
from training.checkpoint import load_checkpoint
from training.coco import CocoDataSet, load_coco
from training.exchange.finetune import lineage

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)
NAMES = ["RBC", "Platelets", "WBC"]
PICTURES = 10
NEW = {"photo": PICTURES, "other": PICTURES + 1}
OUR_CODE = {"PYTHONPATH": str(ROOT)}
COLOURS = ((60, 60, 200), (200, 60, 160), (90, 20, 90))
FEWER = {
    "train": "--steps 2 --crop-sizes 64 --crop-batch-sizes 2 --workers 0 --device cpu",
    "evaluate": "--device cpu",
    "detect": "--score-threshold 0.005 --max-detections 5",
}
"""Flags that make a command of the page quick, and let a network of two steps find something."""


Box = tuple[int, tuple[int, int, int, int]]
"""Class and xyxy."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the walk: pictures in both forms, new ones, and the repository's models."""
    for index, (pixels, boxes) in enumerate(map(draw, range(PICTURES))):
        write_voc(tmp_path / "BCCD", f"cells-{index}", pixels, boxes)
        write_yolo(tmp_path / "yolo", "val" if index % 5 == 0 else "train", f"cells-{index}", pixels, boxes)
    (tmp_path / "new").mkdir()
    for name, seed in NEW.items():
        cv2.imwrite(str(tmp_path / "new" / f"{name}.jpg"), draw(seed)[0])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pretrained").symlink_to(ROOT / "model" / "pretrained")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(seed: int) -> tuple[np.ndarray, list[Box]]:
    """A picture of 128 x 96 with three rectangles."""
    rng = np.random.default_rng([20, seed])
    pixels = rng.integers(200, 256, (96, 128, 3), dtype=np.uint8)
    boxes: list[Box] = []
    for left in (2, 42, 82):
        kind, (x, y), side = int(rng.integers(3)), rng.integers(0, 8, 2), int(rng.integers(16, 30))
        box = (left + int(x), 20 + int(y), left + int(x) + side, 20 + int(y) + side)
        cv2.rectangle(pixels, box[:2], (box[2] - 1, box[3] - 1), COLOURS[kind], -1)
        boxes.append((kind, box))
    return pixels, boxes


def write_voc(folder: Path, name: str, pixels: np.ndarray, boxes: Sequence[Box]) -> None:
    for each in ("JPEGImages", "Annotations"):
        (folder / each).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), pixels)
    objects = "".join(
        f"<object><name>{NAMES[kind]}</name><bndbox><xmin>{xmin + 1}</xmin><ymin>{ymin + 1}</ymin>"
        f"<xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"  # VOC counts from 1, and the last pixel too
        for kind, (xmin, ymin, xmax, ymax) in boxes
    )
    size = "<size><width>128</width><height>96</height><depth>3</depth></size>"
    text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def write_yolo(folder: Path, split: str, name: str, pixels: np.ndarray, boxes: Sequence[Box]) -> None:
    for each in ("images", "labels"):
        (folder / each / split).mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(f"names: {NAMES}\nnc: 3\n")
    cv2.imwrite(str(folder / "images" / split / f"{name}.jpg"), pixels)
    rows = [(k, (x1 + x2) / 256, (y1 + y2) / 192, (x2 - x1) / 128, (y2 - y1) / 96) for k, (x1, y1, x2, y2) in boxes]
    lines = (" ".join(map(str, row)) for row in rows)
    (folder / "labels" / split / f"{name}.txt").write_text("\n".join(lines))


class Walk:
    """Runs the page's blocks; the service that one of them starts lives until the walk ends."""

    def __init__(self, folder: Path, services: ExitStack) -> None:
        self.folder, self.services = folder, services
        self.server: ServerProcess | None = None
        self.answers: list[str] = []

    def run(self, language: str, block: str) -> None:
        if language == "python":
            (self.folder / "block.py").write_text(block)
            runpy.run_path(str(self.folder / "block.py"))
            return
        for line in block.replace("\\\n", " ").splitlines():
            self.run_command(shlex.split(line, comments=True))

    def run_command(self, command: list[str]) -> None:
        match command:
            case ["python", "-m", "training", name, *flags]:
                assert training([name, *flags, *FEWER.get(name, "").split()]) == 0, command
            case ["python", "-m", "service", "detect", *flags]:
                assert service(["detect", *flags, *FEWER["detect"].split()]) == 0, command
            case ["python", "-m", "service", "--model", file, *flags]:
                serving = server_process(self.folder, *flags, model_path=self.folder / file, environment=OUR_CODE)
                self.server = self.services.enter_context(serving)
            case ["curl", *rest]:
                assert self.server is not None
                asked = [word.replace("http://127.0.0.1:8000", self.server.url) for word in rest]
                done = subprocess.run(["curl", "-sS", "--fail", *asked], capture_output=True, check=True, text=True)
                self.answers.append(done.stdout)
            case _:
                raise AssertionError(f"the page has a command that the test does not run: {command}")


def correct_by_hand(folder: Path) -> None:
    """Replace the detections by the truth, as the page leaves to a person."""
    content = json.loads((folder / "new-to-correct.json").read_text())
    assert content["annotations"], "nothing was found"
    ids = {category["name"]: category["id"] for category in content["categories"]}
    names = {image["file_name"]: image["id"] for image in content["images"]}
    content["annotations"] = [
        {"image_id": names[f"{name}.jpg"], "category_id": ids[NAMES[kind]], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for name, seed in NEW.items()
        for kind, (x1, y1, x2, y2) in draw(seed)[1]
    ]
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation |= {"id": number, "area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    (folder / "new-corrected.json").write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")  # supervision's own
def test_the_walk_leads_from_annotations_to_a_served_model_and_round_again(folder: Path) -> None:
    with ExitStack() as services:
        walk = Walk(folder, services)
        for language, block in BLOCKS:
            if "new-corrected.json" in block:
                correct_by_hand(folder)
            walk.run(language, block)
    assert_data_sets_are_those_that_were_drawn(folder)
    assert (folder / "runs" / "bccd" / "report" / "index.html").is_file()
    precisions = [
        Detector(folder / f"bccd{end}.onnx", device="cpu").metadata.precision for end in ("", "-fp16", "-int8")
    ]
    assert precisions == ["fp32", "fp16", "int8"]
    assert json.loads(walk.answers[0])["model"]["name"] == "bccd"
    assert cv2.imread(str(folder / "drawn.png")).shape == (96, 128, 3)
    assert sorted(path.name for path in (folder / "new-drawn").iterdir()) == ["other.jpg", "photo.jpg"]
    again = load_checkpoint(folder / "runs" / "bccd-2" / "best.pt")
    assert again.labels == load_coco(folder / "bccd-2", "val").labels
    demo = lineage(load_checkpoint(ROOT / "model" / "pretrained" / "shapes.pt"))
    first, _, rest = (again.training or {})["started_from"].partition(" <- ")
    assert first.endswith(", 2 steps)"), "the first training of the page"
    assert rest == demo, "its lineage reaches back to the demo model's start"


def assert_data_sets_are_those_that_were_drawn(folder: Path) -> None:
    names = ("bccd", "from-yolo", "bccd-2")
    splits = {name: (load_coco(folder / name, "train"), load_coco(folder / name, "val")) for name in names}
    assert [(len(train), len(val)) for train, val in splits.values()] == [(8, 2), (8, 2), (10, 2)]
    assert all(train.labels == val.labels for train, val in splits.values())
    seeds = {f"cells-{index}": index for index in range(PICTURES)}
    drawn = {name: [(NAMES[kind], box) for kind, box in draw(seed)[1]] for name, seed in (seeds | NEW).items()}
    assert boxes_of(*splits["bccd-2"]) == drawn
    assert boxes_of(*splits["bccd"]) == boxes_of(*splits["from-yolo"]) == {name: drawn[name] for name in seeds}


def boxes_of(*data_sets: CocoDataSet) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Read each picture's classes and boxes, by its name: xyxy, whole pixels, left to right."""
    found = {}
    for data in data_sets:
        for picture in data.pictures:
            boxes = [tuple(box) for box in picture.target.boxes.round().astype(int).tolist()]
            names = [data.labels[column].label for column in picture.target.columns]
            found[picture.file.stem] = sorted(zip(names, boxes, strict=True), key=lambda each: each[1])
    return found
