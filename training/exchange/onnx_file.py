"""Export of a checkpoint to one ONNX file, which is compared with torch before it gets its name.

The file holds everything from canvases to candidates (normalisation, network, top-k, box decoding) at opset 18, the
weights, and the service's information in `metadata_props`. It is written under a temporary name and run by ONNX Runtime
with another batch and canvas than the traced ones. It is renamed if it agrees with torch, and deleted otherwise.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from model.candidates import CandidateDetector
from model.files import replacing
from model.folding import fold_norms
from model.image import to_canvas
from model.metadata import MadeFor, ModelMetadata, Precision, ResizePolicy
from model.runtime.session import blank_canvas
from model.types import Candidates, CanvasImage
from training.checkpoint import Checkpoint, build_detector, describe
from training.coco import CocoDataSet
from training.exchange.int8 import Fp32Layers, quantise
from training.exchange.winograd import to_winograd

log = logging.getLogger(__name__)
OPSET = 18
"""Opset. In 18 every operator of the graph has a CUDA kernel; from 21 on, GroupNorm is split into primitives."""
INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")
TRACED = (2, 256, 384)
CHECKED = (3, 96, 224)
"""Batch, height and width that are compared. No side of a traced level may be 1, which would become a constant."""
SCORE_TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.2}
BOX_TOLERANCE: Mapping[Precision, float] = {"fp32": 0.05, "fp16": 4.0, "int8": 16.0}
"""Largest difference of boxes, canvas pixels."""
COMPARED = 100
MISSING_ALLOWED: Mapping[Precision, int] = {"fp32": 0, "fp16": 0, "int8": 20}
"""Most of an image's best COMPARED candidates that may be missing. For int8 it only detects nonsense; AP judges it."""


class ExportFailed(RuntimeError):
    """The file's outputs differ from torch's, or the graph does not pass ONNX's own checks."""


@dataclass(frozen=True)
class Calibration:
    """The pictures that give the ranges of int8's activations."""

    data_set: CocoDataSet
    num_images: int = 100
    fp32_layers: Fp32Layers = "boxes"
    reduce_range: bool = False
    """Give weights 7 bits, which is exact without VNNI too, see training/exchange/int8.py."""

    def canvases(self, resize: ResizePolicy) -> Iterator[CanvasImage]:
        """Make canvases of pictures from all parts of the data set."""
        count = min(self.num_images, len(self.data_set))
        for index in np.linspace(0, len(self.data_set) - 1, count).astype(int):
            yield to_canvas(self.data_set.read(int(index)), resize)


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    name: str,
    precision: Precision = "fp32",
    calibration: Calibration | None = None,
    made_for: MadeFor = "any",
) -> ModelMetadata:
    """Write the ONNX file. ExportFailed: it differs from the checkpoint; then `out` is unchanged.

    ValueError: int8 without a calibration, or `made_for` a CPU in another precision than fp32.
    """
    if made_for == "cpu" and precision != "fp32":
        raise ValueError(f"--for cpu is a form of fp32: leave --precision {precision} or --for away")
    if (precision == "int8") != (calibration is not None):
        raise ValueError("int8, and only int8, needs --calibration: a folder with the data set's own pictures")
    detector = build_detector(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)  # before the long part
    metadata = replace(describe(checkpoint, name, precision), made_for=made_for)
    folded = fold_norms(detector)
    model = to_onnx(half_network(folded) if precision == "fp16" else folded)
    if made_for == "cpu":
        model = to_winograd(model, blank_canvas(checkpoint.config.resize).canvas_size)
    examples = example_inputs(*CHECKED)
    if calibration is not None:
        resize = checkpoint.config.resize
        model = quantise(
            model,
            calibration.canvases(resize),
            fp32_layers=calibration.fp32_layers,
            reduce_range=calibration.reduce_range,
        )
        examples = canvas_inputs(next(calibration.canvases(resize)))
    onnx.helper.set_model_props(model, metadata.to_props())
    onnx.checker.check_model(model, full_check=True)
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
        check_equal(detector, temporary, precision, examples)
    log.info("%s: %s, %.1f MB", out, precision, out.stat().st_size / 1e6)
    return metadata


def half_network(detector: CandidateDetector) -> CandidateDetector:
    """Copy the detector with the network in fp16. Selection and decoding stay fp32: above 2,048 fp16 has no halves."""
    half = copy.deepcopy(detector)
    half.network.half()
    return half


def to_onnx(detector: CandidateDetector) -> onnx.ModelProto:
    """Trace the module with named dynamic batch, height and width."""
    batch, height, width = TRACED
    images, sizes = example_inputs(batch, height, width)
    with _quiet_exporter():
        program = torch.onnx.export(
            detector,
            (images, sizes),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({0: "batch", 1: "height", 2: "width"}, {0: "batch"}),
            verbose=False,
        )
    assert program is not None
    return without_traces(program.model_proto)


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's notes on the origin of each value, which hold paths of this machine."""
    graph = model.graph
    for entry in [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        del entry.metadata_props[:]
    return model


def check_equal(detector: CandidateDetector, file: Path, precision: Precision, examples: tuple[Tensor, Tensor]) -> None:
    """Run both with another batch and canvas than the traced ones. ExportFailed: they differ."""
    images, sizes = examples
    with torch.inference_mode():
        expected = [output.numpy() for output in detector(images, sizes)]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"], enable_fallback=0)
    found = session.run(OUTPUTS, {"images": images.numpy(), "sizes": sizes.numpy()})
    for name, ours, theirs in zip(OUTPUTS, found, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ExportFailed(f"{name}: {ours.dtype} {ours.shape} here, {theirs.dtype} {theirs.shape} in torch")
    for ours, theirs in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        _compare(Candidates(*ours), Candidates(*theirs), precision)
    log.info("ONNX Runtime agrees with torch on %d canvases of %d x %d", *images.shape[:3])


def _compare(found: Candidates, expected: Candidates, precision: Precision) -> None:
    """Check that each of torch's best candidates is among ONNX Runtime's; equal scores may be in another order."""
    best = np.argsort(-expected.scores)[:COMPARED]
    same_label = expected.labels[best, None] == found.labels
    score_error = np.abs(expected.scores[best, None] - found.scores)
    box_error = np.abs(expected.boxes[best, None] - found.boxes).max(axis=-1)
    fits = same_label & (score_error <= SCORE_TOLERANCE[precision]) & (box_error <= BOX_TOLERANCE[precision])
    missing = int((~fits.any(axis=1)).sum())
    if missing > MISSING_ALLOWED[precision]:
        raise ExportFailed(f"ONNX Runtime lacks {missing} of torch's best {COMPARED} candidates")


def canvas_inputs(canvas: CanvasImage) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(canvas.pixels[None]), torch.tensor([canvas.size])


def example_inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Make noise images, each with a valid part of another size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[height - 7 * image, width - 3 * image] for image in range(batch)])
    return images, sizes


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
