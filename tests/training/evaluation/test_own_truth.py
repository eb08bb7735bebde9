"""One reading of an annotation file: a detector that answers exactly what training is taught has AP 1 in each class
that has objects; and where nothing was clipped or dropped, AP is what pycocotools makes of the file itself."""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.types import Detections, coco_results
from tests.support.tiny_training import ROOT
from training.coco import CocoDataSet, Split, load_coco
from training.evaluation.average_precision import Results, average_precision

BCCD = ROOT.parent / "shared" / "data" / "bccd"
SIZE = (64, 80)
Content = dict[str, list[dict[str, Any]]]


def content(seed: int = 0, pictures: int = 6) -> Content:
    """A clean file with two classes that have objects, one that has none, and crowds."""
    rng = np.random.default_rng(seed)
    images = [{"id": n, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in range(pictures)]
    annotations: list[dict[str, Any]] = []
    for index in range(6 * pictures):
        width, height = rng.uniform(2, 40, 2)
        bbox = [rng.uniform(0, SIZE[1] - width), rng.uniform(0, SIZE[0] - height), width, height]
        annotations.append({
            "id": index + 1, "image_id": int(rng.integers(pictures)), "category_id": int(rng.choice([2, 9])),
            "bbox": bbox, "area": width * height * rng.uniform(0.5, 1), "iscrowd": int(rng.random() < 0.15),
            "ignore": int(rng.random() < 0.15),
        })  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [
        {"id": 2, "name": "a"}, {"id": 9, "name": "b"}, {"id": 5, "name": "absent"}]}  # fmt: skip


def loaded(folder: Path, of: Content) -> CocoDataSet:
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(of))
    return load_coco(folder, "val")


def own_truth(data_set: CocoDataSet) -> Results:
    ids = np.array([label.class_id for label in data_set.labels])
    results: Results = []
    for picture in data_set.pictures:
        boxes, columns = picture.target.boxes, picture.target.columns
        results += coco_results(picture.image_id, Detections(boxes, np.ones(len(boxes), np.float32), ids[columns]))
    return results


def assert_own_truth_has_ap_1(data_set: CocoDataSet) -> None:
    report = average_precision(data_set, own_truth(data_set), [picture.image_id for picture in data_set.pictures])
    columns = np.concatenate([picture.target.columns for picture in data_set.pictures])
    for column, label in enumerate(data_set.labels):
        expected = 1.0 if column in columns else math.nan
        assert report.per_class[label.label] == pytest.approx(expected, abs=1e-12, nan_ok=True), label
    assert report.ap == pytest.approx(1, abs=1e-12)
    for figure in (report.ap_small, report.ap_medium, report.ap_large):  # near twins of two sizes cost COCO a trifle
        assert figure > 0.999 or math.isnan(figure)


def ids_from_0(of: Content) -> None:
    for index, annotation in enumerate(of["annotations"]):
        annotation["id"] = index


def no_area(of: Content) -> None:
    for annotation in of["annotations"]:
        del annotation["area"]


def no_crowd_field(of: Content) -> None:
    for annotation in of["annotations"]:
        del annotation["iscrowd"]


def crowd_is_null(of: Content) -> None:
    for annotation in of["annotations"]:
        annotation["iscrowd"] = None


def no_ids(of: Content) -> None:
    for annotation in of["annotations"]:
        del annotation["id"]


def one_id_for_all(of: Content) -> None:
    for annotation in of["annotations"]:
        annotation["id"] = 7


def all_as_text(of: Content) -> None:
    for entries in of.values():
        for entry in entries:
            entry.update({key: str(value) for key, value in entry.items() if isinstance(value, int | float)})
            if "bbox" in entry:
                entry["bbox"] = [str(value) for value in entry["bbox"]]


def boxes_without_area_and_outside(of: Content) -> None:
    for box in ([3, 3, 0, 9], [3, 3, 9, 0], [3, 3, -5, 9], [0, 0, 0, 0], [90, 3, 9, 9], [3, 70, 9, 9]):
        of["annotations"].append({"id": 100 + len(of["annotations"]), "image_id": 0, "category_id": 2, "bbox": box})
        of["annotations"][-1] |= {"area": box[2] * box[3], "iscrowd": 0}


def boxes_across_the_border(of: Content) -> None:
    for box in ([-9, -9, 20, 20], [70, 50, 30, 30], [-0.5, 3, 9, 9], [70, 55, 10.9, 9.9], [79.5, 3, 10, 10]):
        of["annotations"].append({"image_id": 1, "category_id": 9, "bbox": box})


def thin_boxes(of: Content) -> None:
    for width in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.3):
        of["annotations"].append({"image_id": 2, "category_id": 9, "bbox": [60.1, 7.3, width, 20]})


def areas_that_cannot_be(of: Content) -> None:
    for annotation, area in zip(of["annotations"], (2e10, -4, 0, 1e6) * 3, strict=False):
        annotation["area"] = area


def objects_twice(of: Content) -> None:
    of["annotations"] += [dict(annotation) for annotation in of["annotations"]]


def a_parent_of_the_same_name(of: Content) -> None:
    of["categories"].append({"id": 0, "name": "a", "supercategory": "none"})


def a_class_of_id_0(of: Content) -> None:
    of["categories"][0]["id"] = 0
    for annotation in of["annotations"]:
        annotation["category_id"] %= 2 if annotation["category_id"] == 2 else 10


CHANGES = [
    ids_from_0, no_area, no_crowd_field, crowd_is_null, no_ids, one_id_for_all, all_as_text,
    boxes_without_area_and_outside, boxes_across_the_border, thin_boxes, areas_that_cannot_be, objects_twice,
    a_parent_of_the_same_name, a_class_of_id_0,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_detector_that_answers_what_is_taught_has_ap_1(change: Any, tmp_path: Path) -> None:
    of = content()
    change(of)
    assert_own_truth_has_ap_1(loaded(tmp_path, of))


def pycocotools_stats(file: Path, results: Results) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        truth.dataset["info"] = {}
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(figure) if figure >= 0 else math.nan for figure in evaluation.stats]


def noisy(data_set: CocoDataSet, seed: int) -> Results:
    """The truth, moved; some classes mixed up; some found twice, or where nothing is."""
    rng = np.random.default_rng([seed, 1])
    ids = np.array([label.class_id for label in data_set.labels])
    results: Results = []
    for picture in data_set.pictures:
        boxes, columns = np.tile(picture.target.boxes, (2, 1)), np.tile(picture.target.columns, 2)
        boxes = boxes + rng.normal(0, 2, boxes.shape).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.where(rng.random(len(boxes)) < 0.2, rng.permutation(columns), columns)
        scores = rng.random(len(boxes)).round(1).astype(np.float32)  # equal ones too
        results += coco_results(picture.image_id, Detections(boxes, scores, ids[labels]))
    return results


@pytest.mark.parametrize("seed", range(5))
def test_ap_of_a_clean_file_is_pycocotools_own_to_the_last_digit(seed: int, tmp_path: Path) -> None:
    data_set = loaded(tmp_path, content(seed))
    assert data_set.counts.is_clean
    assert sum(int(picture.truth.crowds.sum()) for picture in data_set.pictures) > 1
    assert_equal_to_pycocotools(data_set, noisy(data_set, seed))


def assert_equal_to_pycocotools(data_set: CocoDataSet, results: Results) -> None:
    report = average_precision(data_set, results, [picture.image_id for picture in data_set.pictures])
    theirs = pycocotools_stats(data_set.annotation_file, results)
    ours = [report.ap, report.ap50, report.ap75, report.ap_small, report.ap_medium, report.ap_large]
    np.testing.assert_array_equal(ours, theirs[:6])
    assert 0 < report.ap < 1
    assert report.recall_100 == theirs[8]


@pytest.fixture(params=["train", "val"])
def bccd(request: pytest.FixtureRequest) -> Iterator[CocoDataSet]:
    if not BCCD.exists():
        pytest.skip(f"{BCCD} is not here: blood smears, to be had from github.com/Shenggan/BCCD_Dataset")
    split: Split = request.param
    yield load_coco(BCCD, split)


def test_on_real_pictures_a_detector_that_answers_what_is_taught_has_ap_1(bccd: CocoDataSet) -> None:
    assert_own_truth_has_ap_1(bccd)
    assert bccd.counts.dropped == (2 if bccd.split == "train" else 0)


def test_on_real_pictures_ap_is_pycocotools_own(bccd: CocoDataSet) -> None:
    if bccd.split == "train":
        pytest.skip("two boxes of BCCD's training split have no area")
    assert bccd.counts.is_clean
    assert_equal_to_pycocotools(bccd, noisy(bccd, 0))
