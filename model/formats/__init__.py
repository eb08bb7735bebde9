"""Readers of encoded pictures, one module for each format that needs more than Pillow gives.

A reader takes the file's bytes and the most pixels allowed, and returns the pixels as they are stored (RGB uint8
[H, W, 3]) with the EXIF orientation that turns them upright, None where the file has none. It checks the size before it
takes memory, and raises InvalidImage or TooManyPixels; anything else that it raises means a damaged file.

One rule for all: what decides about the pixels is read and obeyed, or the file is refused with the reason; what does
not (texts, profiles, previews, checksums of either, bytes behind the picture) never decides.
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
