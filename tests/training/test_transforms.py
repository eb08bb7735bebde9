"""Random changes keep boxes on their objects: one bright rectangle a picture, found again in the pixels."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.metadata import ResizePolicy
from training.coco import Target
from training.config import AugmentConfig
from training.transforms import Sample, augment, collate

RESIZE = ResizePolicy(shorter_side=96, longest_side=200)
NO_BOXES = np.zeros((0, 4), np.float32)


def picture_with_box(box: tuple[int, int, int, int], height: int = 60, width: int = 80) -> Sample:
    pixels = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    return Sample(pixels, Target(np.array([box], np.float32), np.array([0]), NO_BOXES))


def box_in_pixels(sample: Sample) -> NDArray[np.float64]:
    """Find the box in which the brightness exceeds one half."""
    rows = np.flatnonzero(sample.pixels.max(axis=(1, 2)) > 127)
    columns = np.flatnonzero(sample.pixels.max(axis=(0, 2)) > 127)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(horizontal_flip=1, shorter_sides=(96,)),
        AugmentConfig(horizontal_flip=0, vertical_flip=1, shorter_sides=(96,)),
        AugmentConfig(horizontal_flip=0, transpose=1, shorter_sides=(96,)),
        AugmentConfig(
            horizontal_flip=0.5, vertical_flip=0.5, transpose=0.5, scale_jitter=(0.6, 1.5), shorter_sides=(64, 96)
        ),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_boxes_stay_on_their_objects(config: AugmentConfig, seed: int) -> None:
    changed = augment(picture_with_box((15, 12, 50, 33)), config, RESIZE, np.random.default_rng(seed), None)
    np.testing.assert_allclose(changed.target.boxes[0], box_in_pixels(changed), atol=1.01)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_stay_on_their_objects_in_crops(seed: int) -> None:
    config = AugmentConfig(shorter_sides=(96,), scale_jitter=(0.8, 1.3), crop_on_object=1.0, min_visible=0.0)
    changed = augment(picture_with_box((30, 20, 45, 33)), config, RESIZE, np.random.default_rng(seed), 64)
    assert changed.pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(changed.target.boxes[0], box_in_pixels(changed), atol=1.01)


def test_an_object_that_a_crop_cuts_too_far_is_ignored_not_background() -> None:
    config = AugmentConfig(horizontal_flip=0, shorter_sides=(96,), min_visible=0.7)
    sample = picture_with_box((0, 0, 80, 60))
    changed = augment(sample, config, RESIZE, np.random.default_rng(0), 48)
    assert len(changed.target.boxes) == 0
    assert changed.target.ignored.tolist() == [[0, 0, 48, 48]]


def test_the_same_generator_makes_the_same_sample() -> None:
    config = AugmentConfig(
        brightness=0.2, contrast=0.3, shuffle_channels=0.5, scale_jitter=(0.5, 2), shorter_sides=(96,)
    )
    one, other = (
        augment(picture_with_box((3, 4, 30, 40)), config, RESIZE, np.random.default_rng(7), None) for _ in range(2)
    )
    assert np.array_equal(one.pixels, other.pixels)
    assert np.array_equal(one.target.boxes, other.target.boxes)


def test_brightness_saturates_instead_of_wrapping_round() -> None:
    sample = Sample(np.full((8, 8, 3), 250, np.uint8), Target(NO_BOXES, np.zeros(0, np.int64), NO_BOXES))
    config = AugmentConfig(brightness=0.5, contrast=0.5, shorter_sides=(96,))
    for seed in range(20):
        changed = augment(sample, config, RESIZE, np.random.default_rng(seed), None)
        assert changed.pixels.min() > 100


def test_a_batch_lays_pictures_into_the_corner_of_one_canvas() -> None:
    batch = collate([picture_with_box((0, 0, 5, 5), 40, 70), picture_with_box((0, 0, 5, 5), 50, 30)], divisor=32)
    assert batch.images.shape == (2, 64, 96, 3)
    assert batch.sizes.tolist() == [[40, 70], [50, 30]]
    assert batch.images[0, 40:].sum() == 0
    assert torch.equal(batch.targets[1].boxes, torch.tensor([[0.0, 0, 5, 5]]))


def test_crop_settings_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        AugmentConfig(crop_sizes=(64,))
