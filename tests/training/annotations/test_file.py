"""Annotation files: data that are read, dropped with a message, or refused with file, id and reason."""

import codecs
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.metadata import Label
from tests.support.coco_files import write_coco
from training.coco import CocoDataSet, InvalidDataSet, load_coco

IMAGE = {"id": 11, "file_name": "b.png", "height": 40, "width": 60}
Entries = list[dict[str, Any]]


def box(*bbox: float, number: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 11, "category_id": 3, "bbox": list(bbox), "area": 9, "iscrowd": 0} | more


def loaded(folder: Path, *annotations: dict[str, Any], **changes: Any) -> CocoDataSet:
    return load_coco(write_coco(folder, annotations=list(annotations), **changes), "train")


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(InvalidDataSet) as error:
        load_coco(write_coco(folder, **changes), "train")
    assert "\n" not in str(error.value)
    assert "instances_train.json" in str(error.value)
    return str(error.value)


FITTING = [box(1, 1, 9, 9), box(20, 1, 9, 9), box(1, 20, 9, 9), box(20, 20, 9, 9)]


def test_boxes_are_cut_to_the_picture_and_those_without_area_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [[-5, -5, 10, 10], [50, 30, 100, 100], [70, 5, 9, 9], [5, 5, 0, 9], [5, 5, 3, -2]]
    data_set = loaded(tmp_path, *(box(*each) for each in boxes), *FITTING)
    target = data_set.pictures[1].target
    assert target.boxes[:2].tolist() == [[0, 0, 5, 5], [50, 30, 60, 40]]
    assert len(target.boxes) == 6
    assert (data_set.counts.clipped, data_set.counts.dropped) == (2, 3)
    [record] = caplog.records
    for part in ("of 9 boxes 2 reach beyond", "clipped; 3 lie outside", "dropped", "AP is not COCO's own"):
        assert part in record.getMessage()


def test_a_box_that_reaches_out_by_less_than_a_pixel_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_set = loaded(tmp_path, box(-0.75, 5, 10, 10), box(51, 30.5, 9.5, 10))
    assert data_set.pictures[1].target.boxes.tolist() == [[-0.75, 5, 9.25, 15], [51, 30.5, 60.5, 40.5]]
    assert data_set.counts.is_clean
    assert not caplog.records


def test_a_box_that_float32_cannot_hold_has_no_area(tmp_path: Path) -> None:
    data_set = loaded(tmp_path, box(50, 5, 1e-7, 10), box(50, 5, 0.125, 10))
    assert data_set.pictures[1].target.boxes.tolist() == [[50, 5, 50.125, 15]]
    assert data_set.counts.dropped == 1


def test_numbers_as_text_absent_values_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    entries: Entries = [
        {"image_id": "11", "category_id": "3", "bbox": ["1", "2.5", "10", 20.0], "iscrowd": None},
        {"image_id": 11.0, "category_id": 7, "bbox": [1, 2, 30, 20], "area": "55.5", "iscrowd": "1"},
        {"image_id": 11, "category_id": 7, "bbox": [1, 2, 30, 20], "area": None, "iscrowd": False},
    ]
    folder = write_coco(tmp_path, annotations=entries, images=[IMAGE | {"id": "11", "height": "40", "width": 60.0}])
    file = folder / "annotations" / "instances_train.json"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    [picture] = load_coco(folder, "train").pictures
    assert (picture.image_id, picture.size) == (11, (40, 60))
    assert picture.truth.boxes.tolist() == [[1, 2.5, 10, 20], [1, 2, 30, 20], [1, 2, 30, 20]]
    assert picture.truth.areas.tolist() == [200, 55.5, 600]
    assert picture.truth.crowds.tolist() == [False, True, False]
    assert picture.target.columns.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("categories", "kept"),
    [
        ([{"id": 0, "name": "cat"}, {"id": 3, "name": "cat"}], [Label(3, "cat")]),
        (
            [{"id": 0, "name": "animal", "supercategory": "none"}, {"id": 3, "name": "cat", "supercategory": "animal"}],
            [Label(3, "cat")],
        ),
        ([{"id": 3, "name": "person", "supercategory": "person"}], [Label(3, "person")]),
        ([{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 5, "name": "dog"}],
         [Label(3, "cat"), Label(5, "dog")]),
        ([{"id": 3, "name": "cat", "supercategory": "x"}, {"id": 4, "name": "dog"}],
         [Label(3, "cat"), Label(4, "dog")]),
    ],
)  # fmt: skip
def test_a_category_that_only_groups_others_is_dropped_with_a_word(
    categories: Entries, kept: list[Label], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_set = loaded(tmp_path, box(1, 1, 9, 9), categories=categories)
    assert list(data_set.labels) == kept
    assert data_set.pictures[1].target.columns.tolist() == [0]
    assert ["dropped categories" in record.getMessage() for record in caplog.records] == [True] * (
        len(categories) > len(kept)
    )


@pytest.mark.parametrize("area", [2e10, -1])
def test_an_area_that_no_object_of_the_picture_has_is_replaced_by_the_boxs(area: float, tmp_path: Path) -> None:
    data_set = loaded(tmp_path, box(1, 1, 9, 9, area=area), box(1, 1, 9, 9, area=0), box(1, 1, 9, 9, area=2400))
    assert data_set.pictures[1].truth.areas.tolist() == [81, 0, 2400]  # a mask's may be anything that fits
    assert not data_set.counts.is_clean


def test_some_boxes_below_one_pixel_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded(tmp_path, box(5, 5, 0.5, 0.5), *FITTING)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["of 5 boxes 1 are below one pixel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "2 categories and 0 images"),
        ({"categories": []}, "0 categories"),
        ({"annotations": [box(0, 0, 9, 9, image_id=99)]}, "annotation 1: image_id 99 is not among the images"),
        ({"annotations": [box(0, 0, 9, 9, category_id=4)]}, "annotation 1: category_id 4 is not among the categories"),
        ({"annotations": [{"image_id": 11, "category_id": 3}]}, "annotation at index 0: there is no bbox"),
        ({"annotations": [box(1, 2)]}, "annotation 1: bbox is [1, 2], not [x, y, width, height]"),
        ({"annotations": [box(1, 2, 3, float("nan"))]}, "annotation 1: bbox is [1, 2, 3, nan], not four finite"),
        ({"annotations": [box(1, 2, 3, float("inf"))]}, "not four finite numbers"),
        ({"annotations": [box(1, 2, 3, 10**400)]}, "not four finite numbers"),
        ({"annotations": [box(1, 2, 3, 4, area=float("nan"))]}, "annotation 1: area is nan, not a finite number"),
        ({"annotations": [box(1, 2, 3, 4, iscrowd="no")]}, "annotation 1: iscrowd is 'no', not a finite number"),
        ({"annotations": [box(1, 2, 3, 4, iscrowd=2)]}, "annotation 1: iscrowd is 2, neither 0 nor 1"),
        ({"annotations": [3]}, "annotation at index 0 is 3, not an object"),
        ({"annotations": None}, "it has no list of annotations"),
        ({"images": [{"id": 11, "file_name": "b.png"}], "annotations": []}, "image 11: there is no height"),
        ({"images": [IMAGE | {"width": 0, "height": 0}]}, "image 11: width 0, height 0: both have to be 1 or more"),
        ({"images": [IMAGE | {"width": -1}]}, "image 11: width -1"),
        ({"images": [IMAGE | {"width": 60.5}]}, "image 11: width is 60.5, not a whole number"),
        ({"images": [IMAGE | {"file_name": None}]}, "image 11: file_name is None, not text"),
        ({"images": [IMAGE | {"file_name": "a\0.png"}]}, "image 11: file_name is 'a\\x00.png', which no file can have"),
        ({"images": [IMAGE | {"id": "a-uuid"}]}, "image 'a-uuid': id is 'a-uuid', not a whole number"),
        ({"images": [IMAGE, IMAGE | {"file_name": "a.png"}]}, "image 11: another one has the id 11"),
        ({"images": [IMAGE | {"file_name": "../../../b.png"}]}, "b.png' is outside"),
        ({"images": [IMAGE | {"file_name": "/etc/passwd"}]}, "image 11: '/etc/passwd' is outside"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, "category 3: another one has the id 3"),
        ({"categories": [{"id": 3, "name": "x" * 201}, {"id": 7, "name": "b"}]}, "at most 200 characters"),
        ({"categories": [{"id": 3, "name": "a\nb"}, {"id": 7, "name": "b"}]}, "no control characters"),
        ({"categories": [{"id": 3, "name": "\ud800"}, {"id": 7, "name": "b"}]}, "halves of surrogate pairs"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}]}, "repeat the name 'a'"),
        ({"categories": [{"id": 2**63, "name": "a"}]}, "beyond 64 bits"),
        ({"annotations": [box(10, 10, 50, 40), box(30, 20, 59, 39), box(1, 1, 9, 9)]}, "[x1, y1, x2, y2] (xyxy)"),
        ({"annotations": [box(0.1, 0.2, 0.3, 0.4), box(0, 0, 1, 1)]}, "relative coordinates"),
    ],
)
def test_a_malformed_annotation_file_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path, **changes)


@pytest.mark.parametrize("text", ["{", "[1]", "7", "[" * 100_000])
def test_what_is_no_coco_json_is_refused(text: str, tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(InvalidDataSet, match="not COCO JSON"):
        load_coco(tmp_path, "train")


def test_repeated_ids_of_annotations_do_not_matter(tmp_path: Path) -> None:
    data_set = loaded(tmp_path, box(1, 1, 9, 9), box(20, 20, 9, 9))
    assert len(data_set.pictures[1].target.boxes) == 2


def test_boxes_of_mixed_kinds_keep_the_order_of_the_file(tmp_path: Path) -> None:
    entries = [box(*bbox, iscrowd=crowd) for bbox, crowd in [((1, 1, 9, 9), 0), ((2, 2, 9, 9), 1), ((3, 3, 9, 9), 0)]]
    picture = loaded(tmp_path, *entries).pictures[1]
    np.testing.assert_array_equal(picture.truth.boxes[:, 0], [1, 2, 3])
    np.testing.assert_array_equal(picture.target.boxes[:, 0], [1, 3])
    np.testing.assert_array_equal(picture.target.ignored[:, 0], [2])


def test_the_files_json_may_be_utf_16(tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train.json"
    file.write_text(json.dumps(json.loads(file.read_text())), encoding="utf-16")
    assert len(load_coco(tmp_path, "train")) == 2


@pytest.fixture(autouse=True)
def _warnings_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
