"""The report of a run shows the evaluation's detections, and can be read at any moment."""

import base64
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.candidates import Normalise
from model.image import to_canvas
from model.retinanet import RetinaNet
from tests.support.tiny_training import TINY, train_here, write_tiny_data
from training.checkpoint import load_checkpoint
from training.coco import CocoDataSet, load_coco
from training.evaluate import average_precision
from training.loss.losses import retinanet_losses
from training.report.page import read_metrics
from training.report.plots import matches
from training.transforms import TensorTarget


@dataclass(frozen=True)
class Finished:
    out: Path
    validation_set: CocoDataSet

    @property
    def page(self) -> str:
        return (self.out / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two steps, an evaluation after each. Of three validation pictures two have an object; one class has none."""
    folder = write_tiny_data(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "mine"
    train_here(replace(TINY, steps=2, evaluate_every=1), folder, out)
    return Finished(out, load_coco(folder, "val"))


def test_the_page_holds_its_pictures_and_needs_nothing_else(run: Finished) -> None:
    sources = re.findall(r'<img alt="([^"]+)" src="([^"]+)"', run.page)
    assert [name for name, _ in sources] == [
        "training", "precision-recall", "scores", "ap", "picture-01", "picture-02", "picture-03", "anchors",
    ]  # fmt: skip
    for name, source in sources:
        content = base64.b64decode(source.partition("base64,")[2])
        Image.open(io.BytesIO(content)).verify()
        [beside] = (run.out / "report").glob(f"{name}.*")
        assert beside.read_bytes() == content
    assert not re.findall(r"(?:href|src)=\"(?!data:)", run.page)


def test_the_page_says_what_the_last_evaluation_found(run: Finished) -> None:
    last = read_metrics(run.out / "metrics.jsonl")[-1]
    assert f"<title>mine: AP {last['ap']:.3f} on 3 pictures after 2 steps</title>" in run.page
    assert "objects have an anchor at IoU 0.5 or more" in run.page


def test_nothing_unfinished_is_left_beside_the_page(run: Finished) -> None:
    names = {file.name for file in (run.out / "report").iterdir()}
    assert "index.html" in names and not [name for name in names if name.startswith(".")]
    assert {file.name for file in run.out.iterdir()} == {
        "best.pt", "last.pt", "metrics.jsonl", "report", "tensorboard",
    }  # fmt: skip


def test_validation_losses_are_trainings_on_whole_pictures(run: Finished) -> None:
    checkpoint = load_checkpoint(run.out / "last.pt")
    network = RetinaNet(TINY.model, 2).eval()
    network.load_state_dict(dict(checkpoint.best_weights))
    expected = []
    for index, picture in enumerate(run.validation_set.pictures):
        canvas = to_canvas(run.validation_set.read(index), TINY.resize)
        assert canvas.size == picture.size  # so boxes need no scaling here
        pixels, size = torch.from_numpy(canvas.pixels[None]), torch.tensor([canvas.size])
        target = TensorTarget(*(torch.from_numpy(v) for v in vars(picture.target).values()))
        with torch.no_grad():
            outputs = network(Normalise()(pixels, size))
            anchors = torch.cat(network.anchors(canvas.canvas_size, outputs.grids))
            losses = retinanet_losses(network.flatten(outputs), anchors, [target], TINY.loss)
        expected.append((losses.classification.item(), losses.box.item()))
    last = read_metrics(run.out / "metrics.jsonl")[-1]
    found = last["validation_classification_loss"], last["validation_box_loss"]
    assert found == pytest.approx(np.mean(expected, axis=0), rel=1e-4)


def test_tensorboard_reads_the_same_figures(run: Finished) -> None:
    events = EventAccumulator(str(run.out / "tensorboard")).Reload()
    entries = read_metrics(run.out / "metrics.jsonl")
    found = [(event.step, event.value) for event in events.Scalars("validation/ap")]
    assert found == [(entry["step"], pytest.approx(entry["ap"])) for entry in entries if "ap" in entry]
    assert "validation/classification_loss" in events.Tags()["scalars"]


def test_a_step_that_was_made_again_counts_as_it_came_last(tmp_path: Path) -> None:
    lines = [{"step": 20, "box_loss": 3.0}, {"step": 40, "box_loss": 2.0}, {"step": 40, "ap": 0.1}]
    again = [{"step": 40, "box_loss": 1.0}]
    file = tmp_path / "metrics.jsonl"
    half = '{"step": 60, "box'
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines + again) + half + json.dumps(lines[0]) + "\n" + half
    )
    assert read_metrics(file) == [lines[0], again[0], lines[2]]


def test_precision_by_recall_is_what_ap_is_the_mean_of(run: Finished) -> None:
    x1, y1, x2, y2 = run.validation_set.pictures[0].target.boxes[0].tolist()
    results = [{"image_id": 0, "category_id": 2, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.9}]
    report = average_precision(run.validation_set, results, [0, 1, 2])
    curve = report.precision[0, :, 0, 0]
    assert curve.mean() == pytest.approx(report.per_class["box"])
    assert curve.tolist() == pytest.approx([1] * 51 + [0] * 50)  # one of two objects is found
    assert (report.precision[:, :, 1] == -1).all()


def test_a_detection_finds_an_object_of_its_class_that_no_better_one_found() -> None:
    truth, truth_ids = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32), np.array([1, 2])
    boxes = np.array([[1, 0, 10, 10], [0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 30, 30], [21, 20, 40, 40]], np.float32)
    assert matches(boxes, np.array([1, 1, 1, 2, 2]), truth, truth_ids).tolist() == [0, -1, -1, -1, 1]
    assert matches(boxes[:0], truth_ids[:0], truth, truth_ids).tolist() == []
    assert matches(boxes[:1], np.array([1]), truth[:0], truth_ids[:0]).tolist() == [-1]
