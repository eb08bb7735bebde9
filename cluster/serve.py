"""The service as a Ray Serve application: `serve run cluster.serve:app model=FILE.onnx replicas=2 num_cpus=4`.

Each replica is a whole service, with its own line, limits, decoders and problems; it watches its model file as without
Ray. Ray's proxies hold the connections and choose a replica, and Ray replaces replicas that die. Requests in flight on
a replica that dies get a plain-text 500 or no answer. When the `user_config` of the deployment `Detection` changes to
any other value, each replica opens its model file again, and none restarts.
"""

import asyncio
import functools
import os
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from ray import serve
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.figures import KeyFigures
from cluster.routing import AnyNode
from service.__main__ import build_service
from service.api.app import create_app
from service.config import Settings
from service.logs import start_logging

RAYS_OWN = {
    "host", "port", "keep_alive_seconds", "write_timeout_seconds", "drain_delay_seconds", "root_path", "ssl_certfile",
    "ssl_keyfile",
}  # fmt: skip
"""Settings that do not apply, because Ray's proxies hold the connections."""
USES_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
"""True: HAProxy chooses the replicas, and Ray refuses a router of ours."""
HEALTH_CHECK_SECONDS = 5
SPARE_SECONDS = 5
"""Time for sending the answers, after the requests in flight have ended."""


class Arguments(Settings):
    """Arguments of the application: the settings of the service without `RAYS_OWN`, and each replica's resources.

    They come from Ray alone. Environment variables are ignored, because they differ from node to node. ValidationError
    names unknown or wrong arguments.
    """

    model_config = SettingsConfigDict(hide_input_in_errors=True)  # it may be a key, and Ray logs them

    replicas: int = Field(1, ge=1, description="replicas, on whichever nodes have room")
    num_cpus: float = Field(
        1, gt=0, allow_inf_nan=False, description="cores of a replica, threads and decode_threads too"
    )
    num_gpus: float = Field(0, ge=0, allow_inf_nan=False, description="GPUs of a replica: 0, 1, or a fraction of one")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *args: Any, **kwargs: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _leave_to_ray(cls, given: dict[str, Any]) -> dict[str, Any]:
        if refused := sorted(RAYS_OWN & given.keys()):
            raise ValueError(f"{', '.join(refused)}: Ray's proxies hold the connections, see its http_options")
        return given

    @model_validator(mode="after")
    def _device_is_what_ray_gives(self) -> Self:
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError("device=cuda needs a share of a GPU: num_gpus=1, or a fraction")
        if self.device == "cpu" and self.num_gpus:
            raise ValueError("device=cpu leaves the GPU of num_gpus idle")
        if self.num_gpus % 1 and self.gpu_memory_limit_bytes is None:
            raise ValueError("a fraction of a GPU needs gpu_memory_limit_bytes: Ray shares out no memory")
        return self

    def of_a_replica(self) -> "Arguments":
        """Return the settings with which a replica takes no more than its resources in Ray."""
        cores = max(1, int(self.num_cpus))
        device = "cuda" if self.num_gpus else "cpu"
        given = self.model_dump(exclude_unset=True, exclude={"device"})
        return Arguments.model_validate({"threads": cores, "decode_threads": cores, "device": device} | given)


def app(arguments: Arguments) -> Any:
    """Build the application: `serve run`, `serve deploy` and KubeRay call this with their arguments."""
    deployment = Detection.options(  # type: ignore[attr-defined]  # the decorator made a Deployment of it
        num_replicas=arguments.replicas,
        # The line refuses before Ray's queues begin to fill; those are bounded too.
        max_ongoing_requests=2 * arguments.queue_capacity,
        max_queued_requests=arguments.queue_capacity,
        graceful_shutdown_timeout_s=arguments.upload_timeout_seconds
        + arguments.request_timeout_seconds
        + SPARE_SECONDS,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        **({} if USES_HAPROXY else {"request_router_config": RequestRouterConfig(request_router_class=AnyNode)}),
    )
    return deployment.bind(arguments.model_dump(exclude_unset=True))


@serve.deployment(
    max_surge_percent=100,  # a new replica is ready before an old one stops
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    health_check_period_s=HEALTH_CHECK_SECONDS,
    logging_config={"enable_access_log": False},  # the service has a line for each request
    user_config={},  # so that `reconfigure` is called at the start, and knows a change from it
)
@serve.ingress()
class Detection:
    """A replica of the service."""

    async def __init__(self, given: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        """Serve with these `Arguments`, which are checked again on the replica's node. RuntimeError: the model cannot
        be loaded."""
        settings = Arguments.model_validate(given).of_a_replica()
        start_logging(settings.log_format, settings.log_level)
        self._user_config: object = None
        self._service = build_service(settings)
        self._figures = KeyFigures(self._service.metrics.registry)
        self._service.engine.decoders.start()
        self._service.engine.start()
        if (reason := await self._load()) is not None:
            raise RuntimeError(reason)

    async def _load(self) -> str | None:
        """Start to load and watch the model file; return the reason if it cannot be loaded."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[str | None] = loop.create_future()

        def end(reason: str | None = None) -> None:
            loop.call_soon_threadsafe(functools.partial(outcome.set_result, reason))

        self._service.store.start(end, end)
        return await outcome

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return BehindRay(create_app(self._service))

    async def reconfigure(self, user_config: object) -> None:
        """Open the model file again, if `user_config` has changed. A bad file leaves the old model serving."""
        if self._user_config is not None and self._user_config != user_config:
            self._service.store.ask_reload()
        self._user_config = user_config

    async def check_health(self) -> None:
        """Raise RuntimeError to be replaced. Ray calls this every `HEALTH_CHECK_SECONDS`; it also reports the
        metrics."""
        self._figures.report()
        if (reason := self._service.why_not_alive()) is not None:
            raise RuntimeError(reason)


class BehindRay:
    """Removes the header X-Request-ID: Ray adds it, with the id that it gave the request and the service uses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-ID"]
            await send(message)

        await self._app(scope, receive, send_without_id)
