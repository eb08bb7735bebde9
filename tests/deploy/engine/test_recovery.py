"""Recovery on an engine: containers that end and start again by themselves."""

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.deploy.engine.stack import Stack, docker, needs_engine
from tests.support.faulty_models import write_hanging_model
from tests.support.load import PNG
from tests.support.serving import picture, wait_until

pytestmark = needs_engine

HANGING = """
services:
  service:
    environment: {RETINASERVE_MODEL: /models/hanging.onnx, RETINASERVE_REQUEST_TIMEOUT_SECONDS: "1"}
"""


def test_a_replica_that_hangs_is_ended_by_its_health_check_and_started_again(stack: Stack) -> None:
    write_hanging_model(stack.models / "hanging.onnx")
    (stack.folder / "hanging.yml").write_text(HANGING)
    hanging = stack.with_("hanging.yml")
    white = picture(colour=(255, 255, 255))
    with ThreadPoolExecutor() as pool:
        hanging.up()
        [replica] = hanging.replicas()
        answer = pool.submit(httpx.post, f"{stack.api}/detect", content=white, headers=PNG, timeout=60)
        wait_until(lambda: docker("inspect", "-f", "{{.RestartCount}} {{.State.Running}}", replica) == "1 true", 90)
        wait_until(lambda: docker("inspect", "-f", "{{.State.Health.Status}}", replica) == "healthy", 60)
        assert answer.result().status_code in (502, 504)
        assert httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG).status_code == 200
