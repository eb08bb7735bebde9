"""Health and metadata below /v2, and errors as its clients read them."""

import httpx
import pytest

from service.api.schemas import Problem
from tests.support.load import connected, said
from tests.support.serving import FakeDetector, Serving, serving

MODEL = "/v2/models/fake"


def assert_error(response: httpx.Response, status: int, code: str) -> str:
    """Triton's client reads `error`, KServe's too, but of plain JSON alone. Returns it."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    values = response.json()
    error: str = values.pop("error")
    assert Problem.model_validate(values).code == code
    assert error.startswith(f"{code}: ")
    assert values["request_id"] == response.headers["x-request-id"]
    return error


def test_the_server_and_its_model_describe_themselves(server: Serving) -> None:
    described = server.client.get("/v2").json()
    assert (described["name"], described["extensions"]) == ("retinaserve", ["binary_tensor_data"])
    for path in (MODEL, f"{MODEL}/versions/1"):
        model = server.client.get(path).json()
        assert (model["name"], model["versions"]) == ("fake", ["1"])
        assert model["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
        names = [each["name"] for each in model["outputs"]]
        assert names == ["num_detections", "boxes", "scores", "class_ids", "labels"]


def test_health_is_told_in_both_clients_words(server: Serving) -> None:
    assert server.client.get("/v2/health/live").json() == {"live": True}
    assert server.client.get("/v2/health/ready").json() == {"ready": True, "live": True}
    for path in (f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
        assert server.client.get(path).json() == {"name": "fake", "ready": True}


def test_while_it_drains_it_is_alive_and_not_ready() -> None:
    with serving(FakeDetector()) as server:
        server.service.draining = True
        assert server.client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", f"{MODEL}/ready"):
            assert "draining" in assert_error(server.client.get(path), 503, "not_ready")


@pytest.mark.parametrize("end", ["", "/ready"])
def test_another_model_or_version_is_not_found(server: Serving, end: str) -> None:
    assert "unknown model 'other'" in assert_error(server.client.get(f"/v2/models/other{end}"), 404, "not_found")
    assert "no version '2'" in assert_error(server.client.get(f"{MODEL}/versions/2{end}"), 404, "not_found")


def test_every_layer_answers_in_the_protocols_form() -> None:
    with serving(FakeDetector(), api_keys="k") as server:
        assert_error(server.client.get("/v2"), 401, "unauthorized")
        assert server.client.get("/v2/health/live").status_code == 200, "probes carry no key"
        server.client.headers["X-API-Key"] = "k"
        for path in ("/v2/", "/v2/models", f"{MODEL}/config", f"{MODEL}/stats"):
            assert_error(server.client.get(path), 404, "not_found")
        assert_error(server.client.post(MODEL), 405, "method_not_allowed")
        assert_error(server.client.get("/v2/" + "x" * 9000), 414, "uri_too_long")
        with connected(server.url) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n")
            assert b" 431 " in (answer := said(connection)) and b'"error":"headers_too_large: ' in answer


def test_the_route_is_the_template_whatever_is_asked_for(server: Serving) -> None:
    for name in ("fake", "unheard-of"):
        for version in ("", "/versions/1", "/versions/2"):
            server.client.get(f"/v2/models/{name}{version}")
    counts = [
        server.metric("http_requests_total", method="GET", route="/v2/models/{name}", status=status)
        for status in ("200", "404")
    ]
    assert counts[0] >= 2 and counts[1] >= 4
    assert "unheard-of" not in server.client.get("/metrics").text
