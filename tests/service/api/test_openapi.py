"""The document and the page that shows it."""

import re

from service.api.parameters import DetectQuery
from service.api.schemas import Answer, BatchAnswer, ModelCard, Problem, Status
from tests.support.serving import FakeDetector, Serving, serving


def test_the_openapi_document_describes_every_route_with_examples(server: Serving) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/detect", "/detect/batch", "/", "/model", "/healthz", "/readyz", "/metrics"}
    bodies = document["paths"]["/detect"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"multipart/form-data", "image/*", "application/octet-stream", "application/json"}
    schemas = document["components"]["schemas"]
    for model in (Answer, BatchAnswer, ModelCard, Problem, Status):
        [example] = schemas[model.__name__]["examples"]
        model.model_validate(example)
    for form in (bodies["multipart/form-data"], bodies["application/json"]):
        assert form["schema"]["additionalProperties"] is False, "fields besides the image are refused"
    parameters = {each["name"]: each["schema"] for each in document["paths"]["/detect"]["post"]["parameters"]}
    assert list(parameters) == list(DetectQuery.model_fields)
    answers = document["paths"]["/detect"]["post"]["responses"]
    assert set(answers) == {
        "200",
        "400",
        "401",
        "406",
        "408",
        "413",
        "414",
        "415",
        "422",
        "429",
        "431",
        "500",
        "503",
        "504",
    }
    assert set(answers["200"]["content"]) == {"application/json", "image/png", "image/jpeg"}
    for status in set(answers) - {"200"}:
        [(media_type, content)] = answers[status]["content"].items()
        assert media_type == "application/problem+json" and content["examples"]
    assert set(answers["413"]["content"][media_type]["examples"]) == {"body_too_large", "too_many_pixels"}
    assert "Problem" in document["components"]["schemas"]


def test_the_docs_page_needs_no_other_host(server: Serving) -> None:
    page = server.client.get("/docs").text
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(links) == 3, "a script, a style and an icon"
    for link in links:
        assert re.match(r"static-offline-docs/[^/]", link), "on this host, below whatever prefix"
        assert server.client.get(link).status_code == 200
    assert "url: 'openapi.json'" in page


def test_docs_can_be_switched_off() -> None:
    with serving(FakeDetector(), docs=False) as server:
        for path in ("/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert server.client.get(path).status_code == 404
