"""Windows over a picture, and one answer out of theirs. The network of these tests finds rectangles of plain colour."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.metadata import ResizePolicy
from model.tiles import (
    MAX_TILE,
    MIN_TILE,
    Found,
    Tiling,
    Window,
    detect_in_tiles,
    merge,
    num_windows,
    smallest_tile,
    windows,
)
from model.types import Candidates, CanvasImage, Detections, Pixels

AS_IT_IS = ResizePolicy(shorter_side=100, longest_side=100, divisor=4)
"""A window of 100 is its own canvas."""
PLAIN = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}
SIZES = [(100, 100), (101, 100), (64, 3000), (640, 480), (130, 4096), (999, 1001)]
TILINGS = [Tiling(100, 0), Tiling(64, 0.9), Tiling(100, 0.2), Tiling(333, 0.5), Tiling(4096, 0.3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiling", TILINGS)
def test_windows_are_of_one_size_start_at_strides_and_cover_the_picture(size: tuple[int, int], tiling: Tiling) -> None:
    height, width = size
    cut = windows(height, width, tiling)
    assert len(cut) == num_windows(height, width, tiling)
    if max(size) <= tiling.size:
        assert not cut
        return
    seen = np.zeros(size, bool)
    for window in cut:
        assert (window.right - window.left, window.bottom - window.top) == (
            min(width, tiling.size),
            min(height, tiling.size),
        )
        assert window.left % round(tiling.size * (1 - tiling.overlap)) == 0 or window.right == width
        assert window.top % round(tiling.size * (1 - tiling.overlap)) == 0 or window.bottom == height
        seen[window.top : window.bottom, window.left : window.right] = True
    assert seen.all()
    assert len({(window.left, window.top) for window in cut}) == len(cut)


def test_the_last_window_is_moved_back_to_the_edge() -> None:
    assert [window.left for window in windows(80, 250, Tiling(100, 0.2))] == [0, 80, 150]


@pytest.mark.parametrize(("height", "width", "most"), [(1000, 900, 7), (5000, 5000, 256), (300, 300, 0), (64, 9000, 3)])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.9])
def test_the_smallest_tile_that_fits_is_the_first_of_all(height: int, width: int, most: int, overlap: float) -> None:
    fitting = (
        tile for tile in range(MIN_TILE, MAX_TILE + 1) if num_windows(height, width, Tiling(tile, overlap)) <= most
    )
    assert smallest_tile(height, width, overlap, most) == next(fitting, None)


@pytest.mark.parametrize(
    ("tile", "overlap"), [(63, 0.2), (4097, 0.2), (64, -0.1), (64, 0.91), (64, float("nan")), (None, 0)]
)
def test_tiles_that_cannot_be_are_refused(tile: int | None, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"tile"):
        Tiling.asked_for(tile, overlap)


def test_an_overlap_of_a_fifth_is_the_default_and_no_tile_is_none() -> None:
    assert Tiling.asked_for(100, None) == Tiling(100, 0.2)
    assert Tiling.asked_for(None, None) is None


def rectangles(canvases: Sequence[CanvasImage]) -> list[Candidates]:
    """A candidate for each rectangle of a plain grey: its grey is its label, and small ones score more than large."""
    return [_rectangles(canvas) for canvas in canvases]


def _rectangles(canvas: CanvasImage) -> Candidates:
    """None of a canvas that was shrunk: the whole picture's."""
    boxes, labels = [], []
    grey = canvas.pixels[..., 0] * (canvas.size == canvas.original_size)
    for label in np.unique(grey[grey > 0]):
        count, _, stats, _ = cv2.connectedComponentsWithStats((grey == label).astype(np.uint8))
        for left, top, wide, high, _ in stats[1:count]:
            boxes.append((left, top, left + wide, top + high))
            labels.append(label)
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    areas = np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1)
    return Candidates(xyxy, (0.9 - areas / 1e5).astype(np.float32), np.array(labels, np.int64))


def drawn(height: int, width: int, *boxes: tuple[int, int, int, int], label: int = 7) -> Pixels:
    image = np.zeros((height, width, 3), np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = label
    return image


def found_in(image: Pixels, tiling: Tiling, batch_size: int = 1) -> Detections:
    return detect_in_tiles(image, tiling, AS_IT_IS, rectangles, **PLAIN, batch_size=batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("box", [(85, 30, 98, 60), (70, 30, 99, 44), (60, 70, 119, 130), (0, 90, 30, 110)])
def test_an_object_at_the_windows_edges_is_found_once(box: tuple[int, int, int, int]) -> None:
    """Whole in at least one window; other windows cut it, and score their halves higher."""
    found = found_in(drawn(260, 260, box), Tiling(100, 0.6))
    np.testing.assert_allclose(found.boxes, [box], atol=1.5)


def test_neighbours_of_one_class_are_not_merged() -> None:
    boxes = [(20, 20, 50, 60), (55, 20, 95, 60), (110, 22, 140, 60)]
    found = found_in(drawn(200, 200, *boxes), Tiling(100, 0.4))
    assert sorted(found.boxes[:, 0].round().tolist()) == pytest.approx([20, 55, 110], abs=1.5)


def test_batches_of_windows_answer_as_single_ones() -> None:
    image = drawn(260, 300, (10, 10, 40, 40), (120, 30, 200, 90), (230, 200, 290, 240))
    alone, batched = found_in(image, Tiling(100, 0.3)), found_in(image, Tiling(100, 0.3), batch_size=4)
    np.testing.assert_array_equal(alone.boxes, batched.boxes)


def found(
    boxes: list[list[float]], scores: list[float], window: Window, picture: tuple[int, int] = (100, 300)
) -> Found:
    """Boxes of picture pixels, as a window of that size would show them at scale 1; label 1."""
    size = window.bottom - window.top, window.right - window.left
    inside = np.array(boxes, np.float32) - np.array([window.left, window.top] * 2, np.float32)
    candidates = Candidates(inside, np.array(scores, np.float32), np.ones(len(boxes), np.int64))
    canvas = CanvasImage(np.zeros((*size, 3), np.uint8), size, size)
    return Found.of(candidates, canvas, window, picture, score_threshold=0.05, nms_threshold=0.5)


LEFT, RIGHT = Window(0, 0, 100, 100), Window(80, 0, 180, 100)


def merged(*each: Found) -> NDArray[np.float32]:
    return merge(each, nms_threshold=0.5, max_detections=100).boxes


def test_a_cut_half_goes_however_high_it_scores() -> None:
    half, whole = found([[60, 10, 100, 50]], [0.99], LEFT), found([[60, 10, 140, 50]], [0.2], Window(0, 0, 300, 100))
    np.testing.assert_array_equal(merged(half, whole), [[60, 10, 140, 50]])


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        ([60, 31, 140, 71], "less than 0.8 of the half lies in it"),
        ([60, 10, 100, 50.0], "it does not cross the edge"),
    ],
)
def test_a_cut_half_stays_where_no_box_shows_the_whole(whole: list[float], reason: str) -> None:
    half, other = found([[60, 10, 100, 50]], [0.9], LEFT), found([whole], [0.95], Window(0, 0, 300, 100))
    boxes = merged(half, other).tolist()
    assert [60, 10, 100, 50] in boxes, reason


def test_the_pictures_own_edge_cuts_nothing() -> None:
    at_edge = found([[0, 10, 30, 50]], [0.5], LEFT)
    assert np.isnan(at_edge.edges).all()
    inner = found([[170, 10, 179.5, 50], [79, 10, 85, 50], [110, 98, 120, 100]], [0.5, 0.4, 0.3], RIGHT)
    np.testing.assert_array_equal(inner.edges[:, [0, 2]], [[np.nan, 180], [80, np.nan], [np.nan, np.nan]])
    assert np.isnan(inner.edges[:, [1, 3]]).all()


def test_another_class_does_not_make_a_half_go() -> None:
    half = found([[60, 10, 100, 50]], [0.9], LEFT)
    whole = found([[60, 10, 140, 50]], [0.5], Window(0, 0, 300, 100))
    other = Found(Detections(whole.detections.boxes, whole.detections.scores, whole.detections.labels + 1), whole.edges)
    assert len(merged(half, other)) == 2


def test_labels_are_chosen_and_the_best_kept_last() -> None:
    window = Window(0, 0, 300, 100)
    one = found([[10, 10, 30, 30], [50, 10, 80, 30], [100, 10, 130, 30]], [0.5, 0.9, 0.7], window)
    two = Found(Detections(one.detections.boxes, one.detections.scores, np.array([2, 1, 1])), one.edges)
    kept = merge([two], nms_threshold=0.5, max_detections=1, label_ids=[1])
    assert kept.scores.tolist() == pytest.approx([0.7])
    kept = merge([two], nms_threshold=0.5, max_detections=2)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.7])
