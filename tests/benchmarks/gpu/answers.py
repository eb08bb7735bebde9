"""Write what a file detects in pictures on a device.

    python -m tests.benchmarks.gpu.answers FILE.onnx DEVICE PICTURES OUT.npz

A process of its own, since arithmetic is chosen by an environment variable that CUDA's libraries read once. PICTURES:
a folder of JPEGs. With CUDA also of batches: the first 8 pictures of one canvas at once, and one by one.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.detector import Detector
from model.image import decode_image, to_canvas
from model.types import Candidates, CanvasImage, Detections

Arrays = dict[str, NDArray[Any]]
BATCH = 8


def main(model: str, device: str, pictures: str, out: str) -> None:
    detector = Detector(Path(model), device=device)  # type: ignore[arg-type]
    images = [decode_image(path.read_bytes()) for path in sorted(Path(pictures).glob("*.jpg"))]
    kept = as_arrays("alone", [detector.detect(image) for image in images])
    canvases = [to_canvas(image, detector.metadata.resize) for image in images]
    batch = [canvas for canvas in canvases if canvas.canvas_size == canvases[0].canvas_size][:BATCH]
    if device == "cuda":
        kept |= as_arrays("batch", detector.run(batch)) | as_arrays("single", singles(detector, batch))
    np.savez(out, provider=np.array(detector.provider), batch=np.array(len(batch)), **kept)


def singles(detector: Detector, batch: Sequence[CanvasImage]) -> list[Candidates]:
    return [candidates for canvas in batch for candidates in detector.run([canvas])]


def as_arrays(name: str, found: Sequence[Detections | Candidates]) -> Arrays:
    return {
        f"{name} {number} {field}": getattr(each, field)
        for number, each in enumerate(found)
        for field in ("boxes", "scores", "labels")
    }


def from_arrays(name: str, arrays: Mapping[str, NDArray[Any]]) -> Iterator[Detections]:
    number = 0
    while f"{name} {number} boxes" in arrays:
        yield Detections(*(arrays[f"{name} {number} {field}"] for field in ("boxes", "scores", "labels")))
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
