"""The application and its arguments, and a replica, without a cluster."""

import asyncio
import contextlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.serve import RAYS_OWN, Arguments, Detection, app
from service.config import Settings
from tests.deploy.crd import KUBERNETES, load
from tests.foreign.ray.conftest import ROOT


def options_of(**given: object) -> Any:
    """The options of the deployment that these arguments make."""
    return app(Arguments.model_validate(given))._bound_deployment


def test_a_command_line_gives_texts_and_a_configuration_values() -> None:
    texts = Arguments.model_validate(
        {"queue_capacity": "16", "num_cpus": "0.5", "max_image_bytes": "1MiB", "docs": "false"}
    )
    values = Arguments.model_validate({"queue_capacity": 16, "num_cpus": 0.5, "max_image_bytes": 2**20, "docs": False})
    assert texts == values


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modle": "a.onnx"}, "modle"),
        ({"replicas": 0}, "replicas"),
        ({"queue_capacity": "many"}, "queue_capacity"),
        ({"num_cpus": "inf"}, "num_cpus"),
        ({"port": 9000}, "port: Ray's proxies hold the connections"),
        ({"device": "cuda"}, "needs a share of a GPU"),
        ({"device": "cpu", "num_gpus": 1}, "leaves the GPU"),
        ({"num_gpus": 0.5}, "needs gpu_memory_limit_bytes"),
    ],
)
def test_what_is_unknown_or_wrong_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Arguments.model_validate(given)


def test_no_key_is_shown_in_an_error() -> None:
    with pytest.raises(ValidationError) as error:
        Arguments.model_validate({"api_keys": "geheim schlüssel", "replicas": 0})
    assert "geheim" not in str(error.value)


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINASERVE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("RETINASERVE_QUEUE_CAPACITY", "7")
    assert Arguments() == Arguments.model_validate({})
    assert Arguments().queue_capacity == Settings.model_fields["queue_capacity"].default


def test_every_setting_that_is_left_to_ray_is_one() -> None:
    assert set(Settings.model_fields) >= RAYS_OWN


@pytest.mark.parametrize(
    ("given", "threads", "decode_threads", "device"),
    [
        ({}, 1, 1, "cpu"),
        ({"num_cpus": 4}, 4, 4, "cpu"),
        ({"num_cpus": 0.5, "device": "auto"}, 1, 1, "cpu"),
        ({"num_cpus": 8, "threads": 2}, 2, 8, "cpu"),
        ({"num_gpus": 1, "num_cpus": 4}, 4, 4, "cuda"),
        ({"num_gpus": 0.25, "device": "cuda", "gpu_memory_limit_bytes": "8GiB"}, 1, 1, "cuda"),
    ],
)
def test_a_replica_takes_what_ray_sets_aside_for_it(
    given: dict[str, object], threads: int, decode_threads: int, device: str
) -> None:
    settings = Arguments.model_validate(given).of_a_replica()
    assert (settings.threads, settings.decode_threads, settings.device) == (threads, decode_threads, device)


def test_the_line_refuses_before_rays_queues_are_full_and_those_are_bounded() -> None:
    deployment = options_of(queue_capacity=10, request_timeout_seconds=60, upload_timeout_seconds=20, num_cpus=2)
    config = deployment._deployment_config
    assert config.max_ongoing_requests > 10
    assert 0 < config.max_queued_requests < 100
    assert config.backpressure_config.status_code == 429
    assert config.backpressure_config.retry_after_s
    assert config.graceful_shutdown_timeout_s > 60 + 20
    assert config.max_surge_percent == 100
    assert deployment.ray_actor_options["num_cpus"] == 2


@pytest.mark.parametrize("reason", [None, "the device has failed"])
def test_a_replica_that_is_not_alive_fails_its_health_check_and_tells_its_figures(reason: str | None) -> None:
    reports: list[str] = []
    figures = SimpleNamespace(report=lambda: reports.append("figures"))
    replica = SimpleNamespace(_figures=figures, _service=SimpleNamespace(why_not_alive=lambda: reason))
    with contextlib.nullcontext() if reason is None else pytest.raises(RuntimeError, match=reason):
        asyncio.run(Detection.func_or_class.check_health(replica))
    assert reports == ["figures"]


MANIFEST = load(KUBERNETES / "kuberay" / "ray-service.yaml")["spec"]["serveConfigV2"]
[ON_THE_PAGE] = re.findall(r"```yaml\n(http_options.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", [MANIFEST, ON_THE_PAGE], ids=["KubeRay's manifest", "docs/scaling.md"])
def test_a_configuration_that_is_shown_is_one_of_serve_and_of_the_service(text: str) -> None:
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "cluster.serve:app"
    assert options_of(**application.args).num_replicas == application.args["replicas"]
    assert [each.name for each in application.deployments] == [options_of().name]
