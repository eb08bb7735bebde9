"""What an ONNX file says of itself: everything that evaluation and service must know beside the weights.

`ModelMetadata` becomes the file's `metadata_props` (string to string, JSON where a value is not a plain string) and back.
A file that lacks any of it, or is of another format version, is refused with `InvalidModel`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

FORMAT_VERSION = "1"
KEY_PREFIX = "retinaserve."
Precision = Literal["fp32", "fp16", "int8"]


class InvalidModel(ValueError):
    """The file is not a detector of ours, or not one that this version can run."""


@dataclass(frozen=True)
class Label:
    class_id: int
    label: str


@dataclass(frozen=True)
class ResizePolicy:
    """How an image becomes the network's input: scaled so that its shorter side is `shorter_side`, unless that makes its
    longer side exceed `longest_side`; then padded at the bottom and right to multiples of `divisor`. Pixels."""

    shorter_side: int = 800
    longest_side: int = 1333
    divisor: int = 32


@dataclass(frozen=True)
class ModelMetadata:
    name: str
    labels: tuple[Label, ...]
    architecture: str
    """Backbone, pyramid and heads in words, for people: "resnet50 fpn(256, P3-P7) head(4x256)"."""
    precision: Precision = "fp32"
    resize: ResizePolicy = field(default_factory=ResizePolicy)
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 300
    data_set: str = ""
    """Where the weights come from: "shapes (training demo --seed 0)", "COCO train2017"."""
    ap: float | None = None
    """COCO AP@[.50:.95] of the checkpoint on the data set's validation split, 0 to 1; None if not known."""
    training: Mapping[str, str] = field(default_factory=dict)
    """How it was made, for people: command, seed, steps, seconds, commit."""

    def __post_init__(self) -> None:
        ids = [label.class_id for label in self.labels]
        names = [label.label for label in self.labels]
        if not ids:
            raise InvalidModel("the model has no labels")
        if len(set(ids)) < len(ids):
            raise InvalidModel("the model's labels repeat a class id")
        if len(set(names)) < len(names):
            raise InvalidModel("the model's labels repeat a name")
        for threshold in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, threshold) <= 1:
                raise InvalidModel(f"the model's {threshold} is {getattr(self, threshold)}, not between 0 and 1")

    def to_props(self) -> dict[str, str]:
        """The file's `metadata_props`."""
        values = asdict(self) | {"format_version": FORMAT_VERSION}
        return {
            KEY_PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
        }

    @classmethod
    def from_props(cls, props: Mapping[str, str]) -> Self:
        """Read them back. InvalidModel: one is missing or malformed, or the version is not ours."""
        version = props.get(KEY_PREFIX + "format_version")
        if version is None:
            raise InvalidModel("the file carries no retinaserve metadata: export it with `python -m training export`")
        if version != FORMAT_VERSION:
            raise InvalidModel(f"the file's format version is {version}; this program reads {FORMAT_VERSION}")

        def text(key: str) -> str:
            return props[KEY_PREFIX + key]

        def value(key: str) -> object:
            return json.loads(text(key))

        try:
            precision = text("precision")
            if precision not in ("fp32", "fp16", "int8"):
                raise InvalidModel(f"the file's precision is {precision!r}, not fp32, fp16 or int8")
            return cls(
                name=text("name"),
                labels=tuple(Label(int(entry["class_id"]), str(entry["label"])) for entry in value("labels")),  # type: ignore[attr-defined]
                architecture=text("architecture"),
                precision=precision,  # type: ignore[arg-type]
                resize=ResizePolicy(**value("resize")),  # type: ignore[arg-type]
                score_threshold=float(value("score_threshold")),  # type: ignore[arg-type]
                nms_threshold=float(value("nms_threshold")),  # type: ignore[arg-type]
                max_detections=int(value("max_detections")),  # type: ignore[call-overload]
                data_set=text("data_set"),
                ap=None if value("ap") is None else float(value("ap")),  # type: ignore[arg-type]
                training=dict(value("training")),  # type: ignore[call-overload]
            )
        except KeyError as error:
            raise InvalidModel(f"the file's metadata lacks {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise InvalidModel(f"the file's metadata cannot be read: {error}") from error
