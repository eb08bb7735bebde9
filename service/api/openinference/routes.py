"""The routes below /v2: health, metadata, and inference, which uses the code of `/detect`.

There is one model, of one version. Errors have a problem's members and `error`, see `middleware.response_of`.
https://github.com/kserve/open-inference-protocol
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.detection import Detection
from service.api.errors import UnknownModel
from service.api.openinference.pictures import Limits
from service.api.openinference.request import InferBody, Wanted, json_bytes_of
from service.api.openinference.tensors import HEADER_LENGTH, INPUT, OUTPUTS, TensorReply, answer_of, as_tensors
from service.api.parameters import options, read_query, with_parameters
from service.api.paths import (
    OPEN_INFERENCE,
    OPEN_INFERENCE_LIVE,
    OPEN_INFERENCE_MODEL,
    OPEN_INFERENCE_READY,
    VERSION,
)
from service.api.service import Service
from service.api.uploads import ENCODED
from service.core.store import LoadedModel, NotReady
from service.metrics import program_version

THE_VERSION = "1"
PLATFORM = "onnxruntime_onnx"
"""Triton's name for ONNX models."""

Endpoint = Callable[[Request], Awaitable[Response]]


class OpenInference:
    """The endpoints, around the parts of the service."""

    def __init__(self, service: Service, detection: Detection) -> None:
        settings = service.settings
        self._service = service
        self._detection = detection
        self._limits = Limits(detection.max_batch_images, settings.max_image_bytes, settings.max_image_pixels)
        image_bytes = max(int(settings.max_image_bytes * ENCODED), settings.max_image_pixels * 3)
        self._most_bytes = detection.max_batch_images * image_bytes

    @property
    def routes(self) -> list[Route]:
        return [
            Route(OPEN_INFERENCE, self.server),
            Route(OPEN_INFERENCE_LIVE, self.live),
            Route(OPEN_INFERENCE_READY, self.ready),
            *self._of_the_model("", self.model),
            *self._of_the_model("/ready", self.model_ready),
            *self._of_the_model("/infer", self.infer, "POST"),
        ]

    def _of_the_model(self, end: str, endpoint: Endpoint, method: str = "GET") -> list[Route]:
        starts = (OPEN_INFERENCE_MODEL, OPEN_INFERENCE_MODEL + VERSION)
        return [Route(start + end, endpoint, methods=[method]) for start in starts]

    async def server(self, request: Request) -> Response:
        return _json(name="retinaserve", version=program_version(), extensions=["binary_tensor_data"])

    async def live(self, request: Request) -> Response:
        return _status(self._service.why_not_alive(), live=True)

    async def ready(self, request: Request) -> Response:
        """Answer with the member that the clients read, and with the one in the protocol's schema."""
        return _status(self._service.why_not_ready(), ready=True, live=True)

    async def model(self, request: Request) -> Response:
        name = self._asked_for(request).name
        outputs = [
            {"name": output, "datatype": each.datatype, "shape": [-1, *each.inner_shape]}
            for output, each in OUTPUTS.items()
        ]
        return _json(name=name, versions=[THE_VERSION], platform=PLATFORM, inputs=[INPUT], outputs=outputs)

    async def model_ready(self, request: Request) -> Response:
        return _status(self._service.why_not_ready(), name=self._asked_for(request).name, ready=True)

    async def infer(self, request: Request) -> Response:
        """Answer all pictures, or with the first picture's error: the protocol has no partial answers."""
        service, model = self._service, self._asked_for(request)
        query = read_query(request.query_params)
        body = InferBody(json_bytes_of(request.headers.get(HEADER_LENGTH)), self._limits)
        most_bytes = service.uploads.max_body_bytes(self._most_bytes)
        (wanted, images), size = await service.uploads.receive_form(body, most_bytes, request.headers, request.receive)
        asked = options(with_parameters(query, wanted.parameters), service.settings, model)
        finish = partial(as_tensors, outputs=wanted.outputs)
        replies = await self._detection.run(
            request, images, size, model, asked, finish, timeout_seconds=wanted.timeout_seconds
        )
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return _infer_response(replies, wanted, model)

    def _asked_for(self, request: Request) -> LoadedModel:
        """Return the serving model. NotReady: there is none. UnknownModel: the path names another model or version."""
        model = self._service.store.serving()
        name, version = request.path_params["name"], request.path_params.get("version", THE_VERSION)
        if name != model.name:
            raise UnknownModel(f"unknown model {name!r}; {model.name!r} is served here")
        if version != THE_VERSION:
            raise UnknownModel(f"{name!r} has no version {version!r}; its only one is {THE_VERSION!r}")
        return model


def _infer_response(replies: Sequence[TensorReply], wanted: Wanted, model: LoadedModel) -> Response:
    members = {"model_name": model.name, "model_version": THE_VERSION, "parameters": {"sha256": model.detector.sha256}}
    if wanted.id is not None:
        members["id"] = wanted.id
    body, json_bytes = answer_of(replies, wanted.outputs, members)
    if json_bytes is None:
        return Response(body, media_type="application/json")
    return Response(body, headers={HEADER_LENGTH: str(json_bytes)}, media_type="application/octet-stream")


def _status(why_not: str | None, **good: Any) -> Response:
    if why_not is not None:
        raise NotReady(why_not)
    return _json(**good)


def _json(**values: Any) -> Response:
    return Response(to_json(values), media_type="application/json")
