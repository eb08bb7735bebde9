"""`POST /`: Hugging Face's object-detection form, as `huggingface_hub.InferenceClient.object_detection` sends it.

In: the bytes of an image, or JSON {"inputs": "<base64>", "parameters": {"threshold": 0.5}}, where the parameters of
`/detect` are accepted too. Out: the bare list of detections. Everything else is as in `/detect`.
"""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.detection import Detection
from service.api.paths import HUGGING_FACE
from service.api.replies import as_list
from service.api.uploads import JsonImage, MalformedRequest

INPUTS, PARAMETERS, THRESHOLD, OURS = "inputs", "parameters", "threshold", "score_threshold"


@dataclass
class InputsJson(JsonImage):
    name: str = INPUTS

    def read_others(self, others: dict[str, Any]) -> None:
        parameters = others.pop(PARAMETERS, None)
        super().read_others(others)
        if parameters is None:
            return
        if not isinstance(parameters, dict):
            raise MalformedRequest(f"{PARAMETERS!r} is not an object")
        threshold = parameters.pop(THRESHOLD, None)
        if threshold is not None:
            if parameters.get(OURS) is not None:
                raise MalformedRequest(f"{THRESHOLD!r} and {OURS!r} are two names of one thing: send one of them")
            parameters[OURS] = threshold
        if isinstance(parameters.get("label"), str):
            parameters["label"] = [parameters["label"]]
        self.parameters = parameters


class HuggingFace:
    def __init__(self, detection: Detection, max_image_bytes: int) -> None:
        self._detection = detection
        self._max_image_bytes = max_image_bytes

    @property
    def routes(self) -> list[Route]:
        return [Route(HUGGING_FACE, self.object_detection, methods=["POST"])]

    async def object_detection(self, request: Request) -> Response:
        """Answer one image with the list of its detections."""
        json = InputsJson(max_image_bytes=self._max_image_bytes)
        return await self._detection.respond(request, as_list, json=json)
