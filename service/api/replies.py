"""One image's answer as bytes, JSON or the picture with its boxes drawn, and the choice between the two."""

from dataclasses import dataclass
from typing import Protocol

from pydantic_core import to_json

from service.api.schemas import answer, detection_list, timing_ms
from service.core.decoders import Decoders
from service.core.job import Detected, Job
from service.drawing import PictureFormat, check_sides


class Answered(Protocol):
    """One image's part of an answer, in any form."""

    @property
    def timing(self) -> dict[str, float]:
        """Milliseconds by stage, and their total."""

    @property
    def detected(self) -> Detected: ...


@dataclass(frozen=True)
class Reply:
    body: bytes
    media_type: str
    timing: dict[str, float]
    """Milliseconds by stage, and their total."""
    detected: Detected


def as_json(detected: Detected, job: Job, *, request_id: str) -> Reply:
    values = answer(detected, request_id)
    return Reply(to_json(values), "application/json", values["timing_ms"], detected)


def as_list(detected: Detected, job: Job) -> Reply:
    """Make the bare list of detections."""
    return Reply(to_json(detection_list(detected)), "application/json", timing_ms(detected), detected)


def as_picture(detected: Detected, job: Job, *, decoders: Decoders, picture_format: PictureFormat) -> Reply:
    """Draw the picture. It is decoded again, because holding every upload's pixels would cost more."""
    check_sides(detected.original_size, picture_format)
    timing = timing_ms(detected)
    picture = decoders.drawing(job, detected.detections, detected.model.label_names, picture_format)
    return Reply(picture, f"image/{picture_format}", timing, detected)


def picture_wanted(accept: str) -> PictureFormat | None:
    """Return the picture format that this Accept header names and ranks above JSON. A browser's header gets JSON."""
    quality = qualities(accept)
    if "text/html" in quality:
        return None
    json = next((quality[name] for name in ("application/json", "application/*", "*/*") if name in quality), 0)
    png, jpeg = quality.get("image/png", 0), quality.get("image/jpeg", 0)
    if max(png, jpeg) <= json:
        return None
    return "png" if png >= jpeg else "jpeg"


def qualities(accept: str) -> dict[str, float]:
    """Return the media types of an Accept header with their q; none for an unreadable header."""
    quality: dict[str, float] = {}
    for entry in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        q = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            quality[media_type] = float(q)
        except ValueError:
            return {}
    return quality
