"""The values that pass between the stages of detection.

bytes --decode_image--> RGB uint8 [H, W, 3] --to_canvas--> CanvasImage --Detector.run--> Candidates
      --suppress--> Detections (canvas pixels) --to_original--> Detections (original pixels)

Boxes are xyxy float32. The function that returns them says whether they are in canvas or in original pixels. Sizes are
(height, width).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""RGB [height, width, 3], values 0 to 255."""


@dataclass(frozen=True, eq=False)
class CanvasImage:
    """An image, resized and placed in the top left corner of the network's input."""

    pixels: Pixels
    """Pixels [canvas height, canvas width, 3]; rows and columns beyond `size` are padding."""
    size: tuple[int, int]
    """Size (height, width) of the valid part."""
    original_size: tuple[int, int]
    """Size (height, width) of the upright image before resizing."""

    @classmethod
    def uniform(cls, size: tuple[int, int], value: int = 0) -> Self:
        """Make a canvas of this (height, width) in one grey, all of it valid."""
        return cls(np.full((*size, 3), value, np.uint8), size, size)

    @property
    def canvas_size(self) -> tuple[int, int]:
        height, width, _ = self.pixels.shape
        return height, width


@dataclass(frozen=True, eq=False)
class Candidates:
    """The network's outputs for one image, before threshold and NMS, in canvas pixels."""

    boxes: NDArray[np.float32]
    """[candidates, 4] xyxy, clipped to the valid part of the canvas."""
    scores: NDArray[np.float32]
    """[candidates], 0 to 1; below 0 for the pairs that a pyramid level has fewer than 1,000."""
    labels: NDArray[np.int64]
    """[candidates] category ids."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, best score first."""

    boxes: NDArray[np.float32]
    """[detections, 4] xyxy."""
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    """[detections] category ids."""

    def __len__(self) -> int:
        return len(self.scores)


def coco_results(image_id: int | str, detections: Detections) -> list[dict[str, Any]]:
    """Convert detections to COCO's results format: bbox is [x, y, width, height]. Nothing is rounded."""
    boxes = detections.boxes.astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": class_id, "bbox": box, "score": score}
        for box, score, class_id in zip(
            boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]
