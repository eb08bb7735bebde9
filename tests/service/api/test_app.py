"""The routes beside those that detect."""

import pytest

from service.api.schemas import ModelCard
from tests.support.serving import FakeDetector, Serving, assert_problem, detect, serving


def test_an_unknown_path_and_a_wrong_method_are_problems(server: Serving) -> None:
    assert_problem(server.client.get("/nothing"), 404, "not_found")
    assert_problem(server.client.post("/detect/"), 404, "not_found")
    response = server.client.get("/detect")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_the_model_describes_itself(server: Serving) -> None:
    card = ModelCard.model_validate_json(server.client.get("/model").content)
    assert (card.name, card.provider, card.device_requested) == ("fake", "CPUExecutionProvider", "auto")
    assert [(entry.class_id, entry.label) for entry in card.labels] == [(1, "circle"), (2, "square")]
    assert card.suggested_score_threshold == 0.375
    assert card.anchors is not None
    assert (card.anchors.base_sizes, card.anchors.lowest_level) == ((20, 40), 3)


def test_the_name_that_is_set_is_the_models_everywhere() -> None:
    with serving(FakeDetector(), model_name="detector-7") as server:
        assert server.client.get("/model").json()["name"] == "detector-7"
        assert detect(server).json()["model"]["name"] == "detector-7"
        assert "retinaserve_model_info{" in (text := server.client.get("/metrics").text)
        assert 'name="detector-7"' in text and 'name="fake"' not in text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/model", "/metrics", "/docs", "/openapi.json"])
def test_head_is_answered_where_get_is(server: Serving, path: str) -> None:
    get, head = server.client.get(path), server.client.head(path)
    assert (get.status_code, head.status_code) == (200, 200)
    assert head.content == b"" and get.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_is_no_way_to_detect(server: Serving) -> None:
    assert server.client.head("/detect").status_code == 405


@pytest.mark.parametrize(("path", "methods"), [("/", "GET, HEAD, POST"), ("/detect", "POST"), ("/model", "GET, HEAD")])
def test_who_asks_with_another_method_is_told_all_that_the_path_takes(server: Serving, path: str, methods: str) -> None:
    refused = server.client.put(path)
    assert (refused.status_code, refused.headers["allow"]) == (405, methods)
