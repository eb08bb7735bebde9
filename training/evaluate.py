"""COCO average precision of a checkpoint or an ONNX file, through the very decode, resize, canvas, NMS and labels that
serve.

In: a COCO-format data set and anything that turns canvases into candidates. Out: `ApReport`, pycocotools' figures.
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
"""Canvases of one size to the candidates of each, as `model.detector.Detector.run` has it."""
OnPicture = Callable[[int, Pixels, Detections], None]
"""Told of each evaluated picture: its index, its pixels, what was found there."""
OnOutputs = Callable[[LevelOutputs, CanvasImage], None]
"""Told of what a network answered, and of the canvas that it looked at."""


@dataclass(frozen=True)
class Predictor:
    """Canvases to candidates, with what surrounds it."""

    run: FindCandidates
    labels: tuple[Label, ...]
    resize: ResizePolicy
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    scales: tuple[int, ...] = ()
    """Shorter sides, px, of an image pyramid whose candidates go through one NMS; none: the resize policy's own."""
    tiling: Tiling | None = None
    """Look at the picture's windows, too."""

    def __call__(self, image: Pixels) -> Detections:
        """The objects of one upright picture, in its pixels."""
        if self.tiling is not None:
            return detect_in_tiles(image, self.tiling, self.resize, self.run, **asdict(self.detection))
        canvases = [to_canvas(image, scaled(self.resize, scale)) for scale in self.scales or [self.resize.shorter_side]]
        candidates = merged([self.run([canvas])[0] for canvas in canvases], canvases)
        detections = suppress(candidates, **asdict(self.detection))
        return to_original(detections, canvases[0])


def scaled(resize: ResizePolicy, shorter_side: int) -> ResizePolicy:
    """The policy at another size, its bound on the longer side in proportion."""
    longest_side = round(resize.longest_side * shorter_side / resize.shorter_side)
    return replace(resize, shorter_side=shorter_side, longest_side=longest_side)


def merged(candidates: Sequence[Candidates], canvases: Sequence[CanvasImage]) -> Candidates:
    """Join those of one picture's canvases, in the pixels of the first."""
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
    """A predictor of an .onnx file or of a checkpoint's best weights."""
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
    """Predict as the exported file would."""
    return Predictor(torch_run(detector, on_outputs), labels, resize, detection)


def choose_device(device: Device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def torch_run(detector: CandidateDetector, on_outputs: OnOutputs | None = None) -> FindCandidates:
    """Make of the torch module what `Detector.run` is of a file. `on_outputs`: needs canvases one by one."""
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
    """AP on the first `limit` pictures (0: all), each looked at by one of the ranks; every rank gets the report.

    InvalidDataSet: it has labels that the model lacks, or a picture cannot be read and `skip_unreadable` is not set;
    set, such pictures are named and do not count, and one at least has to be left.
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
                raise InvalidDataSet(f"{error}; --unreadable skip goes on without it") from error
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
    """InvalidDataSet: the data set has others. (COCO's imported weights have columns that COCO leaves out.)

    Of a class-agnostic data set any model may find the objects; what it calls them does not matter.
    """
    if not data_set.class_agnostic and not set(labels) >= set(data_set.labels):
        raise InvalidDataSet(
            f"the model knows {_names(labels)}; {data_set.annotation_file} has {_names(data_set.labels)}"
        )


def _names(labels: Sequence[Label]) -> str:
    names = [f"{label.class_id} {label.label}" for label in labels]
    return f"{len(names)} labels ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
