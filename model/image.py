"""Bytes → RGB pixels → canvas, and boxes back to the picture.

bytes --decode_image--> RGB uint8 [H, W, 3], upright --to_canvas--> CanvasImage … Detections --to_original--> Detections
"""

from model.metadata import ResizePolicy
from model.types import CanvasImage, Detections, Pixels

MAX_PIXELS = 50_000_000


class InvalidImage(ValueError):
    """The bytes cannot be decoded: no image, cut off, damaged, or of a kind that is not read."""


class TooManyPixels(InvalidImage):
    """The picture's header claims more pixels than allowed."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture, upright (EXIF orientation applied). InvalidImage, TooManyPixels."""
    raise NotImplementedError


def resized_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """(height, width) of the resized picture, before padding."""
    raise NotImplementedError


def to_canvas(image: Pixels, policy: ResizePolicy) -> CanvasImage:
    """Resize and pad. The canvas size is a function of the picture's size and the policy alone."""
    raise NotImplementedError


def to_original(detections: Detections, canvas: CanvasImage) -> Detections:
    """Boxes from canvas pixels to pixels of the upright original, clipped to it."""
    raise NotImplementedError
