"""The detection that every peer serves: the same file, decoding, threads, NMS and answer as ours, by our own code.

`peers.py` names the model in BENCHMARK_MODEL, the threads of an inference in BENCHMARK_THREADS and the port in
BENCHMARK_PORT. Needs of our packages `model` alone.
"""

import os
import threading
from pathlib import Path
from typing import Any

from model.detector import Detector
from model.image import decode_image, to_canvas, to_original
from model.suppress import suppress

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def port() -> int:
    return int(os.environ["BENCHMARK_PORT"])


class Detection:
    """Bytes to the answer's values. Thread-safe; inferences take turns, because two at once on the same cores lose a
    fifth of the throughput, while decoding and NMS run beside them."""

    def __init__(self) -> None:
        threads = int(os.environ["BENCHMARK_THREADS"])
        self._detector = Detector(Path(os.environ["BENCHMARK_MODEL"]), device="cpu", threads=threads)
        self._names = {label.class_id: label.label for label in self._detector.metadata.labels}
        self._turn = threading.Lock()
        self._detector.warm_up()

    def __call__(self, data: bytes) -> dict[str, Any]:
        metadata = self._detector.metadata
        canvas = to_canvas(decode_image(data), metadata.resize)
        with self._turn:
            [candidates] = self._detector.run([canvas])
        kept = suppress(
            candidates,
            score_threshold=metadata.score_threshold,
            nms_threshold=metadata.nms_threshold,
            max_detections=metadata.max_detections,
        )
        found = to_original(kept, canvas)
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        return {
            "detections": [
                {
                    "label": self._names[label],
                    "class_id": label,
                    "score": score,
                    "box": dict(zip(CORNERS, box, strict=True)),
                }
                for label, score, box in rows
            ]
        }
