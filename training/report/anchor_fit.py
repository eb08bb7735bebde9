"""The fit of anchors to a data set's objects, before a training begins.

In:  the boxes of a COCO-format data set (no pictures are read), the resize of evaluation and service, the anchors.
Out: `AnchorFit`: every object's best IoU with an anchor of the real grids, the levels of positive anchors, and other
sizes and ratios if they reach more objects.

A level's anchors of one shape lie on a lattice, and the IoU of two boxes of given sizes falls with the distance of
their centres along either axis. So the nearest anchor is the best one, and an object needs one IoU for each shape (45)
instead of one for each anchor (200,000). The result is exact; a million objects take seconds.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from model.anchors import AnchorConfig, Anchors, cell_anchors
from model.image import padded_size, resized_size
from model.metadata import ResizePolicy
from training.coco import CocoDataSet, Picture
from training.config import LossConfig
from training.loss.matcher import match
from training.transforms import TensorTarget

Floats = NDArray[np.float32]
SIDES = (0, 16, 32, 64, 128, 256, 512, np.inf)
"""Edges of the size classes, canvas pixels; an object's side is the square root of its area."""
MATCHED_PICTURES = 64
"""Pictures in which the matcher counts positive anchors."""
SEARCHED_OBJECTS = 4000
"""Objects on which a better configuration is searched."""
FEWEST_OBJECTS = 100
"""Fewest objects for a suggestion; with fewer it would fit only them."""
SIZE_FACTORS = tuple(2 ** (step / 4) for step in range(-10, 11))
"""Factors on the base sizes that are tried."""
SIMILAR = 0.005
"""Least share of the objects that one more aspect ratio must reach, because it costs computing in every cell."""
WORTHWHILE = 0.02
"""Least additional share of the objects that a suggestion reaches."""


@dataclass(frozen=True, eq=False)
class CanvasObjects:
    """Objects in the frame of their canvas, pixels."""

    centres: Floats
    """[objects, 2] (y, x)"""
    sizes: Floats
    """[objects, 2] (height, width)"""
    canvases: NDArray[np.int64]
    """[objects, 2] (height, width) of each object's canvas."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def sides(self) -> Floats:
        sides: Floats = np.sqrt(self.sizes.prod(axis=1))
        return sides

    def sample(self, count: int) -> "CanvasObjects":
        """Return at most `count` of the objects, always the same ones."""
        drawn = np.random.default_rng(0).permutation(len(self))[:count]
        return CanvasObjects(self.centres[drawn], self.sizes[drawn], self.canvases[drawn])


@dataclass(frozen=True, eq=False)
class BestAnchors:
    iou: Floats
    """[objects]"""
    level: NDArray[np.int64]
    """[objects] the pyramid level of the anchor."""


@dataclass(frozen=True)
class Suggestion:
    anchors: AnchorConfig
    recall: float
    """Share of the objects with a good anchor, as `AnchorFit.recall`."""

    @property
    def flags(self) -> str:
        sizes = " ".join(f"{size:g}" for size in self.anchors.base_sizes)
        ratios = " ".join(f"{ratio:g}" for ratio in self.anchors.aspect_ratios)
        return f"--base-sizes {sizes} --aspect-ratios {ratios}"


@dataclass(frozen=True, eq=False)
class AnchorFit:
    anchors: AnchorConfig
    threshold: float
    """Least IoU of an anchor with its object."""
    sides: Floats
    """[objects] canvas pixels"""
    best: BestAnchors
    positives: tuple[float, ...]
    """Positive anchors of each level in a picture that has objects, on average."""
    suggestion: Suggestion | None

    @property
    def recall(self) -> float:
        """Share of the objects with an anchor at the threshold or above; the others keep only their best anchor."""
        return share(self.best.iou >= self.threshold)

    def by_side(self) -> Iterator[tuple[str, int, float, float]]:
        """Return each size class's name, number of objects, recall and mean best IoU."""
        for low, high in itertools.pairwise(SIDES):
            iou = self.best.iou[(self.sides >= low) & (self.sides < high)]
            name = f"{low:g} to {high:g} px" if high < np.inf else f"from {low:g} px"
            if len(iou):
                yield name, len(iou), share(iou >= self.threshold), float(iou.mean())

    def by_level(self) -> Iterator[tuple[str, float, float]]:
        """Return each level's name, share of the objects whose best anchor it has, and positive anchors a picture."""
        for level, positives in zip(self.anchors.levels, self.positives, strict=True):
            yield f"P{level}", share(self.best.level == level), positives

    def summary(self) -> str:
        text = (
            f"{self.recall:.1%} of {len(self.sides):,} objects have an anchor at IoU {self.threshold:g} or more; "
            f"the others have only their best one, by the low-quality rule"
        )
        if self.suggestion is None:
            return f"{text}. No other sizes and ratios reach {WORTHWHILE:.0%} more"
        return f"{text}. {self.suggestion.recall:.1%} would, with {self.suggestion.flags}"

    def table(self) -> str:
        lines = [self.summary(), "", f"{'side on the canvas':<20}{'objects':>10}{'recall':>9}{'mean best IoU':>15}"]
        lines += [f"{name:<20}{count:>10,}{recall:>9.1%}{iou:>15.2f}" for name, count, recall, iou in self.by_side()]
        lines += ["", f"{'level':<8}{'best anchor there':>18}{'positive anchors a picture':>28}"]
        lines += [f"{name:<8}{part:>18.1%}{positives:>28.1f}" for name, part, positives in self.by_level()]
        return "\n".join(lines)


def fit_anchors(data_set: CocoDataSet, resize: ResizePolicy, anchors: AnchorConfig, loss: LossConfig) -> AnchorFit:
    """Measure how the anchors fit the data set's objects at the scale of evaluation and service."""
    objects = canvas_objects(data_set.pictures, resize)
    best, threshold = best_anchors(objects, anchors), loss.fg_iou_threshold
    return AnchorFit(
        anchors,
        threshold,
        objects.sides,
        best,
        positives_by_level(data_set.pictures, resize, anchors, loss),
        suggest(objects, anchors, threshold, share(best.iou >= threshold)),
    )


def canvas_objects(pictures: Sequence[Picture], resize: ResizePolicy) -> CanvasObjects:
    """Return the objects of all pictures, resized and padded as for evaluation, without crowds."""
    each = [picture.target.on_canvas(picture.size, resize).boxes for picture in pictures]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *each])
    canvases = np.array([_canvas_size(picture, resize) for picture in pictures]).reshape(-1, 2)
    low, high = boxes[:, 1::-1], boxes[:, :1:-1]  # (y, x)
    return CanvasObjects((low + high) / 2, high - low, np.repeat(canvases, [len(boxes) for boxes in each], axis=0))


def best_anchors(objects: CanvasObjects, config: AnchorConfig) -> BestAnchors:
    """Find each object's best anchor of all levels and cells."""
    best = BestAnchors(np.full(len(objects), -1, np.float32), np.zeros(len(objects), np.int64))
    for level, base_size in zip(config.levels, config.base_sizes, strict=True):
        offsets = _centre_offsets(objects, level, config)
        for height, width in _shapes(base_size, config.scales, config.aspect_ratios):
            iou = _centred_iou(objects.sizes, np.array([height, width], np.float32), offsets)
            better = iou > best.iou
            best.iou[better], best.level[better] = iou[better], level
    return best


def positives_by_level(
    pictures: Sequence[Picture], resize: ResizePolicy, config: AnchorConfig, loss: LossConfig
) -> tuple[float, ...]:
    """Count the positive anchors of each level in a picture with objects, by the matcher: the mean over a sample."""
    with_objects = [picture for picture in pictures if len(picture.target.boxes)]
    count = min(MATCHED_PICTURES, len(with_objects))
    chosen = [with_objects[index] for index in np.linspace(0, len(with_objects) - 1, count).astype(int)]
    anchors_of = cache(Anchors(config))
    positives: list[list[int]] = []
    for picture in chosen:
        canvas = _canvas_size(picture, resize)
        levels = anchors_of(canvas, config.grids(canvas))
        lengths = [len(level) for level in levels]
        target = TensorTarget.of(picture.target.on_canvas(picture.size, resize))
        matches = match(
            torch.cat(levels),
            target.boxes,
            target.ignored,
            fg_iou_threshold=loss.fg_iou_threshold,
            bg_iou_threshold=loss.bg_iou_threshold,
        )
        positives.append([int((part >= 0).sum()) for part in torch.split(matches, lengths)])
    return tuple(np.mean(positives, axis=0).tolist()) if positives else (0.0,) * len(config.levels)


def suggest(objects: CanvasObjects, config: AnchorConfig, threshold: float, present_recall: float) -> Suggestion | None:
    """Search for sizes and ratios with which clearly more objects have an anchor; None: there are none, or too few
    objects to tell.

    Candidates are multiples of the present sizes, with the present ratios or with clusters of the objects' own (k-means
    of their logarithms), of at most the present number. Among nearly equal recalls the fewest ratios win, then the
    higher recall and mean IoU.
    """
    if len(objects) < FEWEST_OBJECTS:
        return None
    sample = objects.sample(SEARCHED_OBJECTS)
    tried = []
    counts = range(1, len(config.aspect_ratios) + 1)
    for ratios in dict.fromkeys([config.aspect_ratios, *(typical_ratios(sample, count) for count in counts)]):
        for factor in SIZE_FACTORS:
            sizes = tuple(float(round(size * factor)) for size in config.base_sizes)
            if sizes[0] >= 2 ** (config.lowest_level - 1):  # smaller ones leave gaps between cells
                tried.append(replace(config, base_sizes=sizes, aspect_ratios=ratios))

    def worth(candidate: AnchorConfig) -> tuple[float, float]:
        iou = best_anchors(sample, candidate).iou
        return share(iou >= threshold), float(iou.mean())

    worths = {candidate: worth(candidate) for candidate in tried}
    highest = max((recall for recall, _ in worths.values()), default=0.0)
    near = [candidate for candidate, (recall, _) in worths.items() if recall >= highest - SIMILAR]
    best = min(
        near, key=lambda candidate: (len(candidate.aspect_ratios), *np.negative(worths[candidate])), default=config
    )
    recall = share(best_anchors(objects, best).iou >= threshold)
    return Suggestion(best, recall) if recall - present_recall >= WORTHWHILE else None


def typical_ratios(objects: CanvasObjects, count: int) -> tuple[float, ...]:
    """Cluster the objects' ratios of height to width into at most `count` distinct ones: k-means of their logarithms,
    ascending."""
    logs = np.log(objects.sizes[:, 0] / objects.sizes[:, 1])
    centres = np.quantile(logs, (np.arange(count) + 0.5) / count)
    for _ in range(50):
        nearest = np.abs(logs[:, None] - centres).argmin(axis=1)
        members = [logs[nearest == index] for index in range(count)]
        centres = np.array(
            [group.mean() if len(group) else centre for group, centre in zip(members, centres, strict=True)]
        )
    return tuple(sorted({float(f"{ratio:.2g}") for ratio in np.exp(centres)}))


def share(chosen: NDArray[np.bool_]) -> float:
    """Compute the share of True; NaN without values."""
    return float(chosen.mean()) if len(chosen) else float("nan")


def _canvas_size(picture: Picture, resize: ResizePolicy) -> tuple[int, int]:
    return padded_size(*resized_size(*picture.size, resize), resize.divisor)


def _shapes(base_size: float, scales: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Return (height, width) of one cell's anchors."""
    cell = cell_anchors(base_size, scales, ratios)
    return [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in cell.tolist()]


def _centre_offsets(objects: CanvasObjects, level: int, config: AnchorConfig) -> Floats:
    """Compute [objects, 2], the distance (y, x) from each object's centre to the nearest cell's."""
    grids = -(-objects.canvases // 2**level)
    strides = objects.canvases // grids if config.stride == "torchvision" else np.full_like(grids, 2**level)
    cells = np.rint(objects.centres / strides).clip(0, grids - 1)
    offsets: Floats = np.abs(objects.centres - cells * strides).astype(np.float32)
    return offsets


def _centred_iou(sizes: Floats, anchor: Floats, offsets: Floats) -> Floats:
    """Compute [objects], the IoU of boxes of `sizes` [objects, 2] with an anchor of size [2] at distance `offsets`."""
    overlaps = np.minimum(np.minimum(sizes, anchor), (sizes + anchor) / 2 - offsets).clip(0)
    intersection = overlaps.prod(axis=1)
    iou: Floats = intersection / (sizes.prod(axis=1) + anchor.prod() - intersection)
    return iou
