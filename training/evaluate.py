"""COCO average precision of a checkpoint or an ONNX file, through the very decode, resize, canvas, NMS and labels that
serve.

In: a COCO-format data set and anything that turns canvases into candidates. Out: `ApReport`, pycocotools' figures.
Source of the metric: Lin et al. 2014 (COCO); pycocotools is the reference implementation itself.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from model.candidates import CandidateDetector
from model.detector import Detector
from model.image import to_canvas, to_original
from model.metadata import Label, ResizePolicy
from model.suppress import suppress
from model.types import Candidates, CanvasImage, Detections, Pixels
from training.checkpoint import build_detector, load_checkpoint
from training.coco import CocoDataSet, InvalidDataSet

Run = Callable[[Sequence[CanvasImage]], list[Candidates]]


@dataclass(frozen=True)
class Predictor:
    """Canvases to candidates, with what surrounds it."""

    run: Run
    labels: tuple[Label, ...]
    resize: ResizePolicy
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 300

    def __call__(self, image: Pixels) -> Detections:
        """The objects of one upright picture, in its pixels."""
        canvas = to_canvas(image, self.resize)
        detections = suppress(
            self.run([canvas])[0],
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        return to_original(detections, canvas)


@dataclass(frozen=True)
class ApReport:
    """Averages over IoU .50:.95 unless said; 0 to 1, or NaN where the data set has no such object."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    recall_100: float
    per_class: dict[str, float]
    num_images: int

    def table(self) -> str:
        rows = [
            ("AP@[.50:.95]", self.ap),
            ("AP50", self.ap50),
            ("AP75", self.ap75),
            ("AP small (< 32² px)", self.ap_small),
            ("AP medium", self.ap_medium),
            ("AP large (> 96² px)", self.ap_large),
            ("recall at 100", self.recall_100),
            *((f"AP {name}", value) for name, value in self.per_class.items()),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value:.4f}" for name, value in rows]
        return "\n".join([*lines, f"{'pictures':<{width}}  {self.num_images}"])


def open_predictor(model: Path, device: str = "auto") -> Predictor:
    """A predictor of an .onnx file or of a checkpoint's best weights."""
    if model.suffix == ".onnx":
        detector = Detector(model, device=device)  # type: ignore[arg-type]
        metadata = detector.metadata
        return Predictor(
            detector.run,
            metadata.labels,
            metadata.resize,
            metadata.score_threshold,
            metadata.nms_threshold,
            metadata.max_detections,
        )
    checkpoint = load_checkpoint(model)
    detector_module = build_detector(checkpoint).to(choose_device(device))
    return Predictor(torch_run(detector_module), checkpoint.labels, checkpoint.config.resize)


def choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def torch_run(detector: CandidateDetector) -> Run:
    """The torch module as what `model.detector.Detector.run` is: canvases of one size to candidates."""
    device = next(detector.parameters()).device

    def run(canvases: Sequence[CanvasImage]) -> list[Candidates]:
        images = torch.from_numpy(np.stack([canvas.pixels for canvas in canvases])).to(device)
        sizes = torch.tensor([canvas.size for canvas in canvases], device=device)
        with torch.inference_mode():
            outputs = [output.cpu().numpy() for output in detector(images, sizes)]
        return [Candidates(*answer) for answer in zip(*outputs, strict=True)]

    return run


def evaluate(predictor: Predictor, data_set: CocoDataSet, *, limit: int = 0, progress: bool = True) -> ApReport:
    """AP on the first `limit` pictures (0: all). InvalidDataSet: it has labels that the model lacks."""
    if not set(predictor.labels) >= set(data_set.labels):  # COCO's imported weights have columns that COCO leaves out
        raise InvalidDataSet(
            f"the model knows {_names(predictor.labels)}; {data_set.annotation_file} has {_names(data_set.labels)}"
        )
    pictures = data_set.pictures[: limit or None]
    results: list[dict[str, Any]] = []
    for index, picture in enumerate(tqdm(pictures, desc="evaluate", unit="picture", disable=not progress)):
        results += coco_results(picture.image_id, predictor(data_set.read(index)))
    return average_precision(data_set.annotation_file, results, [picture.image_id for picture in pictures])


def coco_results(image_id: int | str, detections: Detections) -> list[dict[str, Any]]:
    """COCO's results format: bbox is [x, y, width, height]."""
    boxes = detections.boxes.astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": int(label), "bbox": box, "score": float(score)}
        for box, score, label in zip(boxes.tolist(), detections.scores, detections.labels, strict=True)
    ]


def average_precision(annotation_file: Path, results: list[dict[str, Any]], image_ids: Sequence[int]) -> ApReport:
    """pycocotools on results in COCO's format. An empty list is a detector that found nothing: AP 0."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what we return
        truth = COCO(str(annotation_file))
        truth.dataset.setdefault("info", {})
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = [float(figure) if figure >= 0 else float("nan") for figure in evaluation.stats]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], any area, 100 detections
    names = [str(category["name"]) for category in truth.loadCats(evaluation.params.catIds)]
    per_class = {name: _mean(precision[:, :, column]) for column, name in enumerate(names)}
    ap, ap50, ap75, small, medium, large, _, _, recall_100, *_ = figures
    return ApReport(ap, ap50, ap75, small, medium, large, recall_100, per_class, len(image_ids))


def _mean(precision: np.ndarray[Any, Any]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")


def _names(labels: Sequence[Label]) -> str:
    names = [f"{label.class_id} {label.label}" for label in labels]
    return f"{len(names)} labels ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
