"""The Python client of retinaserve: pictures in, boxes out. It retries when the service is overloaded or restarts.

with Client("http://127.0.0.1:8000") as client:
    for detection in client.detect("photo.jpg", score_threshold=0.5):
        print(detection.label, detection.score, detection.box)
"""

from retinaserve_client.answer import Answer, Box, Defaults, Detection, ImageSize, Label, Model, ModelName, Timing
from retinaserve_client.asynchronous import AsyncClient
from retinaserve_client.calls import Options
from retinaserve_client.errors import DetectError
from retinaserve_client.images import Image
from retinaserve_client.synchronous import Client

__all__ = [
    "Answer",
    "AsyncClient",
    "Box",
    "Client",
    "Defaults",
    "DetectError",
    "Detection",
    "Image",
    "ImageSize",
    "Label",
    "Model",
    "ModelName",
    "Options",
    "Timing",
]
