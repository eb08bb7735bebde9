"""AP with other canvases and resize rules: the same file and the same pictures.

    python -m tests.benchmarks.canvas --data DIR [--model FILE.onnx] [--images N]

Prints a markdown table for docs/benchmarks.md. Deterministic: it measures no times.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from model.detector import Detector
from model.image import resized_size, to_canvas, to_original
from model.pretrained import PRETRAINED
from model.suppress import suppress
from model.types import CanvasImage, Detections, Pixels, coco_results
from training.coco import CocoDataSet, load_coco
from training.evaluate import average_precision

MakeCanvas = Callable[[Pixels], CanvasImage]
ENLARGED = 4
"""Pictures of 480 px become 1,920 px, which 800 px is less than half of."""


def widened(canvas: CanvasImage, height: int, width: int) -> CanvasImage:
    """The same picture on a canvas at least this large."""
    rows, columns = canvas.canvas_size
    pixels = np.zeros((max(height, rows), max(width, columns), 3), np.uint8)
    pixels[:rows, :columns] = canvas.pixels
    return CanvasImage(pixels, canvas.size, canvas.original_size)


def common_canvas(canvas: CanvasImage) -> CanvasImage:
    height, width = canvas.size
    return widened(canvas, *((800, 1344) if width >= height else (1344, 800)))


def one_cell_wider(canvas: CanvasImage) -> CanvasImage:
    height, width = canvas.canvas_size
    return widened(canvas, height, width + 32)


def ap_with(
    detector: Detector, data_set: CocoDataSet, limit: int, change: Callable[[Pixels], Pixels], make: MakeCanvas
) -> float:
    """AP when each picture is changed, then laid out by `make`; boxes are scaled back to the annotated size."""
    metadata = detector.metadata
    results = []
    for index, picture in enumerate(tqdm(data_set.pictures[:limit], leave=False)):
        pixels = change(data_set.read(index))
        canvas = make(pixels)
        found = suppress(
            detector.run([canvas])[0],
            score_threshold=metadata.score_threshold,
            nms_threshold=metadata.nms_threshold,
            max_detections=metadata.max_detections,
        )
        found = to_original(found, canvas)
        scale = np.float32(picture.size[0] / pixels.shape[0])
        results += coco_results(picture.image_id, Detections(found.boxes * scale, found.scores, found.labels))
    return average_precision(data_set, results, [p.image_id for p in data_set.pictures[:limit]]).ap


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    detector, data_set = Detector(options.model, device="cpu"), load_coco(options.data, "val")
    policy = detector.metadata.resize

    def plain(pixels: Pixels) -> CanvasImage:
        return to_canvas(pixels, policy)

    def bilinear(pixels: Pixels) -> CanvasImage:
        """As torchvision would: no averaging, however strongly the picture shrinks."""
        height, width = resized_size(*pixels.shape[:2], policy)
        resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        pad = (-height % policy.divisor, -width % policy.divisor)
        padded = np.pad(resized, ((0, pad[0]), (0, pad[1]), (0, 0)))
        return CanvasImage(padded, (height, width), (pixels.shape[0], pixels.shape[1]))

    def same(pixels: Pixels) -> Pixels:
        return pixels

    def enlarged(pixels: Pixels) -> Pixels:
        return cv2.resize(pixels, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)  # type: ignore[no-any-return]

    rows: list[tuple[str, Callable[[Pixels], Pixels], MakeCanvas]] = [
        ("the picture's own canvas, multiples of 32 (what serves)", same, plain),
        ("32 px wider", same, lambda pixels: one_cell_wider(plain(pixels))),
        ("one canvas for all: 800×1344 or 1344×800", same, lambda pixels: common_canvas(plain(pixels))),
        (f"pictures enlarged {ENLARGED}×, shrunk by area first (what serves)", enlarged, plain),
        (f"pictures enlarged {ENLARGED}×, bilinear alone (torchvision's rule)", enlarged, bilinear),
    ]
    print(f"`python -m tests.benchmarks.canvas --data DIR --images {options.images}`\n")
    print("| canvas | AP@[0.50:0.95] |\n|---|---|")
    for name, change, make in rows:
        print(f"| {name} | {ap_with(detector, data_set, options.images, change, make):.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
