"""The boxes of a data set: the rules that keep, clip or drop them, and checks of the whole file.

A box that exceeds its picture by less than a pixel is kept, because many tools count from 1, or round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from training.annotations.fields import Fields, InvalidDataSet

XyWh: TypeAlias = tuple[float, float, float, float]
"""(x, y, width, height), pixels of the picture."""
MARGIN = 1.0
"""Pixels by which a box must exceed its picture to be clipped."""
LOST_BY_ROUNDING = 0.01
"""Share by which a box's sides may change in float32; a box with a larger change has no area to learn."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The annotations of one picture, as training and evaluation use them, in the file's order."""

    boxes: NDArray[np.float64]
    """[annotations, 4] (x, y, width, height), pixels of the picture: the file's own numbers, unless clipped."""
    areas: NDArray[np.float64]
    """[annotations] square pixels: the file's areas, maybe of masks; they decide what is small, medium and large."""
    columns: NDArray[np.int64]
    """[annotations] class of each, as its index in the data set's labels."""
    crowds: NDArray[np.bool_]
    """[annotations] True for regions of objects that were not annotated singly; detections there do not count."""


@dataclass
class BoxCounts:
    """Numbers of a data set's boxes by kind."""

    boxes: int = 0
    clipped: int = 0
    """Boxes that exceeded their picture by a pixel or more, and were clipped."""
    outside: int = 0
    """Boxes wholly outside, which were dropped."""
    empty: int = 0
    """Boxes without area, which were dropped."""
    below_pixel: int = 0
    """Boxes with both sides below one pixel."""
    bad_areas: int = 0
    """Areas that no object of the picture can have; the box's area replaces them."""
    first_beyond: str = ""

    @property
    def dropped(self) -> int:
        return self.outside + self.empty

    @property
    def is_clean(self) -> bool:
        """True: AP equals that of pycocotools on the file itself."""
        return not (self.clipped or self.dropped or self.bad_areas)

    def refuse_nonsense(self, file: Path) -> None:
        """Raise InvalidDataSet if the boxes cannot be [x, y, width, height] in pixels."""
        beyond, with_area = self.clipped + self.outside, self.boxes - self.empty
        if beyond * 2 > self.boxes:
            raise InvalidDataSet(
                f"{file}: {beyond} of {self.boxes} boxes reach beyond their picture, the first is {self.first_beyond}; "
                "COCO's bbox is [x, y, width, height] (xywh), these look like [x1, y1, x2, y2] (xyxy)"
            )
        if with_area and self.below_pixel == with_area:
            raise InvalidDataSet(
                f"{file}: all {with_area} boxes are below one pixel; COCO's bbox is in pixels, these look like "
                "relative coordinates (0 to 1)"
            )

    def summary(self) -> str:
        """Describe the irregular boxes on one line; empty if there are none."""
        parts = {
            "reach beyond their picture, clipped": self.clipped,
            "lie outside their picture or have no area, dropped": self.dropped,
            "have an area that cannot be, replaced by the box's": self.bad_areas,
        }
        said = [f"{count} {text}" for text, count in parts.items() if count]
        said += [] if self.is_clean else ["so AP is not COCO's own of this file"]
        said += [f"{self.below_pixel} are below one pixel"] if self.below_pixel else []
        return f"of {self.boxes} boxes " + "; ".join(said) if said else ""


def read_truth(
    annotations: list[Fields], size: tuple[int, int], columns: Mapping[int, int], counts: BoxCounts
) -> Truth:
    """Read one picture's annotations, and add to `counts`. `size` is the picture's (height, width)."""
    boxes, areas, classes, crowds = [], [], [], []
    for annotation in annotations:
        class_id = annotation.whole("category_id")
        if class_id not in columns:
            raise annotation.refuse(f"category_id {class_id} is not among the categories")
        given, crowd, area = annotation.box("bbox"), annotation.flag("iscrowd"), annotation.number_or_none("area")
        box = _kept(given, size, annotation, counts)
        if box is not None:
            boxes.append(box)
            areas.append(_area(area, box, size, counts))
            classes.append(columns[class_id])
            crowds.append(crowd)
    return Truth(
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(areas, np.float64),
        np.array(classes, np.int64),
        np.array(crowds, np.bool_),
    )


def of_one_class(truth: Truth) -> Truth:
    return replace(truth, columns=np.zeros_like(truth.columns))


def _kept(box: XyWh, size: tuple[int, int], annotation: Fields, counts: BoxCounts) -> XyWh | None:
    """Return the box, maybe clipped; None: it is dropped."""
    (x, y, width, height), (rows, columns) = box, size
    counts.boxes += 1
    if width <= 0 or height <= 0:
        counts.empty += 1
        return None
    counts.below_pixel += (width < 1 and height < 1) or (x >= 0 and y >= 0 and x + width <= 1 and y + height <= 1)
    beyond = max(-x, -y, x + width - columns, y + height - rows)
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, columns), min(y + height, rows)
    is_outside = left >= right or top >= bottom
    if is_outside or beyond >= MARGIN:
        counts.first_beyond = counts.first_beyond or f"{annotation.name} with {list(box)}"
    if is_outside:
        counts.outside += 1
        return None
    used = box if beyond < MARGIN else (left, top, right - left, bottom - top)
    if _is_lost(used):
        counts.empty += 1
        return None
    counts.clipped += beyond >= MARGIN
    return used


def _is_lost(box: XyWh) -> bool:
    """Tell whether float32, in which networks compute, cannot represent the box's sides."""
    return any(
        abs(float(np.float32(low + side)) - float(np.float32(low)) - side) > LOST_BY_ROUNDING * side
        for low, side in ((box[0], box[2]), (box[1], box[3]))
        if side < 1
    )


def _area(area: float | None, box: XyWh, size: tuple[int, int], counts: BoxCounts) -> float:
    if area is None:
        return box[2] * box[3]
    if not 0 <= area <= (size[0] + 2 * MARGIN) * (size[1] + 2 * MARGIN):
        counts.bad_areas += 1
        return box[2] * box[3]
    return area
