"""`POST /` by the released huggingface_hub against a real server, and what clients of other makes may send."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient, ObjectDetectionOutputElement
from huggingface_hub.errors import HfHubHTTPError

from tests.support.serving import PNG, FakeDetector, Serving, assert_problem, picture, server_process, serving

PRETRAINED = Path(__file__).parents[3] / "model" / "pretrained"
EXAMPLE = PRETRAINED / "example.jpg"
KEY = "a-key-of-many-letters"
ENCODED = base64.b64encode(picture()).decode()


@pytest.fixture(autouse=True)
def nobodys_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the demo model that wants a key."""
    folder = tmp_path_factory.mktemp("server")
    with server_process(folder, "--api-keys", KEY, model_path=PRETRAINED / "shapes.onnx") as server:
        yield server.url


Found = list[dict[str, Any]]
CALLS: dict[str, tuple[Callable[[InferenceClient], object], float | None]] = {
    "a path": (lambda client: client.object_detection(str(EXAMPLE)), None),
    "bytes": (lambda client: client.object_detection(EXAMPLE.read_bytes()), None),
    "a threshold": (lambda client: client.object_detection(EXAMPLE, threshold=0.5), 0.5),
    "bytes and a threshold of 0": (lambda client: client.object_detection(EXAMPLE.read_bytes(), threshold=0.0), 0.0),
}


def by_detect(url: str, score_threshold: float | None) -> Found:
    query = {} if score_threshold is None else {"score_threshold": score_threshold}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "image/jpeg"}
    answer = httpx.post(f"{url}/detect", params=query, content=EXAMPLE.read_bytes(), headers=headers, timeout=60)
    detections: Found = answer.json()["detections"]
    return detections


@pytest.mark.parametrize("what", CALLS)
def test_the_released_client_gets_what_detect_finds(url: str, what: str) -> None:
    call, threshold = CALLS[what]
    found: Any = call(InferenceClient(base_url=url, api_key=KEY))
    assert [dict(each) for each in found] == by_detect(url, threshold) != []
    assert (found[0].label, found[0].box.xmin) == (found[0]["label"], found[0]["box"]["xmin"])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # its own, in huggingface_hub 2.4
def test_the_asynchronous_client_too(url: str) -> None:
    async def ask() -> list[ObjectDetectionOutputElement]:
        async with AsyncInferenceClient(model=url, token=KEY) as client:
            return await client.object_detection(EXAMPLE, threshold=0.5)

    found = asyncio.run(ask())
    assert [dict(each) for each in found] == by_detect(url, 0.5)


def test_the_released_client_is_told_what_is_wrong(url: str) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        InferenceClient(base_url=url, api_key="another-key-of-letters").object_detection(EXAMPLE)
    assert error.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="less than or equal to 1") as error:
        InferenceClient(base_url=url, api_key=KEY).object_detection(EXAMPLE, threshold=1.5)
    assert error.value.response.json()["code"] == "invalid_parameter"


def ask(server: Serving, **request: Any) -> httpx.Response:
    return server.client.post("/", **request)


def test_every_body_of_detect_but_its_json_is_taken(server: Serving) -> None:
    answers = [
        ask(server, content=picture(), headers=PNG),
        ask(server, content=picture()),
        ask(server, files={"image": ("a.png", picture(), "image/png")}),
        ask(server, json={"inputs": ENCODED}),
        ask(server, json={"inputs": ENCODED, "parameters": None}),
        ask(server, json={"inputs": f"data:image/png;base64,{ENCODED}", "parameters": {}}),
    ]
    assert {answer.text for answer in answers} == {server.client.post("/", content=picture()).text}
    assert [each["label"] for each in answers[0].json()] == ["circle"]
    assert answers[0].headers["Server-Timing"].startswith("read;dur=")
    assert_problem(ask(server, json={"image": ENCODED}), 400, "malformed_request")


def test_the_parameters_are_those_of_detect_and_win_over_the_query(server: Serving) -> None:
    def count(parameters: dict[str, object], **query: object) -> int:
        return len(ask(server, json={"inputs": ENCODED, "parameters": parameters}, params=query).json())

    assert count({"label": "circle", "max_detections": 5, "nms_threshold": 0.4}) == 1
    assert count({"label": ["square"]}) == 0
    assert count({}, score_threshold=0.9) == 0
    assert count({"threshold": 0.1}, score_threshold=0.9) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "told"),
    [
        ({"inputs": ENCODED, "parameters": {"thresh": 0.5}}, 422, "invalid_parameter", "thresh"),
        ({"inputs": ENCODED, "parameters": {"label": "hexagon"}}, 422, "invalid_parameter", "circle"),
        ({"inputs": ENCODED, "parameters": {"label": ["a" * 5000]}}, 422, "invalid_parameter", "of 5000 bytes"),
        ({"inputs": ENCODED, "parameters": {"threshold": "a" * 4000}}, 422, "invalid_parameter", "aaa…"),
        ({"inputs": ENCODED, "parameters": {"threshold": "0.5"}}, 422, "invalid_parameter", "number"),
        (
            {"inputs": ENCODED, "parameters": {"threshold": 0.5, "score_threshold": 0.4}},
            400,
            "malformed_request",
            "one",
        ),
        (
            {"inputs": ENCODED, "parameters": {"threshold": None, "score_threshold": {}}},
            422,
            "invalid_parameter",
            "score",
        ),
        ({"inputs": ENCODED, "parameters": [0.5]}, 400, "malformed_request", "parameters"),
        ({"inputs": ENCODED, "options": {}}, 400, "malformed_request", "keys besides"),
        ({"parameters": {"threshold": 0.5}}, 400, "malformed_request", "inputs"),
        ({"inputs": "no base64!"}, 400, "malformed_request", "inputs"),
    ],
)
def test_a_body_that_is_wrong_is_told_how(
    server: Serving, body: dict[str, object], status: int, code: str, told: str
) -> None:
    problem = assert_problem(ask(server, json=body), status, code)
    assert told in problem.detail
    assert len(problem.detail) < 400


def test_it_is_counted_logged_and_refused_like_detect(caplog: pytest.LogCaptureFixture) -> None:
    with serving(detector := FakeDetector(), queue_capacity=1) as server, ThreadPoolExecutor() as pool:
        detector.gate.clear()
        first = pool.submit(ask, server, content=picture())
        server.wait_until(lambda: server.metric("retinaserve_requests_running") == 1)
        refused = ask(server, content=picture())
        detector.gate.set()
        assert first.result().status_code == 200
        assert_problem(refused, 429, "overloaded")
        assert "Retry-After" in refused.headers
        outcomes = [server.metric("retinaserve_requests_total", outcome=outcome) for outcome in ("ok", "overloaded")]
        assert outcomes == [1, 1]
        assert server.metric("http_request_duration_seconds_count", method="POST", route="/") == 2
    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert sorted((line["route"], line["outcome"]) for line in lines) == [("/", "ok"), ("/", "overloaded")]
    assert any(line.get("images") == ["80x64"] for line in lines)
