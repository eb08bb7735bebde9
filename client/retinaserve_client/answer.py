"""The service's answers as frozen values. Boxes are xyxy in pixels of the upright picture.

Names are those of the service's JSON. Members that a newer service adds are ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import supervision

Json = Mapping[str, Any]
Kind = TypeVar("Kind")


class Box(NamedTuple):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


@dataclass(frozen=True)
class Detection:
    label: str
    class_id: int
    score: float
    box: Box


@dataclass(frozen=True)
class ImageSize:
    width: int
    height: int


@dataclass(frozen=True)
class ModelName:
    name: str
    sha256: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the service, by stage; the stages sum to the total."""

    read: float
    decode: float
    preprocess: float
    queue: float
    inference: float
    postprocess: float
    total: float


@dataclass(frozen=True)
class Answer:
    """One picture's detections, best score first. Its length is their number, and iterating gives them."""

    detections: tuple[Detection, ...]
    image: ImageSize
    model: ModelName
    request_id: str
    timing_ms: Timing

    def __len__(self) -> int:
        return len(self.detections)

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Make COCO results: `bbox` is x, y, width, height in pixels, `category_id` the model's `class_id`."""
        return [
            {
                "image_id": image_id,
                "category_id": found.class_id,
                "bbox": [box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin],
                "score": found.score,
            }
            for found in self.detections
            for box in [found.box]
        ]

    def to_supervision(self) -> "supervision.Detections":
        """Make supervision's `Detections`, with `class_name` in its data. ImportError: supervision is not installed."""
        import numpy as np
        import supervision

        return supervision.Detections(
            xyxy=np.array([found.box for found in self.detections], np.float32).reshape(-1, 4),
            confidence=np.array([found.score for found in self.detections], np.float32),
            class_id=np.array([found.class_id for found in self.detections], np.int64),
            data={"class_name": np.array([found.label for found in self.detections], np.str_)},
        )


@dataclass(frozen=True)
class Label:
    class_id: int
    label: str


@dataclass(frozen=True)
class Defaults:
    """The service's defaults for options that a call leaves out."""

    score_threshold: float
    nms_threshold: float
    max_detections: int


@dataclass(frozen=True)
class Model:
    """The model that serves."""

    name: str
    sha256: str
    labels: tuple[Label, ...]
    architecture: str
    precision: str
    defaults: Defaults
    device_requested: str
    provider: str
    fell_back: bool
    """True: a GPU was wanted and the CPU computes."""
    data_set: str
    ap: float | None = None
    """COCO AP@[0.50:0.95] on the validation split, if known."""
    suggested_score_threshold: float | None = None
    """The threshold of the best F1 on the validation split, if known."""


def answer_of(json: Json) -> Answer:
    """Read an answer of `POST /detect`. KeyError, TypeError: it is not one."""
    return Answer(
        tuple(_detection(each) for each in json["detections"]),
        _value(ImageSize, json["image"]),
        _value(ModelName, json["model"]),
        json["request_id"],
        _value(Timing, json["timing_ms"]),
    )


def model_of(json: Json) -> Model:
    """Read an answer of `GET /model`. KeyError, TypeError: it is not one."""
    labels = tuple(_value(Label, each) for each in json["labels"])
    return _value(Model, {**json, "labels": labels, "defaults": _value(Defaults, json["defaults"])})


def _detection(json: Json) -> Detection:
    box = json["box"]
    return Detection(
        json["label"], json["class_id"], json["score"], Box(box["xmin"], box["ymin"], box["xmax"], box["ymax"])
    )


def _value(kind: type[Kind], json: Json) -> Kind:
    return kind(**{name: json[name] for name in kind.__annotations__ if name in json})
