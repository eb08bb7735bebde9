"""The routes below /v2: health, metadata, and inference by the way of `/detect`.

One model, of one version. Errors have `error` beside the members of a problem, see `middleware.response_of`.
https://github.com/kserve/open-inference-protocol
"""

from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.api.errors import UnknownModel
from service.api.openinference.tensors import INPUT, OUTPUTS
from service.api.paths import (
    OPEN_INFERENCE,
    OPEN_INFERENCE_LIVE,
    OPEN_INFERENCE_MODEL,
    OPEN_INFERENCE_READY,
    VERSION,
)
from service.api.service import Service
from service.core.store import LoadedModel, NotReady
from service.metrics import program_version

THE_VERSION = "1"
PLATFORM = "onnxruntime_onnx"
"""Triton's name for it."""

Endpoint = Callable[[Request], Awaitable[Response]]


class OpenInference:
    """The endpoints, around the parts of the service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def routes(self) -> list[Route]:
        return [
            Route(OPEN_INFERENCE, self.server),
            Route(OPEN_INFERENCE_LIVE, self.live),
            Route(OPEN_INFERENCE_READY, self.ready),
            *self._of_the_model("", self.model),
            *self._of_the_model("/ready", self.model_ready),
        ]

    def _of_the_model(self, end: str, endpoint: Endpoint, method: str = "GET") -> list[Route]:
        starts = (OPEN_INFERENCE_MODEL, OPEN_INFERENCE_MODEL + VERSION)
        return [Route(start + end, endpoint, methods=[method]) for start in starts]

    async def server(self, request: Request) -> Response:
        return _json(name="retinaserve", version=program_version(), extensions=["binary_tensor_data"])

    async def live(self, request: Request) -> Response:
        return _status(self._service.why_not_alive(), live=True)

    async def ready(self, request: Request) -> Response:
        """Answer in the word that the clients read, and in the one that the protocol's schema has."""
        return _status(self._service.why_not_ready(), ready=True, live=True)

    async def model(self, request: Request) -> Response:
        name = self._asked_for(request).name
        return _json(name=name, versions=[THE_VERSION], platform=PLATFORM, inputs=[INPUT], outputs=list(OUTPUTS))

    async def model_ready(self, request: Request) -> Response:
        return _status(self._service.why_not_ready(), name=self._asked_for(request).name, ready=True)

    def _asked_for(self, request: Request) -> LoadedModel:
        """The model that serves. NotReady: there is none. UnknownModel: the path names another, or another version."""
        model = self._service.store.serving()
        name, version = request.path_params["name"], request.path_params.get("version", THE_VERSION)
        if name != model.name:
            raise UnknownModel(f"unknown model {name!r}; {model.name!r} is served here")
        if version != THE_VERSION:
            raise UnknownModel(f"{name!r} has no version {version!r}; its only one is {THE_VERSION!r}")
        return model


def _status(why_not: str | None, **good: Any) -> Response:
    if why_not is not None:
        raise NotReady(why_not)
    return _json(**good)


def _json(**values: Any) -> Response:
    return Response(to_json(values), media_type="application/json")
