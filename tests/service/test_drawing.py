"""Boxes drawn where they are."""

import io

import numpy as np
import pytest
from PIL import Image

from model.types import Detections
from service.drawing import draw, encode_picture


def detections(*boxes: tuple[float, float, float, float]) -> Detections:
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(1, 0.5, count, dtype=np.float32),
        np.arange(count, dtype=np.int64),
    )


def grey(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def test_a_box_is_outlined_and_its_inside_and_outside_are_left_alone() -> None:
    drawn = np.asarray(draw(grey(400, 300), detections((100, 100, 300, 250)), {0: "circle"}))
    changed = (drawn != 128).any(axis=2)
    assert changed[100:251, 100].all() and changed[100:251, 300].all() and changed[250, 100:301].all()
    assert not changed[130:245, 110:295].any() and not changed[260:].any() and not changed[:, 310:].any()


def test_the_line_grows_with_the_picture() -> None:
    def line_width(side: int) -> int:
        drawn = np.asarray(draw(grey(side, side), detections((side / 4, side / 4, side * 3 / 4, side * 3 / 4)), {}))
        return int((drawn[side // 2, : side // 2] != 128).any(axis=1).sum())

    assert line_width(200) == 1
    assert line_width(2000) == 8


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (5000, 20)])
def test_labels_at_the_border_and_odd_sizes_are_drawn_without_error(size: tuple[int, int]) -> None:
    width, height = size
    boxes = detections((0, 0, width, height), (width, height, width, height), (-5, -5, 2 * width, 2 * height))
    assert draw(grey(width, height), boxes, {0: "a long label that does not fit"}).size == size


def test_nothing_found_leaves_the_picture_as_it_is() -> None:
    picture = draw(grey(50, 40), detections(), {})
    encoded = Image.open(io.BytesIO(encode_picture(picture, "png")))
    assert (np.asarray(encoded) == 128).all()
