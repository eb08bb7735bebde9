"""`service detect --label-studio`: tasks as Label Studio imports them; tests/slow imports them into a real one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.detector import Detector
from model.image import decode_image
from model.metadata import Label
from model.types import Detections
from service.__main__ import main
from service.label_studio import LabelConfig, Tasks, read_label_config
from tests.support.serving import FakeDetector, picture
from tests.support.tiny_model import write_tiny_model

CONFIG = """
<View>
  <Header value="Mark the shapes"/>
  <RectangleLabels name="texts" toName="text"><Label value="circle"/></RectangleLabels>
  <Image name="photo" value="$picture" zoom="true"/>
  <RectangleLabels name="shapes" toName="photo"><Label value="Circle" background="red"/><Label value="star"/></RectangleLabels>
</View>
"""  # noqa: E501
DETECTOR: Any = FakeDetector(labels=(Label(1, "circle"), Label(2, "square")))
TWO = Detections(
    np.array([[20, 10, 120, 60], [0, 0, 200, 100]], np.float32), np.array([0.9, 0.4], np.float32), np.array([1, 2])
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.xml"
    path.write_text(CONFIG)
    return path


def only_task(tasks: Tasks) -> dict[str, Any]:
    [task] = json.loads(tasks.json())
    found: dict[str, Any] = task
    return found


def test_boxes_are_in_percent_under_the_project_s_names(config: Path) -> None:
    tasks = Tasks(DETECTOR, read_label_config(config))
    tasks.add(Path("a b/photo 1.jpg"), (100, 200), TWO)
    task = only_task(tasks)
    assert task["data"] == {"picture": "/data/local-files/?d=a%20b/photo%201.jpg"}
    [prediction] = task["predictions"]
    assert prediction["model_version"] == "fake-000000000000"
    assert prediction["score"] == pytest.approx(0.9)
    [region] = prediction["result"]
    assert region.pop("id")
    assert region.pop("score") == pytest.approx(0.9)
    assert region == {
        "from_name": "shapes",
        "to_name": "photo",
        "type": "rectanglelabels",
        "original_width": 200,
        "original_height": 100,
        "image_rotation": 0,
        "value": {"x": 10, "y": 10, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["Circle"]},
    }
    assert tasks.skipped == {"square": 1}


def test_without_a_configuration_every_label_is_kept_and_ids_differ() -> None:
    tasks = Tasks(DETECTOR, LabelConfig())
    tasks.add(Path("a.jpg"), (100, 200), TWO)
    regions = only_task(tasks)["predictions"][0]["result"]
    assert [region["value"]["rectanglelabels"] for region in regions] == [["circle"], ["square"]]
    assert len({region["id"] for region in regions}) == 2
    assert {(region["from_name"], region["to_name"]) for region in regions} == {("label", "image")}
    assert not tasks.skipped


def test_a_picture_without_detections_is_a_task_too() -> None:
    tasks = Tasks(DETECTOR, LabelConfig(), "s3://bucket/photos/")
    tasks.add(
        Path("ä 1.jpg"), (100, 200), Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int))
    )
    task = only_task(tasks)
    assert task["data"] == {"image": "s3://bucket/photos/ä 1.jpg"}
    assert task["predictions"][0] | {"score": 0, "result": []} == task["predictions"][0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<View>",
        "<View/>",
        '<View><Image name="image" value="$image"/></View>',
        '<View><Image name="image" value="$image"/><RectangleLabels name="a" toName="other"/></View>',
        '<View><Image name="image" value="fixed.jpg"/><RectangleLabels name="a" toName="image"/></View>',
    ],
)
def test_a_configuration_without_boxes_is_refused(config: Path, text: str) -> None:
    config.write_text(text)
    with pytest.raises(ValueError, match=r"config\.xml"):
        read_label_config(config)


def test_labels_that_the_project_makes_itself_take_any(config: Path) -> None:
    config.write_text('<View><Image name="i" value="$i"/><RectangleLabels name="l" toName="i" value="$all"/></View>')
    assert read_label_config(config) == LabelConfig("l", "i", "i", None)


@pytest.mark.parametrize("known", [True, False])
def test_the_command_writes_tasks_and_counts_what_it_skipped(
    tmp_path: Path, config: Path, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    detector = Detector(tmp_path / "tiny.onnx")
    detections = detector.detect(decode_image(picture(120, 90)), score_threshold=0)
    [label] = {each.label for each in detector.metadata.labels if each.class_id in detections.labels}
    config.write_text(CONFIG.replace("ircle", "ross").replace("star", label if known else "none"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture(120, 90))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    flags = ["--label-config", str(config), "--image-url", "https://host/", "--score-threshold", "0"]
    tasks, model = tmp_path / "out" / "tasks.json", str(tmp_path / "tiny.onnx")
    assert main(["detect", str(tmp_path / "photos"), "--model", model, "--label-studio", str(tasks), *flags]) == 1
    [task] = json.loads(tasks.read_text())
    assert task["data"] == {"picture": "https://host/a.png"}
    kept = [region["value"]["rectanglelabels"] for region in task["predictions"][0]["result"]]
    assert kept == [[label]] * (len(detections) if known else 0)
    printed = capsys.readouterr()
    assert printed.out == "", "results are for --out"
    assert (f"no label for {len(detections)} × {label}" in printed.err) is not known


@pytest.mark.parametrize(
    "flags", [("--label-config", "c.xml"), ("--image-url", "x"), ("--label-studio", "t", "--label-config", "no.xml")]
)
def test_flags_that_lead_nowhere_are_one_line(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["detect", str(tmp_path), *flags])
    assert exited.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
