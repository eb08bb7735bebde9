"""Reading COCO-format data: both layouts, the odd things that real files hold, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.metadata import Label
from tests.support.coco_files import write_coco
from training.coco import InvalidDataSet, load_coco


def test_columns_follow_the_sorted_category_ids_and_crowds_are_kept_apart(tmp_path: Path) -> None:
    data_set = load_coco(write_coco(tmp_path), "train")
    assert data_set.labels == (Label(3, "three"), Label(7, "seven"))
    first, second = data_set.pictures
    assert (first.image_id, second.image_id) == (5, 11)
    assert len(first.target.boxes) == 0
    assert second.target.boxes.tolist() == [[10, 5, 30, 35]]
    assert second.target.columns.tolist() == [1]
    assert second.target.ignored.tolist() == [[0, 0, 60, 40]]
    assert data_set.read(0).shape == (30, 20, 3)


def test_cocos_own_layout_is_read_too(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    (tmp_path / "images" / "train").rename(tmp_path / "train2017")
    assert load_coco(tmp_path, "train").read(1).shape == (40, 60, 3)


def test_pictures_may_lie_anywhere_in_the_folder_and_links_lead_anywhere(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "data")
    Image.new("RGB", (20, 30), "blue").save(tmp_path / "elsewhere.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    size = {"height": 30, "width": 20}
    names = ("../../link.png", "sub/../a.png", str(folder / "images" / "train" / "a.png"))
    images = [{"id": number, "file_name": name} | size for number, name in enumerate(names)]
    (folder / "images" / "train" / "sub").mkdir()
    data_set = load_coco(write_coco(folder, images=images, annotations=[]), "train")
    assert [data_set.read(index).shape for index in range(3)] == [(30, 20, 3)] * 3


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataSet, match=r"instances_val\.json"):
        load_coco(tmp_path, "val")


def test_a_picture_that_cannot_be_read_or_has_another_size_is_named(tmp_path: Path) -> None:
    data_set = load_coco(write_coco(tmp_path), "train")
    data_set.pictures[0].file.write_bytes(b"no picture")
    with pytest.raises(InvalidDataSet, match=r"a\.png cannot be read"):
        data_set.read(0)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data_set.pictures[0].file)
    with pytest.raises(InvalidDataSet, match="annotated as"):
        data_set.read(0)


def test_a_class_agnostic_data_set_has_the_same_boxes_all_of_one_class(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    plain, agnostic = load_coco(folder, "train"), load_coco(folder, "train", class_agnostic=True)
    assert agnostic.labels == (Label(1, "object"),)
    assert [picture.target.columns.tolist() for picture in agnostic.pictures] == [[], [0]]
    for one, other in zip(plain.pictures, agnostic.pictures, strict=True):
        assert one.target.boxes.tolist() == other.target.boxes.tolist()
