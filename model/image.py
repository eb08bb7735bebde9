"""Bytes → upright RGB pixels → canvas, and boxes from the canvas back to the picture.

One definition for training's evaluation and for the service. Sizes are (height, width) except where a library wants
(width, height). A canvas is a function of the picture's size and the policy alone, never of load or neighbours.

One reader for each format (`model.formats`) checks the size that the file claims before memory is taken for it.
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
    """The picture, upright (EXIF orientation applied), writable.

    Alpha is dropped, of 16-bit samples the high byte is kept, greys, palettes, CMYK and LAB become RGB, of an animation
    the first frame counts, colour profiles and XMP do not. Raises InvalidImage or TooManyPixels and nothing else.
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
    """The picture as `decode_image` returns it, or its error, if the file is a JPEG whose segments show that this takes
    about a second; else None, at once."""
    if name_of(bytes(data[:HEAD_BYTES])) != "JPEG":
        return None
    with _damage_is_invalid("JPEG"):
        read = jpeg.read_soon(bytes(data), max_pixels)
        return None if read is None else upright(*read)


@contextmanager
def _damage_is_invalid(name: str) -> Iterator[None]:
    """A boundary: for a damaged file a reader raises nearly anything, SyntaxError included."""
    try:
        yield
    except InvalidImage:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InvalidImage(f"the {name} cannot be decoded, it is cut off or damaged: {reason}") from error


def resized_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """The picture's size on the canvas, before padding: torchvision's GeneralizedRCNNTransform, to the pixel.

    Its eager path takes floor(side × scale) of a float64 scale; float32, or rounding, differ for half of the common
    sizes. At least 1, where torchvision would fail.
    """
    scale = _scale(height, width, policy)
    return max(1, int(height * scale)), max(1, int(width * scale))


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """The canvas of a resized picture: its sides rounded up to multiples of the divisor."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def canvas_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """The canvas of a picture of this size."""
    return padded_size(*resized_size(height, width, policy), policy.divisor)


def to_canvas(image: Pixels, policy: ResizePolicy) -> CanvasImage:
    """Resize and pad with zeros at the bottom and right to multiples of `policy.divisor`.

    Bilinear without antialias as torchvision evaluates; a picture that shrinks by more than 2 is area-averaged first.
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
    """Boxes from canvas pixels to pixels of the upright original, clipped to it."""
    height, width = canvas.original_size
    corner = np.array([width, height, width, height], np.float32)
    resized_height, resized_width = canvas.size
    ratio = corner / np.array([resized_width, resized_height, resized_width, resized_height], np.float32)
    return Detections(np.clip(detections.boxes * ratio, 0, corner), detections.scores, detections.labels)


def _scale(height: int, width: int, policy: ResizePolicy) -> float:
    return min(policy.shorter_side / min(height, width), policy.longest_side / max(height, width))


def _shrink(image: Pixels, out: Pixels) -> None:
    """Write `image` into the smaller `out`: mean of pixel pairs until at most a factor of 2 remains on each axis, then
    bilinear. At a factor of 2 bilinear is that mean, so the rule has no step where it begins.

    Pixel centres stay aligned where a side is odd and its last row or column falls out of the pairs: the last step maps
    by the original size, which cv2.resize could not.
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
