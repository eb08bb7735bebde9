import math

import numpy as np
import pytest

from training.demo import shapes

PICTURE = (80, 100)
"""(height, width)."""


def placed(label: str, angle: float, centre: tuple[float, float] = (50, 40)) -> shapes.Shape:
    return shapes.place(shapes.SHAPES[label], size=50, aspect=1.25, angle=angle, centre=centre)


@pytest.mark.parametrize("label", shapes.SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.4, 2.5])
def test_the_longer_side_of_a_placed_shapes_box_is_its_size_and_the_centre_is_kept(label: str, angle: float) -> None:
    xmin, ymin, xmax, ymax = shapes.box(placed(label, angle))
    assert max(xmax - xmin, ymax - ymin) == pytest.approx(50)
    assert ((xmin + xmax) / 2, (ymin + ymax) / 2) == pytest.approx((50, 40))


@pytest.mark.parametrize("label", shapes.SHAPES)
@pytest.mark.parametrize("centre", [(50, 40), (12, 40), (50, 70), (92, 9)])
def test_box_and_area_of_a_clipped_shape_are_those_of_the_pixels_it_covers(
    label: str, centre: tuple[float, float]
) -> None:
    height, width = PICTURE
    shape = placed(label, angle=0.7, centre=centre)
    clipped = shapes.clip(shape, width, height)
    enlarged = tuple(contour * 8 for contour in shape)
    covered = shapes.coverage(enlarged, (0, 0, width * 8, height * 8))
    rows, columns = np.flatnonzero(covered.max(axis=1)), np.flatnonzero(covered.max(axis=0))
    covered_box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 8
    assert shapes.box(clipped) == pytest.approx(covered_box, abs=0.2)
    assert shapes.area(clipped) == pytest.approx(covered.sum() / 8**2, rel=0.01)


def test_areas_are_those_of_the_textbook() -> None:
    def area(label: str) -> float:
        return shapes.area(shapes.place(shapes.SHAPES[label], size=200, aspect=1, angle=0, centre=(0, 0)))

    assert area("circle") == pytest.approx(math.pi * 100**2, rel=2e-3)
    assert area("ring") == pytest.approx(math.pi * (100**2 - 58**2), rel=2e-3)
    assert area("square") == pytest.approx(200**2)
    assert area("triangle") == pytest.approx(200**2 * math.sqrt(3) / 4)
    assert area("cross") == pytest.approx(200 * 64 * 2 - 64**2)


def test_coverage_is_the_share_of_each_pixel_and_the_same_on_every_side() -> None:
    square = shapes.place(shapes.SHAPES["square"], size=3.1, aspect=1, angle=0, centre=(4, 4))
    covered = shapes.coverage(square, (2, 2, 6, 6))
    assert covered[1:3, 1:3] == pytest.approx(1)
    assert covered[0, 1:3] == pytest.approx(0.55, abs=0.13)
    assert covered[0, 0] == pytest.approx(0.55**2, abs=0.13)
    assert np.array_equal(covered, covered[::-1, ::-1])


def test_nothing_is_left_of_a_shape_outside_the_picture() -> None:
    assert shapes.clip(placed("star", angle=0, centre=(-40, 40)), 100, 80) == ()


def test_every_shape_turned_any_way_differs_from_the_others_at_the_smallest_size() -> None:
    def masks(label: str) -> list[np.ndarray]:
        turned = [
            shapes.place(shapes.SHAPES[label], size=9.6, aspect=1, angle=angle, centre=(6, 6))
            for angle in np.linspace(0, 2 * math.pi, 24)
        ]
        return [shapes.coverage(shape, (0, 0, 12, 12)) for shape in turned]

    def overlap(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())

    for label in shapes.SHAPES:
        upright = masks(label)[0]
        for other in set(shapes.SHAPES) - {label}:
            assert max(overlap(upright, mask) for mask in masks(other)) < 0.9, (label, other)
