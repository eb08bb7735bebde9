"""AP through our code, against pycocotools on the same results and against detectors whose AP is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.image import resized_size
from model.metadata import Label, ResizePolicy
from model.tiles import Tiling
from model.types import Candidates, CanvasImage, Detections, coco_results
from training.coco import CocoDataSet, InvalidDataSet, load_coco, without_classes
from training.evaluate import Predictor, average_precision, evaluate, scaled

LABELS = (Label(4, "cat"), Label(9, "dog"), Label(11, "absent"))
RESIZE = ResizePolicy(shorter_side=64, longest_side=128)
NOTHING = Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


@pytest.fixture
def data_set(tmp_path: Path) -> CocoDataSet:
    """Twelve pictures of 120 x 90 with up to five boxes, one of them a crowd, the last without any."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "val"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(12):
        Image.new("RGB", (120, 90), (image_id, 0, 0)).save(folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 90, "width": 120})
        for _ in range(int(rng.integers(1, 6)) if image_id < 11 else 0):
            w, h = (float(v) for v in rng.uniform(8, 60, 2).round(1))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.choice([4, 9])),
                "bbox": [float(rng.uniform(0, 120 - w)), float(rng.uniform(0, 90 - h)), w, h], "area": w * h,
                "iscrowd": int(rng.random() < 0.1),
            })  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label.class_id, "name": label.label} for label in LABELS],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return load_coco(tmp_path, "val")


def detections_near_the_truth(data_set: CocoDataSet, noise: float, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    results: list[dict[str, Any]] = []
    for picture in data_set.pictures:
        boxes = picture.target.boxes + rng.normal(0, noise, picture.target.boxes.shape).astype(np.float32)
        extra = rng.uniform(0, 90, (2, 4)).astype(np.float32)
        boxes = np.concatenate([boxes, np.sort(extra.reshape(2, 2, 2), axis=1).reshape(2, 4)])
        labels = np.array([data_set.labels[c].class_id for c in picture.target.columns] + [4, 9], dtype=np.int64)
        results += coco_results(picture.image_id, Detections(boxes, rng.random(len(boxes)).astype(np.float32), labels))
    return results


@pytest.mark.parametrize("noise", [0.0, 2.0, 6.0])
def test_ap_is_pycocotools_own(data_set: CocoDataSet, noise: float) -> None:
    results = detections_near_the_truth(data_set, noise, seed=1)
    report = average_precision(data_set, results, range(12))
    truth = COCO(str(data_set.annotation_file))
    truth.dataset["info"] = {}
    theirs = COCOeval(truth, truth.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    ours = [report.ap, report.ap50, report.ap75, report.ap_small, report.ap_medium, report.ap_large]
    expected = [float("nan") if figure < 0 else figure for figure in theirs.stats[:6]]
    np.testing.assert_array_equal(ours, expected)
    assert report.recall_100 == theirs.stats[8]
    assert np.isnan(report.per_class["absent"])


def oracle(data_set: CocoDataSet) -> Predictor:
    """A run that finds the truth of the picture whose number is its red value, on the canvas."""

    def run(canvases: list[CanvasImage]) -> list[Candidates]:
        [canvas] = canvases
        target = data_set.pictures[int(canvas.pixels[0, 0, 0])].target
        scale = canvas.size[1] / 120, canvas.size[0] / 90
        boxes = (target.boxes * np.array([*scale, *scale])).astype(np.float32)
        ids: NDArray[np.int64] = np.array([data_set.labels[c].class_id for c in target.columns], dtype=np.int64)
        return [Candidates(boxes, np.full(len(boxes), 0.9, np.float32), ids)]

    return Predictor(run, LABELS, RESIZE)  # type: ignore[arg-type]


def test_a_detector_that_finds_the_truth_has_ap_1(data_set: CocoDataSet) -> None:
    assert resized_size(90, 120, RESIZE) == (64, 85)
    report = evaluate(oracle(data_set), data_set, progress=False)
    assert report.ap == pytest.approx(1.0)
    assert report.num_images == 12


def test_a_detector_that_finds_nothing_has_ap_0(data_set: CocoDataSet) -> None:
    def run(canvases: object) -> list[Candidates]:
        return [Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))]

    report = evaluate(Predictor(run, LABELS, RESIZE), data_set, progress=False)
    assert report.ap == 0


def test_a_limit_counts_only_the_first_pictures(data_set: CocoDataSet) -> None:
    report = evaluate(oracle(data_set), data_set, limit=3, progress=False)
    assert report.num_images == 3
    assert report.ap == pytest.approx(1.0)


def test_a_model_with_other_labels_is_refused(data_set: CocoDataSet) -> None:
    predictor = Predictor(oracle(data_set).run, LABELS[:2], RESIZE)
    with pytest.raises(InvalidDataSet, match="the model knows 2 labels"):
        evaluate(predictor, data_set, progress=False)


def test_the_table_names_every_class(data_set: CocoDataSet) -> None:
    table = evaluate(oracle(data_set), data_set, progress=False).table()
    assert "AP@[0.50:0.95]" in table
    assert "AP cat" in table


def detections(predictor: Predictor, data_set: CocoDataSet) -> list[NDArray[np.float32]]:
    return [predictor(data_set.read(index)).boxes for index in range(3)]


def test_an_image_pyramid_of_one_scale_is_the_plain_prediction(data_set: CocoDataSet) -> None:
    plain = oracle(data_set)
    pyramid = replace(plain, scales=(64,))
    for one, other in zip(detections(plain, data_set), detections(pyramid, data_set), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_image_pyramid_finds_each_object_once_and_sees_every_scale(data_set: CocoDataSet) -> None:
    sides = []
    plain = oracle(data_set)

    def run(canvases: list[CanvasImage]) -> list[Candidates]:
        sides.append(canvases[0].size)
        return plain.run(canvases)

    pyramid = Predictor(run, LABELS, RESIZE, scales=(64, 96, 48))  # type: ignore[arg-type]
    report = evaluate(pyramid, data_set, progress=False)
    assert report.ap == pytest.approx(1.0)
    assert sides[:3] == [(64, 85), (96, 128), (48, 64)]
    for one, other in zip(detections(plain, data_set), detections(pyramid, data_set), strict=True):
        assert len(one) == len(other)


def test_tiles_are_looked_at_beside_the_whole_picture(data_set: CocoDataSet) -> None:
    sizes = []
    plain = oracle(data_set)

    def run(canvases: list[CanvasImage]) -> list[Candidates]:
        sizes.extend(canvas.original_size for canvas in canvases)
        return plain.run([canvases[0]]) if canvases[0].original_size == (90, 120) else [NOTHING for _ in canvases]

    tiled = Predictor(run, LABELS, RESIZE, tiling=Tiling(80, 0.5))  # type: ignore[arg-type]
    for one, other in zip(detections(plain, data_set), detections(tiled, data_set), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sizes[:5] == [(90, 120)] + [(80, 80)] * 4


def test_the_bound_on_the_longer_side_grows_with_the_scale() -> None:
    assert scaled(RESIZE, 64) == RESIZE
    assert scaled(RESIZE, 96) == ResizePolicy(shorter_side=96, longest_side=192)


def test_of_a_class_agnostic_data_set_a_model_of_one_label_finds_the_objects(data_set: CocoDataSet) -> None:
    found = oracle(data_set)

    def run(canvases: list[CanvasImage]) -> list[Candidates]:
        return [replace(c, labels=np.ones_like(c.labels)) for c in found.run(canvases)]

    predictor = Predictor(run, (Label(1, "object"),), RESIZE)  # type: ignore[arg-type]
    report = evaluate(predictor, without_classes(data_set), progress=False)
    assert report.ap == pytest.approx(1.0)
    assert report.recall_1000 == pytest.approx(1.0)
    assert list(report.per_class) == ["object"]
    with pytest.raises(InvalidDataSet, match="the model knows 1 labels"):
        evaluate(predictor, data_set, progress=False)


def test_recall_at_1000_counts_what_comes_after_the_best_hundred(data_set: CocoDataSet) -> None:
    results = []
    for picture in data_set.pictures:
        wrong = np.tile(np.float32([0, 0, 1, 1]), (100, 1))
        boxes = np.concatenate([wrong, picture.target.boxes])
        scores = np.linspace(1, 0.5, len(boxes), dtype=np.float32)
        results += coco_results(picture.image_id, Detections(boxes, scores, np.full(len(boxes), 4)))
    report = average_precision(without_classes(data_set), results, range(12))
    assert report.recall_100 == 0
    assert report.recall_1000 == pytest.approx(1.0)
