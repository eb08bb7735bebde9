"""COCO average precision of a checkpoint or an ONNX file, by the code that serves: decode, resize, canvas, NMS, labels.

In: a COCO-format data set and a function from canvases to candidates. Out: `ApReport`, with pycocotools' figures.
Source of the metric: Lin et al. 2014 (COCO); pycocotools is the reference implementation itself.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.candidates import CandidateDetector
from model.detector import Detector, Device
from model.image import to_canvas, to_original
from model.metadata import Label, ResizePolicy
from model.retinanet import LevelOutputs
from model.suppress import suppress
from model.tiles import Tiling, detect_in_tiles
from model.types import Candidates, CanvasImage, Detections, Pixels, coco_results
from training.checkpoint import build_detector, load_checkpoint
from training.coco import CocoDataSet, InvalidDataSet
from training.config import DetectionConfig
from training.distributed import ALONE, Ranks
from training.evaluation.average_precision import ApReport, Results, average_precision, warn_of_crowding

log = logging.getLogger(__name__)
FindCandidates = Callable[[Sequence[CanvasImage]], list[Candidates]]
"""A function from canvases of one size to the candidates of each, such as `model.detector.Detector.run`."""
OnPicture = Callable[[int, Pixels, Detections], None]
"""A function that is called for each evaluated picture with its index, pixels and detections."""
OnOutputs = Callable[[LevelOutputs, CanvasImage], None]
"""A function that is called with a network's outputs and their canvas."""


@dataclass(frozen=True)
class Predictor:
    """A function from canvases to candidates, with all that makes detections of it."""

    run: FindCandidates
    labels: tuple[Label, ...]
    resize: ResizePolicy
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    scales: tuple[int, ...] = ()
    """Shorter sides, px, of an image pyramid whose candidates share one NMS; empty: the resize policy's own."""
    tiling: Tiling | None = None
    """Windows in which to detect too; None: none."""

    def __call__(self, image: Pixels) -> Detections:
        """Detect in one upright picture, in its pixels."""
        if self.tiling is not None:
            return detect_in_tiles(image, self.tiling, self.resize, self.run, **asdict(self.detection))
        canvases = [to_canvas(image, scaled(self.resize, scale)) for scale in self.scales or [self.resize.shorter_side]]
        candidates = merged([self.run([canvas])[0] for canvas in canvases], canvases)
        detections = suppress(candidates, **asdict(self.detection))
        return to_original(detections, canvases[0])


def scaled(resize: ResizePolicy, shorter_side: int) -> ResizePolicy:
    """Scale the policy to another shorter side, with its longest side in proportion."""
    longest_side = round(resize.longest_side * shorter_side / resize.shorter_side)
    return replace(resize, shorter_side=shorter_side, longest_side=longest_side)


def merged(candidates: Sequence[Candidates], canvases: Sequence[CanvasImage]) -> Candidates:
    """Join the candidates of one picture's canvases, in pixels of the first."""
    height, width = canvases[0].size
    boxes = []
    for found, canvas in zip(candidates, canvases, strict=True):
        ratio = np.array([width / canvas.size[1], height / canvas.size[0]], np.float32)
        boxes.append(found.boxes * np.tile(ratio, 2))
    return Candidates(
        np.concatenate(boxes),
        np.concatenate([found.scores for found in candidates]),
        np.concatenate([found.labels for found in candidates]),
    )


def open_predictor(model: Path, device: Device = "auto") -> Predictor:
    """Make a predictor of an .onnx file or of a checkpoint's best weights."""
    if model.suffix == ".onnx":
        detector = Detector(model, device=device)
        metadata = detector.metadata
        detection = DetectionConfig(metadata.score_threshold, metadata.nms_threshold, metadata.max_detections)
        return Predictor(detector.run, metadata.labels, metadata.resize, detection)
    checkpoint = load_checkpoint(model)
    detector_module = build_detector(checkpoint).to(choose_device(device))
    return torch_predictor(detector_module, checkpoint.labels, checkpoint.config.resize, checkpoint.config.detection)


def torch_predictor(
    detector: CandidateDetector,
    labels: tuple[Label, ...],
    resize: ResizePolicy,
    detection: DetectionConfig,
    *,
    on_outputs: OnOutputs | None = None,
) -> Predictor:
    """Make a predictor of a torch module that predicts as the exported file would."""
    return Predictor(torch_run(detector, on_outputs), labels, resize, detection)


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def torch_run(detector: CandidateDetector, on_outputs: OnOutputs | None = None) -> FindCandidates:
    """Make a function of the torch module that does as `Detector.run`. `on_outputs` needs canvases one by one."""
    device = next(detector.parameters()).device

    def run(canvases: Sequence[CanvasImage]) -> list[Candidates]:
        images = torch.from_numpy(np.stack([canvas.pixels for canvas in canvases])).to(device)
        sizes = torch.tensor([canvas.size for canvas in canvases], device=device)
        with torch.inference_mode():
            outputs = detector.outputs(images, sizes)
            if on_outputs is not None:
                [canvas] = canvases
                on_outputs(outputs, canvas)
            chosen = detector.select(outputs, sizes, canvases[0].canvas_size)
        return [Candidates(*answer) for answer in zip(*(values.cpu().numpy() for values in chosen), strict=True)]

    return run


def evaluate(
    predictor: Predictor,
    data_set: CocoDataSet,
    *,
    limit: int = 0,
    progress: bool = True,
    skip_unreadable: bool = False,
    ranks: Ranks = ALONE,
    on_picture: OnPicture | None = None,
) -> ApReport:
    """Compute AP on the first `limit` pictures (0: all), divided among the ranks; every rank gets the report.

    InvalidDataSet: it has labels that the model lacks, or a picture cannot be read. With `skip_unreadable`, such
    pictures are named and do not count, but at least one must remain.
    """
    refuse_unknown_labels(predictor.labels, data_set)
    if ranks.is_first:
        warn_of_crowding(data_set)
    indices = ranks.share(range(len(data_set))[: limit or None])
    found: list[tuple[int, Results]] = []
    unreadable: list[str] = []
    for index in tqdm(indices, desc="evaluate", unit="picture", disable=not (progress and ranks.is_first)):
        try:
            pixels = data_set.read(index)
        except InvalidDataSet as error:
            if not skip_unreadable:
                raise InvalidDataSet(f"{error}; --unreadable skip continues without it") from error
            unreadable.append(str(error))
            log.warning("not evaluated: %s", error)
        else:
            detections = predictor(pixels)
            if on_picture is not None:
                on_picture(index, pixels, detections)
            found.append((index, coco_results(data_set.pictures[index].image_id, detections)))
    found = sorted(ranks.gather(found), key=lambda result: result[0])
    if not found:
        raise InvalidDataSet(f"none of the pictures can be read, so there is no AP: {ranks.gather(unreadable)[0]}")
    report = None
    if ranks.is_first:
        image_ids = [data_set.pictures[index].image_id for index, _ in found]
        results = [result for _, of_picture in found for result in of_picture]
        report = average_precision(data_set, results, image_ids)
    return ranks.from_first(report)


def refuse_unknown_labels(labels: Sequence[Label], data_set: CocoDataSet) -> None:
    """Raise InvalidDataSet if the data set has labels that the model lacks. (COCO's weights have columns without
    labels.)

    A class-agnostic data set fits any model, because labels do not count.
    """
    if not data_set.class_agnostic and not set(labels) >= set(data_set.labels):
        raise InvalidDataSet(
            f"the model knows {_names(labels)}; {data_set.annotation_file} has {_names(data_set.labels)}"
        )


def _names(labels: Sequence[Label]) -> str:
    names = [f"{label.class_id} {label.label}" for label in labels]
    return f"{len(names)} labels ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
