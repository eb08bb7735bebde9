"""The meaning of scores: the threshold of the best F1, calibration, and the confusion of classes.

In:  detections of each class, and whether pycocotools matched them to an object at IoU 0.5, as for AP50; those in
     crowds are left out. Out: `OperatingPoint`s, `CalibrationBin`s, a confusion matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from training.coco import CocoDataSet

BINS = 10
"""Equal parts of the scores from 0 to 1."""
CONFUSED_IOU = 0.5
"""Least IoU of a detection with its object, of any class."""


@dataclass(frozen=True, eq=False)
class ScoredMatches:
    """The detections of one class in all pictures."""

    scores: NDArray[np.float64]
    found: NDArray[np.bool_]
    """True for each detection that finds an object which no better one found."""
    num_objects: int


@dataclass(frozen=True)
class OperatingPoint:
    """The result of keeping detections above a threshold."""

    threshold: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@dataclass(frozen=True)
class CalibrationBin:
    count: int
    mean_score: float
    precision: float
    """Share of the bin's detections that find an object; equals the mean score if scores are probabilities."""


def pooled(classes: Sequence[ScoredMatches]) -> ScoredMatches:
    """Join the detections of all classes; each object has the same weight."""
    return ScoredMatches(
        np.concatenate([np.zeros(0), *(each.scores for each in classes)]),
        np.concatenate([np.zeros(0, np.bool_), *(each.found for each in classes)]),
        sum(each.num_objects for each in classes),
    )


def best_f1(matches: ScoredMatches) -> OperatingPoint | None:
    """Find the threshold of the highest F1, midway between two scores; None: no threshold finds an object."""
    order = np.argsort(-matches.scores, kind="stable")
    scores, found = matches.scores[order], matches.found[order].cumsum()
    kept = np.arange(1, len(scores) + 1)
    f1 = 2 * found / np.maximum(kept + matches.num_objects, 1)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores are kept or dropped together
    if not len(f1) or not f1.max():
        return None
    last = int(f1.argmax())
    below = scores[last + 1] if last + 1 < len(scores) else 0.0
    precision, recall = found[last] / kept[last], found[last] / matches.num_objects
    return OperatingPoint(float((scores[last] + below) / 2), float(precision), float(recall))


def calibration(matches: ScoredMatches) -> tuple[CalibrationBin, ...]:
    """Put detections into BINS by score; empty bins are left out."""
    bins = np.minimum((matches.scores * BINS).astype(int), BINS - 1)
    chosen = [bins == index for index in range(BINS)]
    return tuple(
        CalibrationBin(int(each.sum()), float(matches.scores[each].mean()), float(matches.found[each].mean()))
        for each in chosen
        if each.any()
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Average |mean score - precision| over the detections (Guo et al. 2017); NaN of none."""
    count = sum(each.count for each in bins)
    error = sum(each.count * abs(each.mean_score - each.precision) for each in bins)
    return error / count if count else float("nan")


def confusion(
    data_set: CocoDataSet, results: Sequence[Mapping[str, Any]], image_ids: Sequence[int], threshold: float
) -> NDArray[np.int64]:
    """Count [classes + 1, classes + 1]: true classes by found classes; the last of each is the background.

    Detections above `threshold`, best first, take the free object of any class that they overlap most, at CONFUSED_IOU
    or more. Those that only lie in a crowd, or have a class that the data set lacks, are left out.
    """
    columns = {label.class_id: column for column, label in enumerate(data_set.labels)}
    kept: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in image_ids}
    for result in sorted(results, key=lambda result: -result["score"]):
        if result["score"] > threshold and result["category_id"] in columns:
            kept[result["image_id"]].append(result)
    counts = np.zeros((len(columns) + 1, len(columns) + 1), np.int64)
    for picture in data_set.pictures:
        if picture.image_id in kept:
            found = kept[picture.image_id]
            pairs = _pairs(picture.truth.boxes, picture.truth.crowds, [result["bbox"] for result in found])
            for truth, index in pairs:
                row = -1 if truth is None else picture.truth.columns[truth]
                counts[row, -1 if index is None else columns[found[index]["category_id"]]] += 1
    return counts


def _pairs(
    boxes: NDArray[np.float64], crowds: NDArray[np.bool_], found: Sequence[Sequence[float]]
) -> Iterator[tuple[int | None, int | None]]:
    """Yield each (object, detection) of one picture; None is the background."""
    free = ~crowds
    iou = mask.iou(np.array(found), boxes, crowds.astype(int).tolist()) if found and len(boxes) else None
    for index in range(len(found)):
        overlaps = np.zeros(0) if iou is None else np.where(free, iou[index], 0)
        if len(overlaps) and overlaps.max() >= CONFUSED_IOU:
            best = int(overlaps.argmax())
            free[best] = False
            yield best, index
        elif iou is None or not (iou[index][crowds] >= CONFUSED_IOU).any():
            yield None, index
    for missed in np.flatnonzero(free):
        yield int(missed), None
