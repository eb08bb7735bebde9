"""Reading COCO-format data: both layouts, the odd things that real files hold, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.metadata import Label
from training.coco import InvalidDataSet, load_coco


def write_data_set(folder: Path, *, split: str = "train", **changes: Any) -> Path:
    content: dict[str, Any] = {
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
        "images": [
            {"id": 11, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "a.png", "height": 30, "width": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 7, "bbox": [10, 5, 20, 30], "iscrowd": 0, "area": 600},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 2400},
        ],
    } | changes
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(images / "b.png")
    Image.new("RGB", (20, 30), "blue").save(images / "a.png")
    return folder


def test_columns_follow_the_sorted_category_ids_and_crowds_are_kept_apart(tmp_path: Path) -> None:
    data_set = load_coco(write_data_set(tmp_path), "train")
    assert data_set.labels == (Label(3, "three"), Label(7, "seven"))
    first, second = data_set.pictures
    assert (first.image_id, second.image_id) == (5, 11)
    assert len(first.target.boxes) == 0
    assert second.target.boxes.tolist() == [[10, 5, 30, 35]]
    assert second.target.columns.tolist() == [1]
    assert second.target.ignored.tolist() == [[0, 0, 60, 40]]
    assert data_set.read(0).shape == (30, 20, 3)


def test_cocos_own_layout_is_read_too(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    (tmp_path / "images" / "train").rename(tmp_path / "train2017")
    assert load_coco(tmp_path, "train").read(1).shape == (40, 60, 3)


def test_boxes_are_cut_to_the_picture_and_those_without_area_are_dropped_and_counted(tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [50, 30, 100, 100], [70, 5, 9, 9], [5, 5, 0, 9], [5, 5, 3, -2]]
    annotations = [{"id": i, "image_id": 11, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)]
    data_set = load_coco(write_data_set(tmp_path, annotations=annotations), "train")
    assert data_set.pictures[1].target.boxes.tolist() == [[0, 0, 5, 5], [50, 30, 60, 40]]
    assert data_set.dropped_boxes == 3


def test_pictures_may_lie_anywhere_in_the_folder_and_links_lead_anywhere(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path / "data")
    Image.new("RGB", (20, 30), "blue").save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    size = {"height": 30, "width": 20}
    names = ("../../link.png", "sub/../a.png", str(folder / "images" / "train" / "a.png"))
    images = [{"id": number, "file_name": name} | size for number, name in enumerate(names)]
    (folder / "images" / "train" / "sub").mkdir()
    data_set = load_coco(write_data_set(folder, images=images, annotations=[]), "train")
    assert [data_set.read(index).shape for index in range(3)] == [(30, 20, 3)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "2 categories and 0 images"),
        ({"categories": []}, "0 categories"),
        ({"annotations": [{"image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "id 99"),
        ({"annotations": [{"image_id": 11, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "image 11"),
        ({"annotations": [{"image_id": 11, "category_id": 3}]}, "bbox"),
        ({"annotations": [{"image_id": 11, "category_id": 3, "bbox": [1, 2]}]}, "image 11"),
        ({"images": [{"id": 11, "file_name": "b.png"}]}, "height"),
        ({"annotations": None}, "not COCO JSON"),
        ({"images": [{"id": 11, "file_name": "../../../b.png", "height": 4, "width": 6}]}, "image 11: .*is outside"),
        ({"images": [{"id": 11, "file_name": "/etc/passwd", "height": 4, "width": 6}]}, "'/etc/passwd' is outside"),
    ],
)
def test_a_malformed_annotation_file_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidDataSet, match=message) as error:
        load_coco(write_data_set(tmp_path, **changes), "train")
    assert "\n" not in str(error.value)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text("{")
    with pytest.raises(InvalidDataSet, match="not COCO JSON"):
        load_coco(tmp_path, "train")


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataSet, match=r"instances_val\.json"):
        load_coco(tmp_path, "val")


def test_a_picture_that_cannot_be_read_or_has_another_size_is_named(tmp_path: Path) -> None:
    data_set = load_coco(write_data_set(tmp_path), "train")
    data_set.pictures[0].file.write_bytes(b"no picture")
    with pytest.raises(InvalidDataSet, match=r"a\.png cannot be read"):
        data_set.read(0)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data_set.pictures[0].file)
    with pytest.raises(InvalidDataSet, match="annotated as"):
        data_set.read(0)


def test_a_class_agnostic_data_set_has_the_same_boxes_all_of_one_class(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path)
    plain, agnostic = load_coco(folder, "train"), load_coco(folder, "train", class_agnostic=True)
    assert agnostic.labels == (Label(1, "object"),)
    assert [picture.target.columns.tolist() for picture in agnostic.pictures] == [[], [0]]
    for one, other in zip(plain.pictures, agnostic.pictures, strict=True):
        assert one.target.boxes.tolist() == other.target.boxes.tolist()
