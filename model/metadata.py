"""The metadata of an ONNX file: everything besides the weights that evaluation and service need.

`ModelMetadata` is converted to and from the file's `metadata_props` (string to string, JSON for other values). A file
that lacks a field (except LATER_FIELDS), or has another format version, is refused with `InvalidModel`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from pydantic import TypeAdapter, ValidationError

FORMAT_VERSION = "1"
KEY_PREFIX = "retinaserve."
TEXT_FIELDS = ("name", "architecture", "precision", "data_set", "made_for")
"""Fields that are stored as they are; all others are stored as JSON."""
LATER_FIELDS = ("anchors", "suggested_score_threshold", "made_for")
"""Fields that older files of this format version lack; the default replaces a missing one."""
Precision = Literal["fp32", "fp16", "int8"]
MadeFor = Literal["any", "cpu"]
"""Devices for which a file's graph is fastest; its answers are the same on all."""
SCORE_THRESHOLD = 0.05
"""Score that a detection must exceed. These three are the defaults of files and services."""
NMS_THRESHOLD = 0.5
"""Largest IoU of two detections of one label."""
MAX_DETECTIONS = 300
"""Most detections of an image, the best."""
MAX_CANVAS_PIXELS = 4096 * 4096
MAX_LABELS = 20_000
MAX_NAME_CHARACTERS = 200
"""Longest name of a model, and of each label."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_PROPS_CHARACTERS = 4 * 1024 * 1024
"""Most characters of all metadata together."""


class InvalidModel(ValueError):
    """The file is not a detector of ours, or not one that this version can run."""


@dataclass(frozen=True)
class Label:
    class_id: int
    label: str


def check_labels(labels: Sequence[Label]) -> None:
    """Raise InvalidModel for labels that no file may carry, and so no training data set either."""
    if not 1 <= len(labels) <= MAX_LABELS:
        raise InvalidModel(f"a model has {len(labels) or 'no'} labels; {MAX_LABELS} are allowed")
    for label in labels:
        _check_name(label.label)
    for what, values in (("class id", [x.class_id for x in labels]), ("name", [x.label for x in labels])):
        [(value, count)] = Counter(values).most_common(1)
        if count > 1:
            raise InvalidModel(f"a model's labels repeat the {what} {value!r}")


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_CHARACTERS or UNPRINTABLE.search(name):
        raise InvalidModel(
            f"a model has a name or label {name[:MAX_NAME_CHARACTERS]!r}: at most {MAX_NAME_CHARACTERS} characters "
            "are allowed, and no control characters or halves of surrogate pairs"
        )


@dataclass(frozen=True)
class ResizePolicy:
    """Rule by which an image becomes the network's input. It is scaled so that its shorter side is `shorter_side`, or
    less if its longer side would exceed `longest_side`, then padded at the bottom and right to multiples of `divisor`.
    All values are pixels."""

    shorter_side: int = 800
    longest_side: int = 1333
    divisor: int = 32

    def __post_init__(self) -> None:
        if not (1 <= self.shorter_side <= self.longest_side and self.divisor >= 1):
            raise InvalidModel(f"{self} is not a resize policy: 1 <= shorter side <= longest side, 1 <= divisor")
        if (pixels := math.prod(self.largest_canvas)) > MAX_CANVAS_PIXELS:
            raise InvalidModel(f"{self} makes canvases of {pixels} pixels; {MAX_CANVAS_PIXELS} are allowed")

    @property
    def largest_canvas(self) -> tuple[int, int]:
        """Sides of the largest canvas, the shorter first."""
        sides = (self.shorter_side, self.longest_side)
        shorter, longest = (-(-side // self.divisor) * self.divisor for side in sides)
        return shorter, longest


@dataclass(frozen=True)
class AnchorConfig:
    """Nine anchors per cell by default: three scales by three aspect ratios. Sizes are canvas pixels."""

    base_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """Side of the square anchor of each level, lowest level first."""
    scales: tuple[float, ...] = (1, 2 ** (1 / 3), 2 ** (2 / 3))
    aspect_ratios: tuple[float, ...] = (0.5, 1, 2)
    """Height over width."""
    lowest_level: int = 3
    """Lowest pyramid level; the cells of P3 are 2**3 pixels apart."""
    stride: Literal["exact", "torchvision"] = "exact"
    """Stride of a level. exact: 2**level. torchvision: canvas side // grid side, which differs on P6 and P7; its
    weights need that."""

    def __post_init__(self) -> None:
        lengths = (*self.base_sizes, *self.scales, *self.aspect_ratios)
        listed = self.base_sizes and self.scales and self.aspect_ratios
        if not listed or not all(0 < length < math.inf for length in lengths):
            raise ValueError("anchors need base sizes, scales and aspect ratios, all above 0")

    @property
    def levels(self) -> range:
        return range(self.lowest_level, self.lowest_level + len(self.base_sizes))

    @property
    def per_cell(self) -> int:
        return len(self.scales) * len(self.aspect_ratios)

    def grids(self, canvas: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of each level's cells on a canvas (height, width): each level halves, rounded up."""
        return tuple((-(-canvas[0] // 2**level), -(-canvas[1] // 2**level)) for level in self.levels)


@dataclass(frozen=True)
class ModelMetadata:
    name: str
    labels: tuple[Label, ...]
    architecture: str
    """Description of backbone, pyramid and heads for readers: "resnet50 fpn(256, P3-P7) head(4x256)"."""
    precision: Precision = "fp32"
    resize: ResizePolicy = field(default_factory=ResizePolicy)
    score_threshold: float = SCORE_THRESHOLD
    nms_threshold: float = NMS_THRESHOLD
    max_detections: int = MAX_DETECTIONS
    data_set: str = ""
    """Training data of the weights: "shapes (training demo --seed 0)", "COCO train2017"."""
    ap: float | None = None
    """COCO AP@[0.50:0.95] of the checkpoint on the data set's validation split, 0 to 1; None: unknown."""
    training: Mapping[str, str] = field(default_factory=dict)
    """Provenance of the weights, for readers: command, seed, steps, seconds, commit."""
    anchors: AnchorConfig | None = None
    """Anchors of the boxes, for readers: the graph holds its own. None: the file is older than this field."""
    made_for: MadeFor = "any"
    """Devices of the file. cpu: 3x3 convolutions by Winograd's algorithm, in operators that are slow on a GPU."""
    suggested_score_threshold: float | None = None
    """Score threshold of the best F1 on the validation split; None: unknown, or the file is older than this field."""

    def __post_init__(self) -> None:
        check_labels(self.labels)
        _check_name(self.name)
        shares = {"score_threshold": self.score_threshold, "nms_threshold": self.nms_threshold, "ap": self.ap}
        shares["suggested_score_threshold"] = self.suggested_score_threshold
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise InvalidModel(f"the model's {name} is {share}, not between 0 and 1")
        if self.max_detections < 1:
            raise InvalidModel(f"the model's max_detections is {self.max_detections}, less than 1")

    def to_props(self) -> dict[str, str]:
        """Convert to the file's `metadata_props`."""
        values = asdict(self) | {"format_version": FORMAT_VERSION}
        return {
            KEY_PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
        }

    @staticmethod
    def from_props(props: Mapping[str, str]) -> "ModelMetadata":
        """Read a file's `metadata_props`. InvalidModel: one is missing or malformed, or the version is another."""
        version = props.get(KEY_PREFIX + "format_version")
        if version is None:
            raise InvalidModel("the file carries no retinaserve metadata: export it with `python -m training export`")
        if version != FORMAT_VERSION:
            raise InvalidModel(f"the file's format version is {version}; this program reads {FORMAT_VERSION}")
        if (size := sum(map(len, props.values()))) > MAX_PROPS_CHARACTERS:
            raise InvalidModel(f"the file has {size} characters of metadata; {MAX_PROPS_CHARACTERS} are allowed")
        names = [entry.name for entry in fields(ModelMetadata)]
        values = {name: _value(props, name) for name in names if name not in LATER_FIELDS or KEY_PREFIX + name in props}
        try:
            return TypeAdapter(ModelMetadata).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidModel(f"the file's metadata cannot be read: {where or 'model'}: {first['msg']}") from error


def _value(props: Mapping[str, str], name: str) -> object:
    try:
        text = props[KEY_PREFIX + name]
        return text if name in TEXT_FIELDS else json.loads(text)
    except KeyError as error:
        raise InvalidModel(f"the file's metadata lacks {KEY_PREFIX}{name}") from error
    except json.JSONDecodeError as error:
        raise InvalidModel(f"the file's metadata cannot be read: {name} is no JSON: {error}") from error
