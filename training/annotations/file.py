"""Reading of an annotation file into labels, images and their truth. An unusable file is refused with file, id, reason.

Ids may have gaps and may be numbers as text; those of annotations have no effect. pycocotools never reads the file:
evaluation counts the boxes that are read here.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.metadata import InvalidModel, Label, check_labels
from training.annotations.boxes import BoxCounts, Truth, read_truth
from training.annotations.fields import Fields, InvalidDataSet, shown

log = logging.getLogger(__name__)
LISTS = {"image": "images", "annotation": "annotations", "category": "categories"}
"""COCO's lists, by the name of one entry."""


@dataclass(frozen=True)
class AnnotatedImage:
    image_id: int
    file_name: str
    size: tuple[int, int]
    """Size (height, width), pixels."""
    truth: Truth


@dataclass(frozen=True)
class Annotations:
    """The content of a file."""

    labels: tuple[Label, ...]
    """Labels in the order of class ids."""
    images: Sequence[AnnotatedImage]
    """Images in the order of image ids."""
    counts: BoxCounts


def read_annotations(file: Path) -> Annotations:
    """Read a file. InvalidDataSet: it is not COCO JSON, or no run can use it. Irregularities are logged on one line."""
    content = _content(file)
    images, categories = (_by_id(content[kind]) for kind in ("image", "category"))
    if not images or not categories:
        raise InvalidDataSet(f"{file} has {len(categories)} categories and {len(images)} images")
    by_image: dict[int, list[Fields]] = defaultdict(list)
    for annotation in content["annotation"]:
        by_image[annotation.whole("image_id")].append(annotation)
    for image_id, (first, *_) in by_image.items():
        if image_id not in images:
            raise first.refuse(f"image_id {image_id} is not among the images")
    used = {annotation.whole("category_id") for annotation in content["annotation"]}
    labels, counts = _labels(file, categories, used), BoxCounts()
    columns = {label.class_id: column for column, label in enumerate(labels)}
    read = [_image(image_id, images[image_id], by_image[image_id], columns, counts) for image_id in sorted(images)]
    counts.refuse_nonsense(file)
    if said := counts.summary():
        log.warning("%s: %s", file, said)
    return Annotations(labels, read, counts)


def _content(file: Path) -> dict[str, list[Fields]]:
    """Return the entries of each kind."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidDataSet(f"{file} is not COCO JSON: {error}") from error
    entries = {}
    for kind, name in LISTS.items():
        listed = content.get(name) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise InvalidDataSet(f"{file} is not COCO JSON: it has no list of {name}")
        entries[kind] = [Fields(file, kind, index, entry) for index, entry in enumerate(listed)]
    return entries


def _by_id(entries: Iterable[Fields]) -> dict[int, Fields]:
    """Index the entries by id. InvalidDataSet: an id is repeated."""
    by_id: dict[int, Fields] = {}
    for entry in entries:
        if by_id.setdefault(number := entry.whole("id"), entry) is not entry:
            raise entry.refuse(f"another one has the id {number}; files that are merged need new ids")
    return by_id


def _image(
    image_id: int, fields: Fields, annotations: list[Fields], columns: Mapping[int, int], counts: BoxCounts
) -> AnnotatedImage:
    size, name = (fields.whole("height"), fields.whole("width")), fields.text("file_name")
    if min(size) < 1:
        raise fields.refuse(f"width {size[1]}, height {size[0]}: both have to be 1 or more")
    if not is_storable(name):
        raise fields.refuse(f"file_name is {shown(name)}, which no file can have")
    return AnnotatedImage(image_id, name, size, read_truth(annotations, size, columns, counts))


def is_storable(name: str) -> bool:
    """Tell whether a file can have this name: without NUL and half surrogate pairs."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _labels(file: Path, categories: Mapping[int, Fields], used: Set[int]) -> tuple[Label, ...]:
    """Make a label for each category, by id, without parent categories that have no annotations."""
    labels = [Label(class_id, categories[class_id].text("name")) for class_id in sorted(categories)]
    unused = [label for label in labels if label.class_id not in used]
    dropped = _parents(
        labels, unused, {label.class_id: categories[label.class_id].get("supercategory") for label in labels}
    )
    if dropped:
        names = ", ".join(f"{label.class_id} {label.label!r}" for label in dropped)
        log.warning("%s: dropped categories that no object has and that only group others: %s", file, names)
    kept = tuple(label for label in labels if label not in dropped)
    try:
        check_labels(kept)
    except InvalidModel as error:
        raise InvalidDataSet(f"{file}: {error}") from error
    return kept


def _parents(labels: Sequence[Label], unused: Sequence[Label], above: Mapping[int, Any]) -> list[Label]:
    """Return the unused categories that are parents of another, or have another's name.

    above  each category's supercategory
    """
    parents = [
        label
        for label in unused
        if any(name == label.label and child != label.class_id for child, name in above.items())
    ]
    rest = [label for label in labels if label not in parents]
    holders = {label.label: label for label in sorted(rest, key=lambda label: label not in unused)}
    return parents + [label for label in rest if label in unused and holders[label.label] is not label]
