"""WebP, GIF and AVIF → RGB, by Pillow alone. Of an animation the first frame counts."""

import io
from collections.abc import Callable

import numpy as np
from PIL import AvifImagePlugin, GifImagePlugin, ImageFile, WebPImagePlugin

from model.formats import check_pixels
from model.formats.exif import orientation_in
from model.types import Pixels

Reader = Callable[[bytes, int], tuple[Pixels, object]]


def _reader(plugin: type[ImageFile.ImageFile]) -> Reader:
    def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
        with plugin(io.BytesIO(data)) as image:
            check_pixels(image.width, image.height, max_pixels)
            return np.array(image.convert("RGB")), orientation_in(image.info.get("exif"))

    return read


read_webp = _reader(WebPImagePlugin.WebPImageFile)
read_gif = _reader(GifImagePlugin.GifImageFile)
read_avif = _reader(AvifImagePlugin.AvifImageFile)
