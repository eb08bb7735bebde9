"""Bytes → upright RGB pixels → canvas, and boxes from the canvas back to the picture.

One definition for training's evaluation and for the service. Sizes are (height, width) except where a library wants
(width, height). A canvas is a function of the picture's size and the policy alone, never of load or neighbours.

Pillow reads every header, so that a claim of too many pixels is refused before memory is taken for them. Plain JPEGs
are then decoded by simplejpeg (half of Pillow's time, and it refuses truncated files), everything else by Pillow.
"""

import io
import logging
import warnings
from collections.abc import Callable, Mapping

import cv2
import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from model.metadata import ResizePolicy
from model.types import CanvasImage, Detections, Pixels

# Imported by class, so that Pillow need not import its forty other plugins to find these.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        GifImagePlugin.GifImageFile,
        AvifImagePlugin.AvifImageFile,
    )
)
MAX_PIXELS = 50_000_000
MAX_JPEG_SCANS = 200
"""A progressive JPEG of a few megabytes can name so many scans that decoding takes hours; real ones have about ten, and
their thumbnails and further pictures (MPO) some more."""

# What Pillow warns of and logs (damaged tags, large pictures), the errors below answer. Not per thread, so set once.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Decoding runs in threads already, and OpenCV's own would compete with ONNX Runtime's.
cv2.setNumThreads(1)


class InvalidImage(ValueError):
    """The bytes cannot be decoded: no image, cut off, damaged, or of a kind that is not read."""


class TooManyPixels(InvalidImage):
    """The picture's header claims more pixels than allowed."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture, upright (EXIF orientation applied), writable.

    Alpha is dropped, 16-bit samples keep their high byte, greys, palettes, CMYK and LAB become RGB, of an animation the
    first frame counts. Raises InvalidImage or TooManyPixels and nothing else.
    """
    if not data:
        raise InvalidImage("the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.width, image.height, max_pixels)
            pixels = _decode_jpeg(data, max_pixels) if _is_plain_jpeg(image, data) else _decode_with_pillow(image)
            return _upright(pixels, _orientation(image))
    except InvalidImage:
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(f"these {len(data):,} bytes are not an image; send one of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise TooManyPixels(f"the image has more pixels than the {max_pixels:,} allowed") from error
    except Exception as error:  # a boundary: for a damaged file Pillow raises nearly anything, SyntaxError included
        raise InvalidImage(f"the image cannot be decoded: {error}") from error


def resized_size(height: int, width: int, policy: ResizePolicy) -> tuple[int, int]:
    """The picture's size on the canvas, before padding: torchvision's GeneralizedRCNNTransform, to the pixel.

    Its eager path takes floor(side × scale) of a float64 scale; float32, or rounding, differ for half of the common
    sizes. At least 1, where torchvision would fail.
    """
    scale = _scale(height, width, policy)
    return max(1, int(height * scale)), max(1, int(width * scale))


def to_canvas(image: Pixels, policy: ResizePolicy) -> CanvasImage:
    """Resize and pad with zeros at the bottom and right to multiples of `policy.divisor`.

    Bilinear without antialias as torchvision evaluates; a picture that shrinks by more than 2 is area-averaged first.
    """
    original_height, original_width, _ = image.shape
    height, width = resized_size(original_height, original_width, policy)
    canvas = np.zeros((_ceil(height, policy.divisor), _ceil(width, policy.divisor), 3), np.uint8)
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


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(
            f"the image has {width} × {height} = {width * height:,} pixels; at most {max_pixels:,} are allowed"
        )


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    if image.format not in ("JPEG", "MPO"):
        return False
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise InvalidImage(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
    return image.mode in ("RGB", "L")


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels:
    # Asked again: in a file made to deceive, two parsers may find two headers.
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height, max_pixels)
    pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return pixels


def _decode_with_pillow(image: Image.Image) -> Pixels:
    image.load()
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise InvalidImage("samples of 32 bits are not read: their range is unknown; send 8 or 16 bits")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a boundary as above: damaged EXIF says nothing, and the pixels are good
        return None


# EXIF 2.32, tag 0x0112: what turns the stored rows and columns upright; 1 is upright.
_TURNS: Mapping[object, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: lambda pixels: cv2.transpose(pixels),
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def _upright(pixels: Pixels, orientation: object) -> Pixels:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else turn(pixels)


def _scale(height: int, width: int, policy: ResizePolicy) -> float:
    return min(policy.shorter_side / min(height, width), policy.longest_side / max(height, width))


def _ceil(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor


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
