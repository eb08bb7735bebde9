"""Readers of encoded pictures, one module for each format that needs more than Pillow gives.

A reader takes the file's bytes and the most pixels allowed. It returns the pixels as they are stored (RGB uint8
[H, W, 3]), and the EXIF orientation that turns them upright, or None. It checks the size before it takes memory, and
raises InvalidImage or TooManyPixels; any other exception means a damaged file.

One rule holds for all readers. Data that define the pixels are read and obeyed, or the file is refused with the reason.
Other data (texts, profiles, previews, their checksums, bytes after the picture) have no effect.
"""


class InvalidImage(ValueError):
    """The bytes cannot be decoded: no image, cut off, damaged, or of a kind that is not read."""


class TooManyPixels(InvalidImage):
    """The picture's header claims more pixels than allowed."""


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(
            f"the image has {width} × {height} = {width * height:,} pixels; at most {max_pixels:,} are allowed"
        )
