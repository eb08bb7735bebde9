"""COCO's average precision (Lin et al. 2014), by pycocotools, the reference implementation itself.

In: a data set and results in COCO's format. Out: `ApReport`. The truth comes from the loaded data set, not from its
file, so evaluation uses the boxes of training. If no box was clipped or dropped, the figures equal pycocotools' on the
file.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.coco import CocoDataSet, Picture
from training.evaluation.scores import (
    CalibrationBin,
    OperatingPoint,
    ScoredMatches,
    best_f1,
    calibration,
    calibration_error,
    confusion,
    pooled,
)

log = logging.getLogger(__name__)
Results = list[dict[str, Any]]
"""Detections as `model.types.coco_results` makes them."""
COUNTED_DETECTIONS = [1, 10, 100, 1000]
"""Most detections of each picture and class that count: COCO's values, and 1,000 for proposals. AP uses 100."""


@dataclass(frozen=True)
class ApReport:
    """Averages over IoU 0.50 to 0.95, unless named otherwise; 0 to 1, or NaN if the data set has no such object."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    recall_100: float
    """Share of the objects that the best 100 detections of a picture find."""
    recall_1000: float
    recall_1000_by_size: tuple[float, float, float]
    """Recall of small, medium and large objects."""
    per_class: dict[str, float]
    num_images: int
    precision: np.ndarray[Any, Any] = field(repr=False, compare=False)
    """[10 IoUs, 101 recalls, classes, 4 areas (all, small, medium, large)] at 100 detections; -1 without such an
    object."""

    best: OperatingPoint | None = field(default=None, compare=False)
    """Threshold of the best F1 over all classes at IoU 0.5; None: nothing was found."""
    best_by_class: Sequence[OperatingPoint | None] = field(default=(), repr=False, compare=False)
    """The same for each class alone, in the order of `per_class`."""
    calibration: Sequence[CalibrationBin] = field(default=(), repr=False, compare=False)
    confusion: np.ndarray[Any, Any] | None = field(default=None, repr=False, compare=False)
    """int64 [classes + 1, classes + 1] at the best F1: true classes by found classes, the background last."""

    @property
    def known_ap(self) -> float | None:
        return None if math.isnan(self.ap) else self.ap

    @property
    def best_threshold(self) -> float | None:
        """Score threshold of the best F1."""
        return None if self.best is None else self.best.threshold

    def table(self) -> str:
        rows = [
            ("AP@[0.50:0.95]", self.ap),
            ("AP50", self.ap50),
            ("AP75", self.ap75),
            ("AP small (< 32² px)", self.ap_small),
            ("AP medium", self.ap_medium),
            ("AP large (> 96² px)", self.ap_large),
            ("recall at 100", self.recall_100),
            ("recall at 1000", self.recall_1000),
            *((f"AP {name}", value) for name, value in self.per_class.items()),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:.4f}" for name, value in rows]
        if self.best is not None:
            lines.append(
                f"{'best F1 at IoU 0.5':<{width}}  {self.best.f1:.4f}  at score > {self.best.threshold:.3f} "
                f"(precision {self.best.precision:.3f}, recall {self.best.recall:.3f})"
            )
        lines.append(f"{'calibration error':<{width}}  {calibration_error(self.calibration):.4f}")
        return "\n".join([*lines, f"{'pictures':<{width}}  {self.num_images}"])


def average_precision(data_set: CocoDataSet, results: Results, image_ids: Sequence[int]) -> ApReport:
    """Evaluate the results of the pictures with these ids. An empty list is a detector that found nothing: AP 0.

    In a class-agnostic data set the results' categories do not count: any box may find any object.
    """
    evaluation = _evaluated(data_set, results, image_ids)
    figures = [float(figure) if figure >= 0 else float("nan") for figure in evaluation.stats]
    precision = evaluation.eval["precision"][..., COUNTED_DETECTIONS.index(100)]
    names = [label.label for label in data_set.labels]
    per_class = {name: _mean(precision[:, :, column, 0]) for column, name in enumerate(names)}
    ap, ap50, ap75, small, medium, large, _, _, recall_100, *_ = figures
    of_any_size, *by_size = (_mean(evaluation.eval["recall"][:, :, size, -1]) for size in range(4))
    recalls = recall_100, of_any_size, (by_size[0], by_size[1], by_size[2])
    classes = scored_matches(evaluation)
    matches = pooled(classes)
    best = best_f1(matches)
    return ApReport(
        ap, ap50, ap75, small, medium, large, *recalls, per_class, len(image_ids), precision,
        best=best,
        best_by_class=[best_f1(each) for each in classes],
        calibration=calibration(matches),
        confusion=None if best is None else confusion(data_set, evaluation.results, image_ids, best.threshold),
    )  # fmt: skip


def scored_matches(evaluation: COCOeval) -> list[ScoredMatches]:
    """Take each class's detections, and their matches at IoU 0.5, out of a finished evaluation."""
    params = evaluation.params
    num_classes, num_areas, num_images = max(1, len(params.catIds)), len(params.areaRng), len(params.imgIds)
    matches = []
    for column in range(num_classes):
        start = column * num_areas * num_images  # the first area is of any size
        found = [picture for picture in evaluation.evalImgs[start : start + num_images] if picture is not None]
        counted = [~picture["dtIgnore"][0].astype(bool) for picture in found]
        scores = [np.array(picture["dtScores"])[keep] for picture, keep in zip(found, counted, strict=True)]
        hits = [picture["dtMatches"][0][keep] > 0 for picture, keep in zip(found, counted, strict=True)]
        objects = sum(int((~np.array(picture["gtIgnore"], bool)).sum()) for picture in found)
        matches.append(
            ScoredMatches(np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0, bool), *hits]), objects)
        )
    return matches


def warn_of_crowding(data_set: CocoDataSet) -> None:
    """Log the number of pictures with more objects of a class than detections that COCO's AP counts."""
    counted = COUNTED_DETECTIONS[-2]
    objects = (picture.truth.columns[~picture.truth.crowds] for picture in data_set.pictures)
    crowded = sum(len(columns) > counted and bool(np.bincount(columns).max() > counted) for columns in objects)
    if crowded:
        log.warning(
            "%s: %d pictures have more than %d objects of one class; COCO's AP counts the best %d detections of a "
            "class in a picture, so not even a perfect detector reaches 1",
            data_set.annotation_file, crowded, counted, counted,
        )  # fmt: skip


def coco_truth(data_set: CocoDataSet, image_ids: Sequence[int]) -> dict[str, Any]:
    """Make COCO's JSON of these pictures' truth, with crowds; annotation ids begin at 1, as pycocotools needs."""
    chosen = set(image_ids)
    pictures = [picture for picture in data_set.pictures if picture.image_id in chosen]
    annotations = [annotation for picture in pictures for annotation in _annotations(picture, data_set)]
    return {
        "info": {},
        "images": [{"id": p.image_id, "height": p.size[0], "width": p.size[1]} for p in pictures],
        "annotations": [annotation | {"id": index} for index, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": label.class_id, "name": label.label} for label in data_set.labels],
    }


def _annotations(picture: Picture, data_set: CocoDataSet) -> Iterator[dict[str, Any]]:
    truth = picture.truth
    columns = zip(truth.boxes.tolist(), truth.areas.tolist(), truth.columns, truth.crowds.tolist(), strict=True)
    for box, area, column, crowd in columns:
        class_id = data_set.labels[column].class_id
        yield {
            "image_id": picture.image_id, "category_id": class_id, "bbox": box, "area": area, "iscrowd": int(crowd),
        }  # fmt: skip


def _evaluated(data_set: CocoDataSet, results: Results, image_ids: Sequence[int]) -> COCOeval:
    if data_set.class_agnostic:  # pycocotools drops boxes of categories that it does not know, even where none counts
        results = [result | {"category_id": data_set.labels[0].class_id} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what we return
        truth = _indexed(coco_truth(data_set, image_ids))
        found = truth.loadRes(results) if results else _indexed(truth.dataset | {"annotations": []})
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.maxDets = COUNTED_DETECTIONS
        evaluation.params.useCats = int(not data_set.class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    evaluation.results = results
    return evaluation


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray[Any, Any]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")
