"""Label Studio tasks with detections, from which an annotation can start: `service detect --label-studio`.

In: detections of pictures. Out: the JSON that a project imports, with a task and its prediction for each picture. Label
Studio's boxes are in percent of the upright picture. The names of tags and labels come from the project's label
configuration (https://labelstud.io/tags/rectanglelabels); labels that it lacks are skipped and counted.
"""

import collections
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from model.detector import Detector
from model.types import Detections

LOCAL_FILES = "/data/local-files/?d="
"""Beginning of the address of Label Studio's local files; a path below its DOCUMENT_ROOT follows."""
URL_BEGINNINGS = ("/", "http://", "https://")
"""Beginnings of addresses in which names are escaped; in a bucket's (s3://) they are not."""
PERCENT_DECIMALS = 5
SCORE_DECIMALS = 6


@dataclass(frozen=True)
class LabelConfig:
    """The names in a project's label configuration."""

    rectangles: str = "label"
    image: str = "image"
    key: str = "image"
    """Key of a task's data that holds the picture's address."""
    labels: Mapping[str, str] | None = None
    """The project's labels by their names in lower case; None: it takes any."""

    def label_of(self, name: str) -> str | None:
        """Return the project's label for the model's, in any case; None: it has none."""
        return name if self.labels is None else self.labels.get(name.casefold())


def read_label_config(path: Path) -> LabelConfig:
    """Read a project's label configuration, XML. ValueError: it is invalid or has no tag for boxes. OSError."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no label configuration: {error}") from error
    images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
    for tag in root.iter("RectangleLabels"):
        name, image = tag.get("name"), tag.get("toName")
        if name and image and images.get(image, "").startswith("$"):
            labels = [label.get("value", "") for label in tag.iter("Label")]
            return LabelConfig(name, image, images[image][1:], {label.casefold(): label for label in labels} or None)
    raise ValueError(f'{path} has no <RectangleLabels name="…" toName="…"> of an <Image name="…" value="$…">')


class Tasks:
    """The tasks of one run. `image_url` is the beginning of each picture's address."""

    def __init__(self, detector: Detector, config: LabelConfig, image_url: str = LOCAL_FILES) -> None:
        self._config = config
        self._image_url = image_url
        self._names = {label.class_id: label.label for label in detector.metadata.labels}
        self._model_version = f"{detector.metadata.name}-{detector.sha256[:12]}"
        self._tasks: list[dict[str, Any]] = []
        self.skipped: collections.Counter[str] = collections.Counter()
        """Numbers of detections by labels that the project lacks."""

    def add(self, name: Path, size: tuple[int, int], detections: Detections) -> None:
        """Add a picture. `size` is (height, width); boxes are in its pixels."""
        regions = []
        for number, (box, score, class_id) in enumerate(
            zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
        ):
            found = self._names.get(class_id, str(class_id))
            label = self._config.label_of(found)
            if label is None:
                self.skipped[found] += 1
            else:
                regions.append(self._region(f"{name.as_posix()} {number}", size, box, score, label))
        scores = [region["score"] for region in regions]
        prediction = {
            "model_version": self._model_version,
            "score": round(sum(scores) / len(scores), SCORE_DECIMALS) if scores else 0,
            "result": regions,
        }
        self._tasks.append({"data": {self._config.key: self._address(name)}, "predictions": [prediction]})

    def json(self) -> str:
        return json.dumps(self._tasks) + "\n"

    def _address(self, name: Path) -> str:
        escaped = quote(name.as_posix()) if self._image_url.startswith(URL_BEGINNINGS) else name.as_posix()
        return self._image_url + escaped

    def _region(self, key: str, size: tuple[int, int], box: list[float], score: float, label: str) -> dict[str, Any]:
        height, width = size
        xmin, ymin, xmax, ymax = box
        percent = {
            "x": 100 * xmin / width,
            "y": 100 * ymin / height,
            "width": 100 * (xmax - xmin) / width,
            "height": 100 * (ymax - ymin) / height,
        }
        return {
            "id": hashlib.sha256(key.encode()).hexdigest()[:10],
            "from_name": self._config.rectangles,
            "to_name": self._config.image,
            "type": "rectanglelabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": round(score, SCORE_DECIMALS),
            "value": {side: round(value, PERCENT_DECIMALS) for side, value in percent.items()}
            | {"rotation": 0, "rectanglelabels": [label]},
        }
