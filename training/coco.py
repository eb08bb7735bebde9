"""A COCO-format data set: annotations as JSON, pictures as files.

DIR holds `annotations/instances_{train,val}.json` with `images/{train,val}/`, or COCO's own layout
(`annotations/instances_{train,val}2017.json` with `{train,val}2017/`).

A class's column is its place in the list of the data set's category ids, sorted; ids may have gaps. Training takes
each picture's `target`, evaluation its `truth`: two forms of one reading (`training/annotations`). Boxes that lie
outside the picture or have no area are dropped and counted; crowds are kept apart, to be ignored. A class-agnostic data
set is the same with every object of one class.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.image import InvalidImage, decode_image, resized_size
from model.metadata import Label, ResizePolicy
from model.types import Pixels
from training.annotations.boxes import BoxCounts, Truth, of_one_class
from training.annotations.fields import InvalidDataSet
from training.annotations.file import AnnotatedImage, read_annotations

__all__ = ["OBJECT", "CocoDataSet", "InvalidDataSet", "Picture", "Split", "Target", "load_coco", "without_classes"]
Split = Literal["train", "val"]
OBJECT = Label(1, "object")
"""The one label of a class-agnostic data set."""


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
    truth: Truth

    @property
    def target(self) -> Target:
        """The truth as training takes it."""
        boxes = self.truth.boxes.copy()
        boxes[:, 2:] += boxes[:, :2]
        xyxy, objects = boxes.astype(np.float32), ~self.truth.crowds
        return Target(xyxy[objects], self.truth.columns[objects], xyxy[self.truth.crowds])


@dataclass(frozen=True, eq=False)
class CocoDataSet:
    split: Split
    annotation_file: Path
    labels: tuple[Label, ...]
    pictures: Sequence[Picture]
    counts: BoxCounts
    class_agnostic: bool = False
    """Every object is an OBJECT; the annotation file keeps its categories."""

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def summary(self) -> str:
        """Numbers of pictures and objects, and a hash of all that a run sees of it; the pixels are not looked at."""
        content = hashlib.sha256(repr(self.labels).encode())
        for picture in self.pictures:
            content.update(repr((picture.image_id, picture.file.name, picture.size)).encode())
            for values in vars(picture.truth).values():
                content.update(values.tobytes())
        objects = sum(int((~picture.truth.crowds).sum()) for picture in self.pictures)
        return f"{len(self)} pictures, {objects} objects, {content.hexdigest()[:12]}"

    def read(self, index: int) -> Pixels:
        """The upright RGB picture. InvalidDataSet: it cannot be read, or its size is not the annotated one."""
        picture = self.pictures[index]
        try:
            pixels = decode_image(picture.file.read_bytes())
        except (OSError, InvalidImage) as error:
            raise InvalidDataSet(f"{picture.file} cannot be read: {error}") from error
        if pixels.shape[:2] != picture.size:
            turned = ", as it was before its EXIF orientation turned it" if pixels.shape[1::-1] == picture.size else ""
            raise InvalidDataSet(
                f"{picture.file} is {pixels.shape[:2]}, annotated as {picture.size} (height, width){turned}"
            )
        return pixels


def load_coco(folder: Path, split: Split, *, class_agnostic: bool = False) -> CocoDataSet:
    """Read a split's annotations. InvalidDataSet: files or fields are missing or malformed, or no run can use them."""
    annotation_file, image_folder = _layout(folder, split)
    read = read_annotations(annotation_file)
    pictures = [
        Picture(image.image_id, _inside(annotation_file, image_folder, image), image.size, image.truth)
        for image in read.images
    ]
    data_set = CocoDataSet(split, annotation_file, read.labels, pictures, read.counts)
    return without_classes(data_set) if class_agnostic else data_set


def without_classes(data_set: CocoDataSet) -> CocoDataSet:
    """The same pictures, with every object an OBJECT."""
    pictures = [replace(picture, truth=of_one_class(picture.truth)) for picture in data_set.pictures]
    return replace(data_set, labels=(OBJECT,), pictures=pictures, class_agnostic=True)


def _layout(folder: Path, split: Split) -> tuple[Path, Path]:
    candidates = [
        (folder / "annotations" / f"instances_{split}.json", folder / "images" / split),
        (folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"),
    ]
    for annotation_file, image_folder in candidates:
        if annotation_file.is_file():
            return annotation_file, image_folder
    raise InvalidDataSet(f"there is no {candidates[0][0]} and no {candidates[1][0]}")


def _inside(annotation_file: Path, image_folder: Path, image: AnnotatedImage) -> Path:
    """The file, which a link may have elsewhere, but no annotation. InvalidDataSet: its path leaves the data set."""
    folder, file = annotation_file.parent.parent, image_folder / image.file_name
    if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
        raise InvalidDataSet(f"{annotation_file}: image {image.image_id}: {str(file)!r} is outside {folder}")
    return file
