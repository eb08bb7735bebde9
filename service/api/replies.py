"""One image's answer as bytes: JSON, or the picture with its boxes drawn; and which of the two a client asks for."""

from dataclasses import dataclass

from pydantic_core import to_json

from model.image import decode_image
from service.api.schemas import answer, timing_ms
from service.core.job import Detected
from service.drawing import PictureFormat, draw, encode_picture


@dataclass(frozen=True)
class Reply:
    body: bytes
    media_type: str
    timing: dict[str, float]
    """Milliseconds by stage, and their total."""
    detected: Detected


def as_json(detected: Detected, data: bytearray, *, request_id: str) -> Reply:
    values = answer(detected, request_id)
    return Reply(to_json(values), "application/json", values["timing_ms"], detected)


def as_picture(detected: Detected, data: bytearray, *, max_pixels: int, picture_format: PictureFormat) -> Reply:
    """Decode `data` again: holding every upload's pixels for the few that want a drawing would cost more."""
    timing = timing_ms(detected)
    pixels = decode_image(bytes(data), max_pixels=max_pixels)
    picture = draw(pixels, detected.detections, detected.model.label_names)
    return Reply(encode_picture(picture, picture_format), f"image/{picture_format}", timing, detected)


def picture_wanted(accept: str) -> PictureFormat | None:
    """The picture format that this Accept header names and ranks above JSON. A browser's header gets JSON."""
    quality: dict[str, float] = {}
    for entry in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        q = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            quality[media_type] = float(q)
        except ValueError:
            return None
    if "text/html" in quality:
        return None
    json = next((quality[name] for name in ("application/json", "application/*", "*/*") if name in quality), 0)
    png, jpeg = quality.get("image/png", 0), quality.get("image/jpeg", 0)
    if max(png, jpeg) <= json:
        return None
    return "png" if png >= jpeg else "jpeg"
