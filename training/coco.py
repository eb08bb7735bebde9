"""A COCO-format data set: annotations as JSON, pictures as files.

DIR holds `annotations/instances_{train,val}.json` with `images/{train,val}/`, or COCO's own layout
(`annotations/instances_{train,val}2017.json` with `{train,val}2017/`).

A class's column is its index in the sorted list of the data set's category ids, which may have gaps. Training uses each
picture's `target` and evaluation its `truth`: two forms of one reading (`training/annotations`). Boxes outside the
picture or without area are dropped and counted. Crowds become ignored regions. In a class-agnostic data set every
object has the same class.
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
"""The label of a class-agnostic data set."""


@dataclass(frozen=True, eq=False)
class Target:
    """The objects and ignored regions of one picture."""

    boxes: NDArray[np.float32]
    """[objects, 4] xyxy, pixels of the picture."""
    columns: NDArray[np.int64]
    """[objects] column of each object's class in the network."""
    ignored: NDArray[np.float32]
    """[regions, 4] xyxy; detections there do not count."""

    def scaled(self, scale_x: float, scale_y: float) -> "Target":
        """Scale the target to another size of the picture."""
        factors = np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)
        return Target(self.boxes * factors, self.columns, self.ignored * factors)

    def on_canvas(self, size: tuple[int, int], resize: ResizePolicy) -> "Target":
        """Convert to canvas pixels, for a picture of `size` (height, width), resized as in evaluation and service."""
        height, width = resized_size(*size, resize)
        return self.scaled(width / size[1], height / size[0])


@dataclass(frozen=True, eq=False)
class Picture:
    image_id: int
    file: Path
    size: tuple[int, int]
    """Size (height, width), pixels."""
    truth: Truth

    @property
    def target(self) -> Target:
        """The truth in the form that training uses."""
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
    """True: every object is an OBJECT; the annotation file keeps its categories."""

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def name(self) -> str:
        """The name of the data set's folder."""
        return self.annotation_file.parent.parent.name

    @property
    def summary(self) -> str:
        """Numbers of pictures and objects, and a hash of all annotations that a run uses; pixels are not hashed."""
        content = hashlib.sha256(repr(self.labels).encode())
        for picture in self.pictures:
            content.update(repr((picture.image_id, picture.file.name, picture.size)).encode())
            for values in vars(picture.truth).values():
                content.update(values.tobytes())
        objects = sum(int((~picture.truth.crowds).sum()) for picture in self.pictures)
        return f"{len(self)} pictures, {objects} objects, {content.hexdigest()[:12]}"

    def read(self, index: int) -> Pixels:
        """Read an upright RGB picture. InvalidDataSet: it cannot be read, or its size is not the annotated one."""
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
    """Copy the data set with every object an OBJECT."""
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
    """Return the file's path; symbolic links may lead out. InvalidDataSet: the path itself leaves the data set."""
    folder, file = annotation_file.parent.parent, image_folder / image.file_name
    if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
        raise InvalidDataSet(f"{annotation_file}: image {image.image_id}: {str(file)!r} is outside {folder}")
    return file
