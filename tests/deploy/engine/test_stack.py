"""The Compose project on a real engine: start, answers, rollouts, failures, hardening."""

import functools
import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.deploy.engine.stack import Load, Stack, docker, needs_engine
from tests.support.load import PNG
from tests.support.serving import picture, wait_until

MIB = 1024 * 1024
pytestmark = needs_engine


def test_a_picture_sent_to_the_proxy_gets_its_boxes(stack: Stack) -> None:
    stack.start(1)
    answer = httpx.post(f"{stack.api}/detect", files={"image": ("a.png", picture(120, 90), "image/png")})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["image"] == {"width": 120, "height": 90}
    assert body["model"]["name"] == "first"
    assert body["detections"][0].keys() == {"label", "class_id", "score", "box"}


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/%6detrics", "/metrics?x"])
def test_the_proxy_does_not_show_the_metrics(stack: Stack, path: str) -> None:
    answer = httpx.get(stack.api + path)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("path", "size"), [("/detect", 28 * MIB), ("/detect/batch", 256 * MIB)])
def test_the_proxy_refuses_a_body_that_is_too_large_before_it_is_sent(stack: Stack, path: str, size: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.api_port, timeout=10)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["code"]) == (413, "body_too_large")
    connection.close()


def test_prometheus_scrapes_every_replica_and_fills_the_records(stack: Stack) -> None:
    stack.start(2)
    rules = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
    names = {rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "recording"}
    of_gpus = {"instance:retinaserve_gpu_memory:ratio"}
    with Load(stack.api):
        wait_until(lambda: all(stack.query(name) for name in names - of_gpus), 60)
    assert all(rule["health"] == "ok" for group in rules for rule in group["rules"] if "lastError" in rule)


def test_a_replica_that_is_stopped_loses_no_request(stack: Stack) -> None:
    stack.start(3)
    with Load(stack.api) as load:
        docker("stop", stack.replicas()[0])
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}


def test_a_replica_that_is_killed_loses_only_what_it_was_working_on(stack: Stack) -> None:
    stack.start(3)
    with Load(stack.api) as load:
        docker("kill", "--signal", "KILL", stack.replicas()[0])
        load.wait_for_answers(50)
    lost = {kind: number for kind, number in load.answers.items() if kind != "first"}
    # HAProxy closes a client's connection instead where it had used the replica's before: either may be sent again.
    assert set(lost) <= {"502", "RemoteProtocolError"}
    assert sum(lost.values()) <= load.clients


def test_a_new_model_and_back_lose_no_request(stack: Stack) -> None:
    stack.start(2)
    with Load(stack.api) as load:
        for model, told in (("second", True), ("first", False)):
            stack.point_to(f"{model}.onnx")
            if told:
                stack.signal("HUP")
            for replica in stack.replicas():
                wait_until(functools.partial(stack.serves, replica, model))
            load.wait_for_answers(20)
    assert set(load.answers) == {"first", "second"}
    assert httpx.post(f"{stack.api}/detect", content=picture(), headers=PNG).json()["model"]["name"] == "first"


def test_a_broken_model_changes_nothing(stack: Stack) -> None:
    (stack.models / "broken.onnx").write_bytes(b"no model")
    failures = 'sum(retinaserve_model_reloads_total{outcome="failure"})'
    with Load(stack.api) as load:
        stack.point_to("broken.onnx")
        stack.signal("HUP")
        wait_until(lambda: float(stack.query(failures)[0]["value"][1]) > 0)
        stack.point_to("first.onnx")
    assert set(load.answers) == {"first"}


def test_without_prometheus_the_service_serves_on(stack: Stack) -> None:
    stack.compose("stop", "prometheus")
    with Load(stack.api) as load:
        load.wait_for_answers(50)
    assert set(load.answers) == {"first"}
    stack.start(2)


def test_the_process_may_do_nothing_but_serve(stack: Stack) -> None:
    program = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
skipped = ("/proc", "/sys", "/tmp", "/dev/mqueue")  # message queues, no files
folders = [f for f, _, _ in os.walk("/") if not f.startswith(skipped) and os.access(f, os.W_OK)]
print(os.getuid(), int(status["CapEff"], 16), int(status["CapBnd"], 16), int(status["NoNewPrivs"]), folders)
"""
    assert docker("exec", stack.replicas()[0], "python", "-c", program) == "10001 0 0 1 []"


def test_a_full_scratch_disk_is_a_problem_of_one_request_and_passes(stack: Stack) -> None:
    stack.start(1)
    [replica] = stack.replicas()
    large = picture(1600, 1600, kind="BMP")  # over the size up to which a form's file stays in memory

    def post() -> httpx.Response:
        return httpx.post(f"{stack.api}/detect", files={"image": ("a.bmp", large, "image/bmp")})

    fill = ["docker", "exec", replica, "sh", "-c", "cat /dev/zero > /tmp/full"]
    assert "No space left" in subprocess.run(fill, capture_output=True, text=True).stderr
    full = post()
    docker("exec", replica, "rm", "/tmp/full")
    assert full.status_code == 200 or full.headers["content-type"] == "application/problem+json", full.text
    assert post().status_code == 200


def test_down_lets_a_request_in_flight_finish(stack: Stack) -> None:
    stack.start(1)
    image = picture()
    down = threading.Thread(target=stack.compose, args=("down",))

    def body() -> Iterator[bytes]:
        yield image[:10]
        down.start()
        time.sleep(3)
        yield image[10:]

    answer = httpx.post(f"{stack.api}/detect", content=body(), headers=PNG, timeout=30)
    down.join()
    assert answer.status_code == 200, answer.text
    assert stack.replicas() == []
