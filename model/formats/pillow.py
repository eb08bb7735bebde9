"""Reader of WebP, GIF and AVIF, by Pillow alone. An animation counts by its first frame."""

import io
from collections.abc import Callable

import numpy as np
from PIL import AvifImagePlugin, GifImagePlugin, Image, ImageFile, WebPImagePlugin

from model.formats import check_pixels
from model.formats.exif import orientation_in
from model.types import Pixels

Reader = Callable[[bytes, int], tuple[Pixels, object]]
BAND_PIXELS = 1 << 20


def rgb_of(image: Image.Image) -> Pixels:
    """Return the pixels, writable. They are copied band by band: otherwise a picture would be in memory three times."""
    image.load()
    width, height = image.im.size  # of what is stored: a TIFF's own size is the upright one's
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _reader(plugin: type[ImageFile.ImageFile]) -> Reader:
    def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
        with plugin(io.BytesIO(data)) as image:
            check_pixels(image.width, image.height, max_pixels)
            return rgb_of(image), orientation_in(image.info.get("exif"))

    return read


read_webp = _reader(WebPImagePlugin.WebPImageFile)
read_gif = _reader(GifImagePlugin.GifImageFile)
read_avif = _reader(AvifImagePlugin.AvifImageFile)
