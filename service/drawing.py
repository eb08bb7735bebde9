"""Drawing detections onto their picture. Line width and letters grow with the picture, so that both stay readable."""

import io
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from model.types import Detections, Pixels

PictureFormat = Literal["png", "jpeg"]

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
"""Colours by class id, in turn; white letters are readable on each."""
JPEG_QUALITY = 90
BYTES_PER_PIXEL = 3
"""Most bytes per pixel of an encoded drawing: noise as PNG."""
MAX_JPEG_SIDE = 65_500
"""libjpeg's limit."""


class SideTooLong(ValueError):
    """JPEG cannot hold a picture with such a side: use PNG."""


def draw(pixels: Pixels, detections: Detections, label_names: dict[int, str]) -> Image.Image:
    """Draw a box and "label score" for each detection, the best on top. Boxes are in pixels of `pixels`."""
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    shorter_side = min(picture.size)
    width = max(1, round(shorter_side / 250))
    font = ImageFont.load_default(max(10, shorter_side / 35))
    for box, score, class_id in reversed(
        list(zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True))
    ):
        colour = COLOURS[class_id % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=width)
        _write(pen, f"{label_names.get(class_id, class_id)} {score:.2f}", box, colour, font)
    return picture


def check_sides(size: tuple[int, int], picture_format: PictureFormat) -> None:
    """Raise SideTooLong if the format cannot hold a picture of this (height, width)."""
    if picture_format == "jpeg" and max(size) > MAX_JPEG_SIDE:
        raise SideTooLong(f"a JPEG's sides are at most {MAX_JPEG_SIDE} pixels, the picture's are {size}: ask for PNG")


def encode_picture(picture: Image.Image, picture_format: PictureFormat) -> bytes:
    """Encode the picture. SideTooLong: this format cannot hold it."""
    check_sides((picture.height, picture.width), picture_format)
    buffer = io.BytesIO()
    if picture_format == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: list[float],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a filled label above the box's upper left corner, or inside if there is no room above or to the right."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    text_width, text_height = right + left, bottom + top
    picture_width, _ = pen.im.size
    x = max(0, min(box[0], picture_width - text_width))
    y = box[1] - text_height if box[1] >= text_height else box[1]
    pen.rectangle((x, y, x + text_width, y + text_height), fill=colour)
    pen.text((x, y), text, fill="white", font=font)
