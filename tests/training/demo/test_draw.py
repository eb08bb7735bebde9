import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from training.demo.draw import LABELS, PlacedObject, draw_data_set, draw_picture, place_objects


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    draw_data_set(out, images=5, validation_images=4, seed=3, workers=1)
    return out


@pytest.fixture(scope="module")
def scenes() -> list[list[PlacedObject]]:
    return [place_objects(np.random.default_rng(seed), height=480, width=640) for seed in range(100)]


def test_the_same_seed_draws_the_same_bytes_for_any_number_of_workers(data_set: Path, tmp_path: Path) -> None:
    draw_data_set(tmp_path, images=5, validation_images=4, seed=3, workers=2)
    assert len(files(tmp_path)) == 2 + 5 + 4
    assert files(tmp_path) == files(data_set)


def test_no_two_pictures_of_any_seed_split_or_index_are_alike() -> None:
    keys = [(seed, split, index) for seed in (0, 1) for split in ("train", "val") for index in (0, 1)]
    assert len({draw_picture(*key).pixels.tobytes() for key in keys}) == len(keys)


def test_a_picture_depends_on_its_key_alone() -> None:
    alone = draw_picture(0, "val", 7)
    draw_picture(0, "val", 6)
    again = draw_picture(0, "val", 7)
    assert np.array_equal(alone.pixels, again.pixels)
    assert np.array_equal(alone.boxes, again.boxes)


def test_pycocotools_loads_the_annotations_and_finds_every_picture(data_set: Path) -> None:
    for split, count in (("train", 5), ("val", 4)):
        coco = COCO(data_set / "annotations" / f"instances_{split}.json")
        assert {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())} == {
            1: "circle",
            2: "square",
            3: "triangle",
            4: "star",
            5: "cross",
            6: "ring",
            7: "heart",
            8: "crescent",
        }
        assert len(coco.imgs) == count
        for image in coco.imgs.values():
            pixels = cv2.imread(str(data_set / "images" / split / image["file_name"]))
            assert pixels.shape[:2] == (image["height"], image["width"])


def test_annotations_are_the_boxes_and_labels_that_were_drawn(data_set: Path) -> None:
    coco = COCO(data_set / "annotations" / "instances_train.json")
    for index in range(5):
        picture = draw_picture(3, "train", index)
        annotations: list[Any] = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        x, y, width, height = np.array([each["bbox"] for each in annotations]).reshape(-1, 4).T
        assert np.stack([x, y, x + width, y + height], axis=1) == pytest.approx(picture.boxes, abs=0.011)
        assert [each["category_id"] for each in annotations] == picture.labels.tolist()
        assert [each["area"] for each in annotations] == pytest.approx(picture.areas, abs=0.006)


def test_a_folder_that_has_annotations_is_refused_and_left_alone(data_set: Path) -> None:
    before = files(data_set)
    with pytest.raises(ValueError, match="exists already"):
        draw_data_set(data_set, images=1, validation_images=1, seed=0, workers=1)
    assert files(data_set) == before


def test_an_interrupted_run_leaves_no_annotations_and_can_be_repeated(data_set: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "images" / "val"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    with pytest.raises(FileExistsError):
        draw_data_set(tmp_path, images=5, validation_images=4, seed=3, workers=1)
    assert not (tmp_path / "annotations").exists()
    in_the_way.unlink()
    draw_data_set(tmp_path, images=5, validation_images=4, seed=3, workers=1)
    assert files(tmp_path) == files(data_set)


def test_a_set_for_validation_alone_has_an_empty_training_split(tmp_path: Path) -> None:
    draw_data_set(tmp_path, images=0, validation_images=1, seed=1, workers=1)
    train = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    assert (train["images"], train["annotations"], len(train["categories"])) == ([], [], 8)
    assert sorted(files(tmp_path / "images")) == ["val/000001.jpg"]


def test_negative_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images -1"):
        draw_data_set(tmp_path, images=-1, validation_images=1, seed=0, workers=1)


def mask(shape: tuple[np.ndarray, ...], height: int, width: int) -> np.ndarray:
    """With a border of 200 pixels around the picture, without anti-aliasing: nothing of the drawing code."""
    drawn = np.zeros((height + 400, width + 400), dtype=np.uint8)
    cv2.fillPoly(drawn, [np.rint(contour - 0.5 + 200).astype(np.int32) for contour in shape], 1)
    return drawn.astype(bool)


def test_objects_stay_mostly_inside_the_picture_and_mostly_visible(scenes: list[list[PlacedObject]]) -> None:
    for scene in scenes[:30]:
        masks = [mask(placed.shape, 480, 640) for placed in scene]
        owner = np.full((480, 640), -1, dtype=np.int8)
        for number, whole in enumerate(masks):
            owner[whole[200:680, 200:840]] = number
        for number, (placed, whole) in enumerate(zip(scene, masks, strict=True)):
            inside = whole[200:680, 200:840].sum()
            small = placed.area < 400  # whole pixels measure these badly
            assert inside >= (0.5 if small else 0.59) * whole.sum()
            assert (owner == number).sum() >= (0.5 if small else 0.63) * inside


def test_boxes_lie_inside_the_picture_and_hold_their_area(scenes: list[list[PlacedObject]]) -> None:
    for placed in [each for scene in scenes for each in scene]:
        xmin, ymin, xmax, ymax = placed.box
        assert 0 <= xmin < xmax <= 640
        assert 0 <= ymin < ymax <= 480
        assert 0 < placed.area <= (xmax - xmin) * (ymax - ymin) + 1e-9


def test_sizes_counts_and_classes_are_spread_as_promised(scenes: list[list[PlacedObject]]) -> None:
    counts = [len(scene) for scene in scenes]
    sizes = np.array([placed.size for scene in scenes for placed in scene]) * 800 / 480
    labels = np.array([placed.category_id for scene in scenes for placed in scene])
    assert min(counts) == 0
    assert max(counts) <= 14
    assert 5 < np.mean(counts) < 7
    assert sizes.min() >= 16
    assert 400 < sizes.max() <= 550.1
    assert 0.06 < np.mean(sizes < 27) < 0.13
    assert np.bincount(labels, minlength=9)[1:].min() > len(labels) / len(LABELS) / 2


def test_pictures_are_480_pixels_on_the_shorter_side_and_of_many_shapes() -> None:
    sizes = {draw_picture(2, "train", index).pixels.shape[:2] for index in range(24)}
    assert {min(size) for size in sizes} == {480}
    assert max(max(size) for size in sizes) <= 720
    assert any(height > width for height, width in sizes)
    assert any(height < width for height, width in sizes)
