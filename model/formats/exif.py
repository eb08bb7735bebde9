"""The EXIF orientation of a picture. XMP's orientation has no effect, as in browsers."""

from collections.abc import Callable, Mapping

import cv2
from PIL import ExifTags, Image

from model.types import Pixels


def orientation_in(exif: bytes | None) -> object:
    """Read the Orientation tag; None: it is missing, or the EXIF is damaged, which does not affect the pixels."""
    if not exif:
        return None
    tags = Image.Exif()
    try:
        tags.load(exif)
        return tags.get(ExifTags.Base.Orientation)
    except Exception:  # a boundary: for damaged EXIF Pillow raises nearly anything, SyntaxError included
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


def upright(pixels: Pixels, orientation: object) -> Pixels:
    """Turn the stored pixels upright; an undefined orientation counts as upright."""
    turn = _TURNS.get(orientation)
    return pixels if turn is None else turn(pixels)
