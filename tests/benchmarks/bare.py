"""The baseline of service.py: a minimal service with FastAPI, one route, and the work in its thread pool.

    python -m tests.benchmarks.bare MODEL.onnx PORT

It has the same detector, decoding and answer, but no bounds, queue, deadlines, metrics or log.
"""

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from model.detector import Detector
from model.image import decode_image


def make_app(path: Path) -> FastAPI:
    app = FastAPI()
    detector = Detector(path, device="cpu")
    names = {label.class_id: label.label for label in detector.metadata.labels}

    def detect(data: bytes) -> dict[str, Any]:
        found = detector.detect(decode_image(data))
        corners = ("xmin", "ymin", "xmax", "ymax")
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        return {
            "detections": [
                {"label": names[label], "class_id": label, "score": score, "box": dict(zip(corners, box, strict=True))}
                for label, score, box in rows
            ]
        }

    @app.post("/detect", response_model=None)
    async def post(request: Request) -> dict[str, Any]:
        return await run_in_threadpool(detect, await request.body())

    @app.get("/readyz")
    async def ready() -> dict[str, Any]:
        return {}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(Path(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
