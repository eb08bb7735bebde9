"""The service on two Ray nodes: as it is alone, overloaded, reloaded, rolled, and with a node killed under load."""

import collections
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from retinaserve_client import Client
from tests.foreign.ray.cluster import NODE, RayService, ray_service
from tests.support.faulty_models import write_slow_model
from tests.support.load import PNG, Reply, agree, ask, blocks, constantly
from tests.support.serving import server_process, wait_until
from tests.support.tiny_model import write_tiny_model

CLIENTS = 6
IMAGE = blocks(90, 80, seed=1)
OK = (200, "application/json")
NO_ANSWER = (0, "")
LOST = {(500, "text/plain"), NO_ANSWER}
"""Allowed answers for requests in flight on a replica that dies, by status and media type."""


@pytest.fixture(scope="module")
def rays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    with ray_service(tmp_path_factory.mktemp("ray")) as running:
        running.deploy(replicas=2, num_cpus=2)
        yield running


@pytest.fixture(scope="module")
def alone(rays: RayService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a service without Ray, on the same model."""
    with server_process(tmp_path_factory.mktemp("alone"), "--device", "cpu", model_path=rays.model) as server:
        yield server.url


class Books:
    """Answers that clients got, by status and media type."""

    def __init__(self) -> None:
        self.answers = collections.Counter[tuple[int, str]]()
        self._lock = threading.Lock()

    def ask(self, url: str) -> Reply | None:
        try:
            reply = ask(url, "/detect", IMAGE, PNG)
        except (http.client.HTTPException, ConnectionError):
            reply = None
        with self._lock:
            self.answers[NO_ANSWER if reply is None else (reply.status, reply.headers.get_content_type())] += 1
        return reply


def told(reply: Reply) -> Any:
    """The answer without what differs from one request to the next."""
    if "json" not in reply.headers["content-type"]:
        return reply.body
    answer = json.loads(reply.body)
    return {key: value for key, value in answer.items() if key not in ("request_id", "timing_ms", "detections")}


REQUESTS: dict[str, tuple[str, str, bytes | None, dict[str, str]]] = {
    "picture": ("POST", "/detect", IMAGE, PNG),
    "options": ("POST", "/detect?score_threshold=0.6&max_detections=3&label=circle", IMAGE, PNG),
    "tiles": ("POST", "/detect?tile=64", IMAGE, PNG),
    "drawing": ("POST", "/detect", IMAGE, PNG | {"Accept": "image/png"}),
    "no picture": ("POST", "/detect", b"no picture", PNG),
    "unknown label": ("POST", "/detect?label=unicorn", IMAGE, PNG),
    "too large": ("POST", "/detect", bytes(21 * 2**20), PNG),
    "Hugging Face": ("POST", "/", IMAGE, PNG),
    "Open Inference Protocol": ("POST", "/v2/models/other/infer", b"{}", {"Content-Type": "application/json"}),
    "model": ("GET", "/model", None, {}),
    "ready": ("GET", "/readyz", None, {}),
    "page": ("GET", "/", None, {"Accept": "text/html"}),
    "nowhere": ("GET", "/nowhere", None, {}),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_answers_through_ray_are_those_without(rays: RayService, alone: str, kind: str) -> None:
    method, path, body, headers = REQUESTS[kind]
    through, without = (ask(url, path, body, headers, method=method) for url in (rays.url, alone))
    assert (through.status, through.headers["content-type"]) == (without.status, without.headers["content-type"])
    if kind == "Hugging Face":
        assert json.loads(through.body) == json.loads(without.body)
        return
    assert told(through) == told(without)
    if "detections" in (answer := json.loads(without.body) if "json" in without.headers["content-type"] else {}):
        assert answer["detections"]
        assert agree(json.loads(through.body)["detections"], answer["detections"])


@pytest.mark.parametrize("given", ["abc-1", ""])
@pytest.mark.parametrize("image", [IMAGE, b"no picture"])
def test_an_answer_has_one_request_id_and_its_body_says_the_same(rays: RayService, given: str, image: bytes) -> None:
    reply = ask(rays.url, "/detect", image, PNG | ({"X-Request-ID": given} if given else {}))
    [request_id] = reply.headers.get_all("x-request-id")
    assert json.loads(reply.body)["request_id"] == request_id
    assert request_id == given or not given


def test_a_changed_user_config_reloads_the_model_and_restarts_no_replica(rays: RayService) -> None:
    process_ids, served = rays.process_ids(), hash_served(rays)
    write_tiny_model(rays.model.with_name("next.onnx"), seed=1)
    rays.model.with_name("next.onnx").replace(rays.model)
    assert hash_served(rays) == served, "nobody looks at the file"
    rays.deploy(replicas=2, num_cpus=2, user_config={"reload": "seed 1"})
    wait_until(lambda: {hash_served(rays) for _ in range(20)}.isdisjoint({served}))
    assert rays.process_ids() == process_ids


def hash_served(rays: RayService) -> str:
    sha256: str = httpx.get(f"{rays.url}/model").json()["sha256"]
    return sha256


def test_a_rollout_under_load_loses_nothing(rays: RayService) -> None:
    books, process_ids = Books(), rays.process_ids()
    with constantly(CLIENTS, lambda client: books.ask(rays.url)):
        rays.deploy(replicas=2, num_cpus=2, max_detections=7)
        before = books.answers.total()
        wait_until(lambda: books.answers.total() > before + 50)
    assert books.answers.keys() == {OK}
    assert rays.process_ids().isdisjoint(process_ids)


def test_a_rollout_that_cannot_start_leaves_the_old_replicas_serving(rays: RayService) -> None:
    books, process_ids = Books(), rays.process_ids()
    with constantly(CLIENTS, lambda client: books.ask(rays.url)):
        with pytest.raises(AssertionError, match="Failed to update"):
            rays.deploy(replicas=2, num_cpus=2, model="/nowhere/model.onnx")
        before = books.answers.total()
        wait_until(lambda: books.answers.total() > before + 50)
    assert books.answers.keys() == {OK}
    assert rays.process_ids() >= process_ids


@pytest.fixture(scope="module")
def slow(rays: RayService) -> str:
    """The path of a model with which requests are in flight long enough to wait, and to be lost."""
    path = rays.model.with_name("slow.onnx")
    write_slow_model(path, multiplications=6)
    return str(path)


def test_overload_is_refused_and_every_answer_is_in_the_books_of_a_replica(rays: RayService, slow: str) -> None:
    rays.deploy(replicas=2, num_cpus=2, queue_capacity=3, model=slow)
    books = Books()
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: books.ask(rays.url), range(200)))
    overloaded, by_ray = (429, "application/problem+json"), (429, "text/plain")
    assert books.answers.keys() == {OK, overloaded, by_ray}
    refusals = [reply for reply in replies if reply is not None and reply.status == 429]
    assert all(float(reply.headers["retry-after"]) > 0 for reply in refusals)
    counted = {"ok": books.answers[OK], "overloaded": books.answers[overloaded]}
    wait_until(lambda: rays.figures("ray_retinaserve_requests_total", "outcome") == counted)
    assert len(rays.figures("ray_retinaserve_images_total", "replica")) == 2, "one idles while the other refuses"


def test_a_node_killed_under_load_loses_what_was_in_flight_there_and_our_client_nothing(
    rays: RayService, slow: str
) -> None:
    rays.delete()
    rays.deploy(replicas=2, num_cpus=NODE["num_cpus"] - 1, model=slow)  # one on each node
    books, answered = Books(), collections.Counter[int]()
    with Client(rays.url) as client:

        def call(number: int) -> None:
            if number % 2:
                books.ask(rays.url)
            else:
                answered[len(client.detect(IMAGE))] += 1  # raises what is lost for good

        with constantly(2 * CLIENTS, call):
            wait_until(lambda: books.answers[OK] > 50)
            rays.kill_a_node()
            before = books.answers[OK]
            wait_until(lambda: books.answers[OK] > before + 50)
            rays.add_a_node()
            wait_until(rays.is_deployed, 120)
    assert books.answers.keys() - {OK} <= LOST
    assert 0 < sum(books.answers[lost] for lost in LOST) <= CLIENTS, "each client has one in flight"
    assert len(answered) == 1 and answered.total() > 50
