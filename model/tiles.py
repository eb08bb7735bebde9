"""A large picture as windows, and the merging of the windows' detections. Needs numpy alone.

picture size, Tiling --windows--> Window … --the picture's pixels--> canvas → Candidates --Found.of--> Found
      --merge--> Detections (original pixels)

The whole picture is a window too, which finds objects that are larger than a tile. This is sliced inference (Akyon et
al. 2022, SAHI), with one difference: a part of an object, cut off by a window's edge, never suppresses the whole. Known
limit: an object that is larger than the overlap and that the whole picture misses comes out in pieces.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import NDArray

from model.image import to_canvas, to_original
from model.metadata import ResizePolicy
from model.suppress import suppress
from model.types import Candidates, CanvasImage, Detections, Pixels

MIN_TILE, MAX_TILE, MAX_OVERLAP = 64, 4096, 0.9
OVERLAP = 0.2
"""Overlap of a request that gives a tile alone."""
TOUCHES_PX = 1
"""Largest distance, in canvas pixels, from a window's edge at which a box counts as cut by it."""
COVERED = 0.8
"""Least share of a cut box's area in another box for that box to be the whole object's."""
MAX_MERGED = 20_000
"""Most boxes of all windows that are merged, the best; bounds the time of one picture."""
MAX_PAIRS = 4_000_000
"""Most pairs of boxes that are compared at once."""


@dataclass(frozen=True)
class Tiling:
    size: int
    """Side of a window, picture pixels; `MIN_TILE` to `MAX_TILE`."""
    overlap: float = OVERLAP
    """Share of a window that its neighbour has too; 0 to `MAX_OVERLAP`."""

    def __post_init__(self) -> None:
        """Check the values. ValueError: they are out of range."""
        if not MIN_TILE <= self.size <= MAX_TILE:
            raise ValueError(f"a tile has {MIN_TILE} to {MAX_TILE} pixels, not {self.size}")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"tiles overlap by 0 to {MAX_OVERLAP} of themselves, not {self.overlap}")

    @classmethod
    def asked_for(cls, tile: int | None, overlap: float | None) -> Self | None:
        """Read the two options. ValueError: an overlap without tiles, or a value out of range."""
        if tile is None:
            if overlap is not None:
                raise ValueError("an overlap needs a tile")
            return None
        return cls(tile, OVERLAP if overlap is None else overlap)

    @property
    def stride(self) -> int:
        return round(self.size * (1 - self.overlap))


@dataclass(frozen=True)
class Window:
    """A rectangle of the picture, in its pixels: columns `left` to `right`, rows `top` to `bottom`, ends excluded."""

    left: int
    top: int
    right: int
    bottom: int

    def cut(self, image: Pixels) -> Pixels:
        """Return the window's pixels, a view."""
        return image[self.top : self.bottom, self.left : self.right]


def whole(height: int, width: int) -> Window:
    return Window(0, 0, width, height)


def windows(height: int, width: int, tiling: Tiling) -> list[Window]:
    """Make the windows of a picture without the whole of it, row by row, all of one size; none if it fits into one.

    The last window of a row or column is moved back to the picture's edge. A side that is shorter than a window has one
    window of its own length.
    """
    if max(height, width) <= tiling.size:
        return []
    rows, columns = _starts(height, tiling), _starts(width, tiling)
    tall, wide = min(height, tiling.size), min(width, tiling.size)
    return [Window(left, top, left + wide, top + tall) for top, left in product(rows, columns)]


def num_windows(height: int, width: int, tiling: Tiling) -> int:
    """Count the windows that `windows` would make."""
    if max(height, width) <= tiling.size:
        return 0
    return _num_starts(height, tiling) * _num_starts(width, tiling)


def smallest_tile(height: int, width: int, overlap: float, max_windows: int) -> int | None:
    """Return the smallest tile that cuts the picture into at most so many windows; None: not even the largest does."""
    low, high = MIN_TILE, MAX_TILE + 1
    while low < high:
        middle = (low + high) // 2
        if num_windows(height, width, Tiling(middle, overlap)) <= max_windows:
            high = middle
        else:
            low = middle + 1
    return low if low <= MAX_TILE else None


def _num_starts(side: int, tiling: Tiling) -> int:
    return 1 + -(-max(0, side - tiling.size) // tiling.stride)


def _starts(side: int, tiling: Tiling) -> list[int]:
    last = max(0, side - tiling.size)
    return [min(number * tiling.stride, last) for number in range(_num_starts(side, tiling))]


@dataclass(frozen=True, eq=False)
class Found:
    """The detections in one window, after threshold and NMS; boxes in pixels of the whole picture."""

    detections: Detections
    edges: NDArray[np.float32]
    """[detections, 4]: the window's left, top, right, bottom edge if it cuts that box; else NaN."""

    @classmethod
    def of(
        cls, candidates: Candidates, canvas: CanvasImage, window: Window, picture_size: tuple[int, int], *,
        score_threshold: float, nms_threshold: float,
    ) -> Self:  # fmt: skip
        """Make the detections of a window's candidates. `picture_size` is (height, width)."""
        kept = suppress(
            candidates,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=len(candidates.scores),
        )
        inside = to_original(kept, canvas)
        offset = np.array([window.left, window.top] * 2, np.float32)
        boxes = inside.boxes + offset
        return cls(Detections(boxes, inside.scores, inside.labels), _cutting_edges(boxes, canvas, window, picture_size))


def _cutting_edges(
    boxes: NDArray[np.float32], canvas: CanvasImage, window: Window, picture_size: tuple[int, int]
) -> NDArray[np.float32]:
    height, width = picture_size
    edges = np.array([window.left, window.top, window.right, window.bottom], np.float32)
    inner = edges != np.array([0, 0, width, height], np.float32)
    across, down = canvas.original_size[1] / canvas.size[1], canvas.original_size[0] / canvas.size[0]
    near = np.abs(boxes - edges) <= TOUCHES_PX * np.array([across, down] * 2, np.float32)
    return np.where(near & inner, edges, np.float32("nan"))


def together(found: Sequence[Found]) -> Found:
    """Join the detections of several windows: the best `MAX_MERGED`, best score first."""
    scores = np.concatenate([each.detections.scores for each in found])
    best = np.argsort(-scores, kind="stable")[:MAX_MERGED]
    boxes = np.concatenate([each.detections.boxes for each in found])[best]
    labels = np.concatenate([each.detections.labels for each in found])[best]
    edges = np.concatenate([each.edges for each in found])[best]
    return Found(Detections(boxes, scores[best], labels), edges)


def merge(
    found: Sequence[Found], *, nms_threshold: float, max_detections: int, label_ids: Collection[int] | None = None
) -> Detections:
    """Merge the detections of a picture's windows, best score first.

    A box that a window's edge cuts is dropped if most of it lies in a box of its class that crosses that edge uncut.
    One NMS per class follows.
    """
    every = together(found)
    boxes, scores, labels = every.detections.boxes, every.detections.scores, every.detections.labels
    left = ~_halves(boxes, labels, every.edges)
    return suppress(
        Candidates(boxes[left], scores[left], labels[left]),
        score_threshold=-1,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        label_ids=label_ids,
    )


def _halves(boxes: NDArray[np.float32], labels: NDArray[np.int64], edges: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return [boxes]: True where an edge cuts the box and its whole object is among the others."""
    halves = np.zeros(len(boxes), np.bool_)
    for side in range(4):
        start, end = side % 2, side % 2 + 2  # the axis that this edge is a point of
        cut = np.flatnonzero(~np.isnan(edges[:, side]))
        for position, label in {(edges[index, side], labels[index]) for index in cut}:
            parts = cut[(edges[cut, side] == position) & (labels[cut] == label)]
            uncut = ~((edges[:, start] == position) | (edges[:, end] == position))
            across = (labels == label) & (boxes[:, start] < position) & (boxes[:, end] > position) & uncut
            halves[parts] |= _lie_in(boxes[parts], boxes[across])
    return halves


def _lie_in(parts: NDArray[np.float32], wholes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return [parts]: True where most of the part's area lies in one of the wholes."""
    step = max(1, MAX_PAIRS // max(1, len(wholes)))
    return np.concatenate([_most_lies_in(parts[begin : begin + step], wholes) for begin in range(0, len(parts), step)])


def _most_lies_in(parts: NDArray[np.float32], wholes: NDArray[np.float32]) -> NDArray[np.bool_]:
    sides = np.minimum(parts[:, None, 2:], wholes[None, :, 2:]) - np.maximum(parts[:, None, :2], wholes[None, :, :2])
    shared = np.prod(np.clip(sides, 0, None), axis=2)
    area = np.prod(parts[:, 2:] - parts[:, :2], axis=1)
    most: NDArray[np.bool_] = (shared >= COVERED * area[:, None]).any(axis=1)
    return most


def detect_in_tiles(
    image: Pixels,
    tiling: Tiling,
    resize: ResizePolicy,
    run: Callable[[Sequence[CanvasImage]], list[Candidates]],
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    label_ids: Collection[int] | None = None,
    batch_size: int = 1,
) -> Detections:
    """Detect in one upright picture, in its pixels. `run` takes up to `batch_size` canvases of one size."""
    height, width, _ = image.shape
    found = []
    for batch in _batches(whole(height, width), windows(height, width, tiling), batch_size):
        canvases = [to_canvas(window.cut(image), resize) for window in batch]
        for candidates, canvas, window in zip(run(canvases), canvases, batch, strict=True):
            thresholds = {"score_threshold": score_threshold, "nms_threshold": nms_threshold}
            found.append(Found.of(candidates, canvas, window, (height, width), **thresholds))
    return merge(found, nms_threshold=nms_threshold, max_detections=max_detections, label_ids=label_ids)


def _batches(first: Window, others: Sequence[Window], batch_size: int) -> Iterator[Sequence[Window]]:
    """Yield the whole picture alone, since its canvas may differ; then the windows, which have one size."""
    yield [first]
    for start in range(0, len(others), batch_size):
        yield others[start : start + batch_size]
