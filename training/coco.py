"""A COCO-format data set: annotations as JSON, pictures as files.

DIR holds `annotations/instances_{train,val}.json` with `images/{train,val}/`, or COCO's own layout
(`annotations/instances_{train,val}2017.json` with `{train,val}2017/`).

A class's column is its place in the list of the data set's category ids, sorted; ids may have gaps. Boxes become
xyxy float32 in pixels of the upright picture. Boxes that lie outside the picture or have no area are dropped and
counted; crowds are kept apart, to be ignored. A class-agnostic data set is the same with every object of one class.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.image import InvalidImage, decode_image, resized_size
from model.metadata import Label, ResizePolicy
from model.types import Pixels

log = logging.getLogger(__name__)
Split = Literal["train", "val"]
OBJECT = Label(1, "object")
"""The one label of a class-agnostic data set."""


class InvalidDataSet(ValueError):
    """The folder is not a COCO-format data set that can be used; the text says what is wrong where."""


@dataclass(frozen=True, eq=False)
class Target:
    """The truth about one picture."""

    boxes: NDArray[np.float32]
    """[objects, 4] xyxy, pixels of the picture it goes with."""
    columns: NDArray[np.int64]
    """[objects] the network's column of each object's class."""
    ignored: NDArray[np.float32]
    """[regions, 4] xyxy; what is found there counts neither for nor against."""

    def scaled(self, scale_x: float, scale_y: float) -> "Target":
        """The truth about the same picture at another size."""
        factors = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
        return Target(self.boxes * factors, self.columns, self.ignored * factors)

    def on_canvas(self, size: tuple[int, int], resize: ResizePolicy) -> "Target":
        """The truth in canvas pixels, for a picture of `size` (height, width) as evaluation and service resize it."""
        height, width = resized_size(*size, resize)
        return self.scaled(width / size[1], height / size[0])


@dataclass(frozen=True, eq=False)
class Picture:
    image_id: int
    file: Path
    size: tuple[int, int]
    """(height, width)"""
    target: Target


@dataclass(frozen=True, eq=False)
class CocoDataSet:
    split: Split
    annotation_file: Path
    labels: tuple[Label, ...]
    pictures: Sequence[Picture]
    dropped_boxes: int
    class_agnostic: bool = False
    """Every object is an OBJECT; the annotation file keeps its categories."""

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> Pixels:
        """The upright RGB picture. InvalidDataSet: it cannot be read, or its size is not the annotated one."""
        picture = self.pictures[index]
        try:
            pixels = decode_image(picture.file.read_bytes())
        except (OSError, InvalidImage) as error:
            raise InvalidDataSet(f"{picture.file} cannot be read: {error}") from error
        if pixels.shape[:2] != picture.size:
            raise InvalidDataSet(f"{picture.file} is {pixels.shape[:2]}, annotated as {picture.size} (height, width)")
        return pixels


def load_coco(folder: Path, split: Split, *, class_agnostic: bool = False) -> CocoDataSet:
    """Read a split's annotations. InvalidDataSet: files or fields are missing or malformed."""
    data_set = _load(folder, split)
    return without_classes(data_set) if class_agnostic else data_set


def without_classes(data_set: CocoDataSet) -> CocoDataSet:
    """The same pictures, with every object an OBJECT."""
    pictures = [
        replace(picture, target=replace(picture.target, columns=np.zeros_like(picture.target.columns)))
        for picture in data_set.pictures
    ]
    return replace(data_set, labels=(OBJECT,), pictures=pictures, class_agnostic=True)


def _load(folder: Path, split: Split) -> CocoDataSet:
    annotation_file, image_folder = _layout(folder, split)
    try:
        content = json.loads(annotation_file.read_bytes())
        labels = tuple(
            Label(int(c["id"]), str(c["name"])) for c in sorted(content["categories"], key=lambda c: int(c["id"]))
        )
        images = {int(image["id"]): image for image in content["images"]}
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[int(annotation["image_id"])].append(annotation)
    except (ValueError, TypeError) as error:
        raise InvalidDataSet(f"{annotation_file} is not COCO JSON: {error}") from error
    except KeyError as error:
        raise InvalidDataSet(f"{annotation_file} has an entry without {error}") from error
    if not labels or not images:
        raise InvalidDataSet(f"{annotation_file} has {len(labels)} categories and {len(images)} images")
    return _assemble(split, annotation_file, image_folder, labels, images, annotations)


def _assemble(
    split: Split,
    annotation_file: Path,
    image_folder: Path,
    labels: tuple[Label, ...],
    images: dict[int, Any],
    annotations: dict[int, list[Any]],
) -> CocoDataSet:
    strangers = sorted(set(annotations) - set(images))
    if strangers:
        raise InvalidDataSet(f"{annotation_file} annotates images that it does not list, such as id {strangers[0]}")
    columns = {label.class_id: column for column, label in enumerate(labels)}
    pictures, dropped = [], 0
    for image_id, image in sorted(images.items()):
        try:
            size = int(image["height"]), int(image["width"])
            target, bad = _target(annotations.get(image_id, []), size, columns)
            file = _inside(annotation_file.parent.parent, image_folder / str(image["file_name"]))
            pictures.append(Picture(image_id, file, size, target))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataSet(f"{annotation_file}, image {image_id}: bad or missing {error}") from error
        dropped += bad
    if dropped:
        log.warning("%s: %d boxes lie outside their picture or have no area; dropped", annotation_file, dropped)
    return CocoDataSet(split, annotation_file, labels, pictures, dropped)


def _layout(folder: Path, split: Split) -> tuple[Path, Path]:
    candidates = [
        (folder / "annotations" / f"instances_{split}.json", folder / "images" / split),
        (folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"),
    ]
    for annotation_file, image_folder in candidates:
        if annotation_file.is_file():
            return annotation_file, image_folder
    raise InvalidDataSet(f"there is no {candidates[0][0]} and no {candidates[1][0]}")


def _inside(folder: Path, file: Path) -> Path:
    """The file, which a link may have elsewhere, but no annotation. ValueError: its path leaves the folder."""
    if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"file_name: {str(file)!r} is outside {folder}")
    return file


def _target(annotations: list[Any], size: tuple[int, int], columns: dict[int, int]) -> tuple[Target, int]:
    """The boxes of one picture, and how many were dropped."""
    height, width = size
    boxes, kept_columns, ignored, dropped = [], [], [], 0
    for annotation in annotations:
        x, y, w, h = (float(value) for value in annotation["bbox"])
        box = [max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)]
        if not (box[2] > box[0] and box[3] > box[1]):
            dropped += 1
        elif annotation.get("iscrowd", 0):
            ignored.append(box)
        else:
            boxes.append(box)
            kept_columns.append(columns[int(annotation["category_id"])])
    return Target(_boxes(boxes), np.array(kept_columns, dtype=np.int64), _boxes(ignored)), dropped


def _boxes(boxes: list[list[float]]) -> NDArray[np.float32]:
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)
