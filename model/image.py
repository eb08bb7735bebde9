"""Bytes → upright RGB pixels → canvas, and boxes from the canvas back to the picture.

Evaluation and service share this code. Sizes are (height, width), except where a library wants (width, height). A
canvas depends on the picture's size and the policy alone, never on load or neighbours.

Each format has a reader (`model.formats`), which checks the size that the file claims before it takes memory.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image

from model.formats import InvalidImage, TooManyPixels, bmp, jpeg, pillow, png, tiff
from model.formats.exif import upright
from model.formats.signatures import HEAD_BYTES, READ, name_of
from model.metadata import ResizePolicy
from model.types import CanvasImage, Detections, Pixels

__all__ = [
    "MAX_PIXELS",
    "InvalidImage",
    "TooManyPixels",
    "decode_image",
    "decode_soon",
    "resized_size",
    "to_canvas",
    "to_original",
]

MAX_PIXELS = 50_000_000
READERS: Mapping[str, pillow.Reader] = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WEBP": pillow.read_webp,
    "BMP": bmp.read,
    "TIFF": tiff.read,
    "GIF": pillow.read_gif,
    "AVIF": pillow.read_avif,
}

# What Pillow warns of and logs (damaged tags, large pictures), the errors below answer. Not per thread, so set once.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
Image.MAX_IMAGE_PIXELS = None  # the limit is ours, asked before Pillow's
# Decoding runs in threads already, and OpenCV's own would compete with ONNX Runtime's.
cv2.setNumThreads(1)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a picture to upright (EXIF orientation applied), writable pixels.

    Alpha is dropped. 16-bit samples keep the high byte. Grey, palette, CMYK and LAB become RGB. An animation counts by
    its first frame. Colour profiles and XMP have no effect. Raises InvalidImage or TooManyPixels and nothing else.
    """
    if not data:
        raise InvalidImage("the image is empty (0 bytes)")
    name = name_of(data)
    if name is None or name not in READERS:
        came = f"these {len(data):,} bytes are not an image" if name is None else f"this is {name}, which is not read"
        raise InvalidImage(f"{came}; send one of {', '.join(READ)}")
    with _damage_is_invalid(name):
        return upright(*READERS[name](data, max_pixels))


def decode_soon(data: bytes | bytearray, *, max_pixels: int = MAX_PIXELS) -> Pixels | None:
    """Do as `decode_image` does, if the file is a JPEG whose segments show that this takes about a second at most; else
    return None at once."""
    if name_of(bytes(data[:HEAD_BYTES])) != "JPEG":
        return None
    with _damage_is_invalid("JPEG"):
        read = jpeg.read_soon(bytes(data), max_pixels)
        return None if read is None else upright(*read)


@contextmanager
def _damage_is_invalid(name: str) -> Iterator[None]:
    """Turn any exception of a reader into InvalidImage: damaged files raise nearly anything, SyntaxError included."""
    try:
        yield
    except InvalidImage:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InvalidImage(f"the {name} cannot be decoded, it is cut off or damaged: {reason}") from error


def resized_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """Return the picture's size on the canvas, before padding, as torchvision's GeneralizedRCNNTransform computes it.

    Its eager path computes floor(side × scale) with a float64 scale; float32 or rounding would differ for half of the
    common sizes. A side is at least 1, where torchvision would fail.
    """
    scale = _scale(height, width, policy)
    return max(1, int(height * scale)), max(1, int(width * scale))


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Return the canvas size of a resized picture: its sides rounded up to multiples of the divisor."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def canvas_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """Return the canvas size of a picture of this size."""
    return padded_size(*resized_size(height, width, policy), policy.divisor)


def to_canvas(image: Pixels, policy: ResizePolicy) -> CanvasImage:
    """Resize, and pad with zeros at the bottom and right to multiples of `policy.divisor`.

    The resize is bilinear without antialias, as in torchvision; a picture that shrinks by more than 2 is area-averaged
    first.
    """
    original_height, original_width, _ = image.shape
    height, width = resized_size(original_height, original_width, policy)
    canvas = np.zeros((*padded_size(height, width, policy.divisor), 3), np.uint8)
    valid = canvas[:height, :width]
    if _scale(original_height, original_width, policy) >= 0.5:
        cv2.resize(image, (width, height), dst=valid, interpolation=cv2.INTER_LINEAR)
    else:
        _shrink(image, valid)
    return CanvasImage(canvas, size=(height, width), original_size=(original_height, original_width))


def to_original(detections: Detections, canvas: CanvasImage) -> Detections:
    """Convert boxes from canvas pixels to pixels of the upright original, clipped to it."""
    height, width = canvas.original_size
    corner = np.array([width, height, width, height], np.float32)
    resized_height, resized_width = canvas.size
    ratio = corner / np.array([resized_width, resized_height, resized_width, resized_height], np.float32)
    return Detections(np.clip(detections.boxes * ratio, 0, corner), detections.scores, detections.labels)


def _scale(height: int, width: int, policy: ResizePolicy) -> float:
    return min(policy.shorter_side / min(height, width), policy.longest_side / max(height, width))


def _shrink(image: Pixels, out: Pixels) -> None:
    """Write `image` into the smaller `out`: means of pixel pairs until at most a factor of 2 remains on each axis, then
    bilinear. At a factor of 2 bilinear equals that mean, so the two rules join without a step.

    If a side is odd, its last row or column belongs to no pair. Pixel centres stay aligned then too, because the last
    step maps by the original size, which cv2.resize could not do.
    """
    height, width, _ = out.shape
    rows, columns = _halvings(image.shape[0], height), _halvings(image.shape[1], width)
    y_scale, x_scale = image.shape[0] / height / 2**rows, image.shape[1] / width / 2**columns
    for step in range(max(rows, columns)):
        image = _mean_of_pairs(image, 2 if step < rows else 1, 2 if step < columns else 1)
    to_source = np.array([[x_scale, 0, (x_scale - 1) / 2], [0, y_scale, (y_scale - 1) / 2]])
    bilinear = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(image, to_source, (width, height), dst=out, flags=bilinear, borderMode=cv2.BORDER_REPLICATE)


def _halvings(source: int, target: int) -> int:
    count = 0
    while source > 2 ** (count + 1) * target:
        count += 1
    return count


def _mean_of_pairs(image: Pixels, rows: int, columns: int) -> Pixels:
    height, width = image.shape[0] // rows, image.shape[1] // columns
    pairs = image[: height * rows, : width * columns]
    mean: Pixels = cv2.resize(pairs, (width, height), interpolation=cv2.INTER_AREA)
    return mean
