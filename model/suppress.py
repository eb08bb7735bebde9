"""Candidates → Detections: threshold, per-class non-maximum suppression, label filter, best n.

ONNX Runtime's NonMaxSuppression operator does the work, in a graph of that one node, always on the CPU. Classes are
separate rows of scores, so boxes need not be shifted by class, as in the usual single NMS over all classes.
"""

import base64
from collections.abc import Collection
from functools import cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from model.types import Candidates, Detections

# The serialised model (opset 18) whose text is this; tests/model/test_suppress.py holds the two together:
# nms (float[1,n,4] boxes, float[1,c,n] scores, int64 limit, float threshold, float floor) => (int64[k,3] kept) {
#     kept = NonMaxSuppression (boxes, scores, limit, threshold, floor)
# }
GRAPH = base64.b64decode(
    "CAo62AEKQwoFYm94ZXMKBnNjb3JlcwoFbGltaXQKCXRocmVzaG9sZAoFZmxvb3ISBGtlcHQiEU5vbk1heFN1cHByZXNzaW9uOgASA25tc1ocCg"
    "Vib3hlcxITChEIARINCgIIAQoDEgFuCgIIBFoeCgZzY29yZXMSFAoSCAESDgoCCAEKAxIBYwoDEgFuWg8KBWxpbWl0EgYKBAgHEgBaEwoJdGhy"
    "ZXNob2xkEgYKBAgBEgBaDwoFZmxvb3ISBgoECAESAGIXCgRrZXB0Eg8KDQgHEgkKAxIBawoCCANCBAoAEBI="
)

HEAD = 2
"""Candidates that are tried first, in multiples of max_detections."""


def suppress(
    candidates: Candidates,
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    label_ids: Collection[int] | None = None,
) -> Detections:
    """Make detections of candidates, in their frame. Thread-safe.

    The order is: keep score > score_threshold; per class drop IoU > nms_threshold with a better one; keep `label_ids`
    (None: all); keep the best max_detections. Of equal scores the earlier candidate is better. A score of NaN passes no
    threshold; a box with NaN overlaps nothing.
    """
    passing = candidates.scores > score_threshold
    if label_ids is not None:  # classes do not see each other in NMS: dropping some before changes nothing
        passing &= np.isin(candidates.labels, list(label_ids))
    indices = np.flatnonzero(passing)
    best_first = indices[np.argsort(-candidates.scores[indices], kind="stable")]
    head = best_first[: HEAD * max_detections]
    kept = _per_class_nms(candidates, head, nms_threshold, max_detections)
    if len(kept) < max_detections and len(head) < len(best_first):
        kept = _per_class_nms(candidates, best_first, nms_threshold, max_detections)
    kept = kept[:max_detections]
    return Detections(candidates.boxes[kept], candidates.scores[kept], candidates.labels[kept])


def _per_class_nms(candidates: Candidates, indices: NDArray[np.intp], threshold: float, limit: int) -> NDArray[np.intp]:
    """Return those of `indices` (best first) that survive NMS, in their order. `limit` caps each class: the others of
    the class cannot be among the best `limit` of all."""
    if not len(indices):
        return indices
    classes, row = np.unique(candidates.labels[indices], return_inverse=True)
    per_class = np.full((len(classes), len(indices)), -1, np.float32)
    per_class[row, np.arange(len(indices))] = candidates.scores[indices]
    inputs = {
        "boxes": candidates.boxes[None, indices],
        "scores": per_class[None],
        "limit": np.array(limit, np.int64),
        "threshold": np.array(threshold, np.float32),
        "floor": np.array(-1, np.float32),
    }
    [batch_class_position] = _session().run(None, inputs)
    survivors: NDArray[np.intp] = indices[np.sort(batch_class_position[:, 2])]
    return survivors


@cache
def _session() -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(GRAPH, options, providers=["CPUExecutionProvider"])
