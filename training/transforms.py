"""Augmentation of one training sample, and the batch that is made of several.

A sample is an upright RGB picture uint8 [H, W, 3] with its boxes in the picture's pixels; every step changes both
together. All randomness comes from the generator passed in, so a sample is a function of its key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from model.image import padded_size, resized_size
from model.metadata import ResizePolicy
from model.types import Pixels
from training.coco import Target
from training.config import AugmentConfig


@dataclass(frozen=True, eq=False)
class Sample:
    pixels: Pixels
    target: Target
    unreadable: tuple[str, ...] = ()
    """Faults of the unreadable pictures that this one replaces."""


@dataclass(frozen=True, eq=False)
class Batch:
    images: Tensor
    """uint8 [N, H, W, 3], padded at the bottom and right."""
    sizes: Tensor
    """int64 [N, 2] (height, width) of each image."""
    targets: list["TensorTarget"]
    unreadable: tuple[str, ...] = ()
    """Faults of the unreadable pictures that others replace."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value, as arrays: torch would put its tensors into shared memory."""
        targets = [tuple(value.numpy() for value in vars(target).values()) for target in self.targets]
        return _unpickled, (self.images.numpy(), self.sizes.numpy(), targets, self.unreadable)

    @property
    def canvas(self) -> tuple[int, int]:
        """Size (height, width) of the padded images."""
        return self.images.shape[1], self.images.shape[2]

    def padded_to(self, canvas: tuple[int, int]) -> "Batch":
        """Pad the images to a canvas (height, width) at least as large."""
        if canvas == self.canvas:
            return self
        below, right = canvas[0] - self.canvas[0], canvas[1] - self.canvas[1]
        return replace(self, images=F.pad(self.images, (0, 0, 0, right, 0, below)))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Move images and targets to a device. `dtype` is that of the targets' boxes. Sizes stay on the CPU."""
        targets = [target.to(device, dtype) for target in self.targets]
        return replace(self, images=self.images.to(device, non_blocking=True), targets=targets)

    def parts(self, count: int) -> list[slice]:
        """Divide the images into `count` even parts. ValueError: there are fewer images than parts."""
        if len(self.targets) < count:
            raise ValueError(f"{len(self.targets)} images cannot be computed in {count} parts")
        return [slice(*edges) for edges in pairwise(len(self.targets) * part // count for part in range(count + 1))]

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, from which copies to a GPU are asynchronous."""
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True, eq=False)
class TensorTarget:
    """A `Target` as tensors, in canvas pixels."""

    boxes: Tensor
    columns: Tensor
    ignored: Tensor

    @classmethod
    def of(cls, target: Target) -> Self:
        return cls(*(torch.from_numpy(values) for values in (target.boxes, target.columns, target.ignored)))

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "TensorTarget":
        return TensorTarget(self.boxes.to(device, dtype), self.columns.to(device), self.ignored.to(device, dtype))


def augment(
    sample: Sample, config: AugmentConfig, resize: ResizePolicy, rng: Generator, crop_size: int | None
) -> Sample:
    """Flip a sample, resize it with jitter, crop it if a crop size is given, and change its colours."""
    sample = random_flip(sample, config, rng)
    sample = random_resize(sample, config, resize, rng, crop_size)
    return replace(sample, pixels=random_colour(sample.pixels, config, rng))


def random_flip(sample: Sample, config: AugmentConfig, rng: Generator) -> Sample:
    pixels, target = sample.pixels, sample.target
    if rng.random() < config.horizontal_flip:
        width = pixels.shape[1]
        pixels = pixels[:, ::-1]
        target = _map_boxes(target, lambda b: np.stack([width - b[:, 2], b[:, 1], width - b[:, 0], b[:, 3]], axis=1))
    if rng.random() < config.vertical_flip:
        height = pixels.shape[0]
        pixels = pixels[::-1]
        target = _map_boxes(target, lambda b: np.stack([b[:, 0], height - b[:, 3], b[:, 2], height - b[:, 1]], axis=1))
    if rng.random() < config.transpose:
        pixels = pixels.transpose(1, 0, 2)
        target = _map_boxes(target, lambda b: b[:, [1, 0, 3, 2]])
    return replace(sample, pixels=np.ascontiguousarray(pixels), target=target)


def random_resize(
    sample: Sample, config: AugmentConfig, resize: ResizePolicy, rng: Generator, crop_size: int | None
) -> Sample:
    """Resize to a random shorter side times the jitter; with a crop size, only the crop is computed."""
    height, width = sample.pixels.shape[:2]
    policy = replace(resize, shorter_side=int(rng.choice(config.shorter_sides)))
    low, high = np.log(config.scale_jitter)
    jitter = float(np.exp(rng.uniform(low, high)))
    new_height, new_width = (max(1, int(side * jitter)) for side in resized_size(height, width, policy))
    if crop_size is None:
        pixels = cv2.resize(sample.pixels, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        return replace(sample, pixels=pixels, target=sample.target.scaled(new_width / width, new_height / height))
    crop = min(crop_size, new_height), min(crop_size, new_width)
    target = sample.target.scaled(new_width / width, new_height / height)
    top, left = _crop_corner(target, (new_height, new_width), crop, config.crop_on_object, rng)
    pixels = _resized_window(sample.pixels, (new_height, new_width), (top, left), crop)
    return replace(sample, pixels=pixels, target=_crop_boxes(target, (top, left), crop, config.min_visible))


def random_colour(pixels: Pixels, config: AugmentConfig, rng: Generator) -> Pixels:
    gain = 1 + rng.uniform(-config.contrast, config.contrast)
    shift = 255 * rng.uniform(-config.brightness, config.brightness)
    if gain != 1 or shift != 0:
        table = np.arange(256) * gain + shift + float(pixels.mean()) * (1 - gain)
        pixels = cv2.LUT(pixels, table.clip(0, 255).astype(np.uint8))
    if rng.random() < config.shuffle_channels:
        pixels = pixels[..., rng.permutation(3)]
    return np.ascontiguousarray(pixels)


def collate(samples: Sequence[Sample], divisor: int) -> Batch:
    """Place the samples in the top left corners of canvases of one size, a multiple of the divisor."""
    sizes = [(sample.pixels.shape[0], sample.pixels.shape[1]) for sample in samples]
    height, width = padded_size(max(height for height, _ in sizes), max(width for _, width in sizes), divisor)
    images = np.zeros((len(samples), height, width, 3), dtype=np.uint8)
    for canvas, sample, (h, w) in zip(images, samples, sizes, strict=True):
        canvas[:h, :w] = sample.pixels
    targets = [TensorTarget.of(sample.target) for sample in samples]
    unreadable = tuple(problem for sample in samples for problem in sample.unreadable)
    return Batch(torch.from_numpy(images), torch.tensor(sizes), targets, unreadable)


def _unpickled(
    images: Pixels, sizes: NDArray[np.int64], targets: list[tuple[NDArray[Any], ...]], unreadable: tuple[str, ...]
) -> Batch:
    tensors = [TensorTarget(*map(torch.from_numpy, target)) for target in targets]
    return Batch(torch.from_numpy(images), torch.from_numpy(sizes), tensors, unreadable)


def _crop_corner(
    target: Target, size: tuple[int, int], crop: tuple[int, int], on_object: float, rng: Generator
) -> tuple[int, int]:
    """Draw (top, left) of a crop: anywhere, or so that it holds one random object (or lies within it)."""
    lowest, highest = np.zeros(2), np.subtract(size, crop)
    if len(target.boxes) and rng.random() < on_object:
        x1, y1, x2, y2 = target.boxes[rng.integers(len(target.boxes))]
        near, far = np.array([y1, x1]), np.array([y2, x2]) - crop
        lowest, highest = (np.clip(edge, 0, highest) for edge in (np.minimum(near, far), np.maximum(near, far)))
    top, left = rng.integers(np.floor(lowest), np.floor(highest) + 1)
    return int(top), int(left)


def _resized_window(
    pixels: Pixels, resized: tuple[int, int], corner: tuple[int, int], window: tuple[int, int]
) -> Pixels:
    """Compute the window (height, width) at `corner` (top, left) of the picture at size `resized`, without the rest."""
    scale_y, scale_x = (new / old for new, old in zip(resized, pixels.shape[:2], strict=True))
    # pixel centres: x_resized = (x + 0.5) * scale - 0.5 - left
    matrix = np.array([[scale_x, 0, 0.5 * scale_x - 0.5 - corner[1]], [0, scale_y, 0.5 * scale_y - 0.5 - corner[0]]])
    size = (window[1], window[0])
    warped = cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    window_pixels: Pixels = warped
    return window_pixels


def _crop_boxes(target: Target, corner: tuple[int, int], size: tuple[int, int], min_visible: float) -> Target:
    """Clip to the crop. Objects that lose too much become ignored regions; those outside are removed."""
    boxes, visible = _clip(target.boxes, corner, size)
    ignored, ignored_visible = _clip(target.ignored, corner, size)
    cut = (visible > 0) & (visible < min_visible)
    whole = visible >= min_visible
    return Target(boxes[whole], target.columns[whole], np.concatenate([ignored[ignored_visible > 0], boxes[cut]]))


def _clip(
    boxes: NDArray[np.float32], corner: tuple[int, int], size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the boxes in the crop's frame, and the remaining share of each one's area."""
    top, left = corner
    moved = boxes - np.array([left, top, left, top], dtype=np.float32)
    limits = np.array([size[1], size[0], size[1], size[0]], dtype=np.float32)
    clipped = np.minimum(np.maximum(moved, np.float32(0)), limits)
    visible = np.divide(_area(clipped), np.maximum(_area(moved), 1e-6), dtype=np.float32)
    return clipped, visible


def _area(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    area: NDArray[np.float32] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area


def _map_boxes(target: Target, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Target:
    return Target(change(target.boxes), target.columns, change(target.ignored))
