"""The JSON of answers, and its OpenAPI models with examples.

Answers with hundreds of boxes are made as plain values and encoded at once. The models describe them; a test compares
the two. Boxes are in pixels of the upright original image.
"""

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from model.metadata import AnchorConfig, Label, ResizePolicy
from service.config import Share
from service.core.job import Detected
from service.core.store import LoadedModel
from service.metrics import STAGES

BOX_DECIMALS = 3
SCORE_DECIMALS = 6

DETECTION: JsonDict = {
    "label": "circle",
    "class_id": 1,
    "score": 0.97,
    "box": {"xmin": 10.5, "ymin": 20.0, "xmax": 110.2, "ymax": 96.0},
}
ANSWER: JsonDict = {
    "detections": [DETECTION],
    "image": {"width": 640, "height": 480},
    "model": {"name": "shapes", "sha256": "5f0c…"},
    "request_id": "2f1d7e0c6a5b4c3d8e9f0a1b2c3d4e5f",
    "timing_ms": {
        "read": 0.4, "decode": 4.1, "preprocess": 2.0, "queue": 0.3,
        "inference": 61.0, "postprocess": 0.6, "total": 68.4,
    },
}  # fmt: skip
PROBLEM: JsonDict = {
    "type": "urn:retinaserve:problem:invalid_image",
    "title": "The image cannot be decoded",
    "status": 422,
    "code": "invalid_image",
    "detail": "the image is empty (0 bytes)",
    "request_id": "2f1d7e0c6a5b4c3d8e9f0a1b2c3d4e5f",
}
BATCH_ANSWER: JsonDict = {"results": [ANSWER, PROBLEM]}
STATUS: JsonDict = {"status": "ready"}
MODEL_CARD: JsonDict = {
    "name": "shapes",
    "sha256": "5f0c…",
    "labels": [{"class_id": 1, "label": "circle"}],
    "architecture": "retinanet_resnet50_fpn",
    "precision": "fp16",
    "resize": {"shorter_side": 800, "longest_side": 1333, "divisor": 32},
    "anchors": {
        "base_sizes": [32, 64, 128, 256, 512],
        "scales": [1, 1.26, 1.587],
        "aspect_ratios": [0.5, 1, 2],
        "lowest_level": 3,
    },
    "defaults": {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 300},
    "device_requested": "auto",
    "provider": "CUDAExecutionProvider",
    "fell_back": False,
    "tf32": False,
    "ap": 0.436,
    "suggested_score_threshold": 0.41,
    "data_set": "shapes",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Box(Strict):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Detection(Strict):
    label: str
    class_id: int
    score: Share
    box: Box


class ImageSize(Strict):
    width: int
    height: int


class ModelName(Strict):
    name: str
    sha256: str


class Timing(Strict):
    """Milliseconds by stage. The stages sum to the total, which does not include encoding the answer."""

    read: float
    decode: float
    preprocess: float
    queue: float
    inference: float
    postprocess: float
    total: float


class Answer(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [ANSWER]})
    detections: list[Detection] = Field(description="Best score first; boxes in pixels of the upright image.")
    image: ImageSize
    model: ModelName
    request_id: str
    timing_ms: Timing


class Problem(Strict):
    """An error as RFC 9457 defines it."""

    model_config = ConfigDict(json_schema_extra={"examples": [PROBLEM]})
    type: str
    title: str
    status: int
    code: str = Field(description="Error code, the same in all versions: decide by it.")
    detail: str
    request_id: str


class BatchAnswer(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [BATCH_ANSWER]})
    results: list[Answer | Problem] = Field(description="One for each image, in order.")


class Thresholds(Strict):
    score_threshold: float
    nms_threshold: float
    max_detections: int


class ModelCard(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [MODEL_CARD]}, use_attribute_docstrings=True)
    name: str
    sha256: str
    labels: tuple[Label, ...]
    architecture: str
    precision: str
    resize: ResizePolicy
    anchors: AnchorConfig | None = Field(description="Anchors; null: the file is older than this field.")
    defaults: Thresholds = Field(description="Values for parameters that the query leaves out.")
    device_requested: str
    provider: str = Field(description="ONNX Runtime's execution provider.")
    fell_back: bool = Field(description="True: a GPU was wanted and the CPU computes.")
    tf32: bool = Field(description="True: an fp32 model on a GPU, whose convolutions run with 10 bits of mantissa.")
    ap: float | None = Field(description="COCO AP@[0.50:0.95] on the validation split, if known.")
    suggested_score_threshold: float | None = Field(
        description="Score threshold of the best F1 on the validation split, if known."
    )
    data_set: str


class Status(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [STATUS]})
    status: str


def timing_ms(detected: Detected) -> dict[str, float]:
    """Return milliseconds by stage up to now, and their sum."""
    seconds = detected.watch.stages
    stages = {stage: round(seconds[stage] * 1000, 3) for stage in STAGES if stage in seconds}
    return stages | {"total": round(detected.watch.total * 1000, 3)}


def answer(detected: Detected, request_id: str) -> dict[str, Any]:
    """Make the values of an `Answer`."""
    height, width = detected.original_size
    return {
        "detections": detection_list(detected),
        "image": {"width": width, "height": height},
        "model": {"name": detected.model.name, "sha256": detected.model.detector.sha256},
        "request_id": request_id,
        "timing_ms": timing_ms(detected),
    }


def detection_list(detected: Detected) -> list[dict[str, Any]]:
    names, found = detected.model.label_names, detected.detections
    boxes = np.round(found.boxes.astype(np.float64), BOX_DECIMALS).tolist()
    scores = np.round(found.scores.astype(np.float64), SCORE_DECIMALS).tolist()
    return [
        {
            "label": names.get(class_id, str(class_id)),
            "class_id": class_id,
            "score": score,
            "box": {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax},
        }
        for class_id, score, (xmin, ymin, xmax, ymax) in zip(found.labels.tolist(), scores, boxes, strict=True)
    ]


def model_card(model: LoadedModel, defaults: Thresholds) -> ModelCard:
    detector, metadata = model.detector, model.detector.metadata
    return ModelCard(
        name=model.name,
        sha256=detector.sha256,
        labels=metadata.labels,
        architecture=metadata.architecture,
        precision=metadata.precision,
        resize=metadata.resize,
        anchors=metadata.anchors,
        defaults=defaults,
        device_requested=detector.device_requested,
        provider=detector.provider,
        fell_back=detector.fell_back,
        tf32=detector.tf32,
        ap=metadata.ap,
        suggested_score_threshold=metadata.suggested_score_threshold,
        data_set=metadata.data_set,
    )
