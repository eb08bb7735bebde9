"""Candidates → Detections: threshold, per-class NMS, label filter, best n."""

from collections.abc import Collection

from model.types import Candidates, Detections


def suppress(
    candidates: Candidates,
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    label_ids: Collection[int] | None = None,
) -> Detections:
    """Canvas pixels. In this order: keep score > score_threshold; per class drop IoU > nms_threshold; keep `label_ids`
    (None: all); keep the best max_detections. Thread-safe."""
    raise NotImplementedError
