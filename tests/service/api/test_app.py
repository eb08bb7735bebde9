"""The routes, over real sockets, around a detector written by hand."""

import base64
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from model.detector import Detector
from service.api.errors import PROBLEM_TYPES
from service.api.parameters import DetectQuery
from service.api.replies import picture_wanted
from service.api.schemas import Answer, BatchAnswer, ModelCard, Problem, Status
from tests.support.serving import FakeDetector, Serving, picture, serving
from tests.support.tiny_model import write_tiny_model

PNG = {"Content-Type": "image/png"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeDetector()) as running:
        yield running


def detect(server: Serving, **request: object) -> httpx.Response:
    return server.client.post("/detect", **request)  # type: ignore[arg-type]


def assert_problem(response: httpx.Response, status: int, code: str) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert (problem.code, problem.status, problem.title) == (code, status, PROBLEM_TYPES[code].title)
    assert problem.request_id == response.headers["x-request-id"]
    return problem


def test_raw_bytes_multipart_and_base64_get_the_same_answer(server: Serving) -> None:
    image = picture(90, 60)
    answers = [
        Answer.model_validate_json(response.content)
        for response in (
            detect(server, content=image, headers=PNG),
            detect(server, content=image, headers={"Content-Type": "application/octet-stream"}),
            detect(server, files={"image": ("name.png", image, "image/png")}),
            detect(server, json={"image": base64.b64encode(image).decode()}),
        )
    ]
    assert all(answer.detections == answers[0].detections for answer in answers)
    [detection] = answers[0].detections
    assert (detection.label, detection.class_id) == ("circle", 1)
    assert detection.score == pytest.approx(200 / 255, abs=1e-6)
    assert detection.box.model_dump() == {"xmin": 0, "ymin": 0, "xmax": 90, "ymax": 60}
    assert answers[0].image.model_dump() == {"width": 90, "height": 60}
    assert answers[0].model.name == "fake"


def test_the_answer_is_the_detector_s_own(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    detector = Detector(tmp_path / "tiny.onnx", device="cpu")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 110, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    expected = detector.detect(pixels, score_threshold=0.2, max_detections=5)
    with serving(detector) as server:
        query = {"score_threshold": 0.2, "max_detections": 5}
        found = detect(server, content=buffer.getvalue(), headers=PNG, params=query).json()["detections"]
    assert len(found) == len(expected) > 1
    for detection, box, score, label in zip(found, expected.boxes, expected.scores, expected.labels, strict=True):
        assert list(detection["box"].values()) == pytest.approx(box.tolist(), abs=1e-3)
        assert (detection["class_id"], detection["score"]) == (label, pytest.approx(score, abs=1e-6))


def test_the_stages_sum_to_the_total_and_server_timing_says_the_same(server: Serving) -> None:
    response = detect(server, content=picture(), headers=PNG)
    timing = response.json()["timing_ms"]
    assert list(timing) == ["read", "decode", "preprocess", "queue", "inference", "postprocess", "total"]
    assert math.isclose(sum(timing.values()) - timing["total"], timing["total"], abs_tol=0.01)
    parts = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert {stage: float(value) for stage, value in parts.items()} == timing


def test_a_request_id_is_taken_over_or_made(server: Serving) -> None:
    given = detect(server, content=picture(), headers=PNG | {"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "abc-1"
    for unfit in ("", "two words", "x" * 200):
        made = detect(server, content=picture(), headers=PNG | {"X-Request-ID": unfit})
        assert made.headers["x-request-id"] == made.json()["request_id"] != unfit


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"content": b"", "headers": PNG}, 400, "malformed_request"),
        ({"content": b"no image at all", "headers": PNG}, 422, "invalid_image"),
        ({"content": picture()[:100], "headers": PNG}, 422, "invalid_image"),
        ({"content": b"\0" * (20 * 2**20 + 1), "headers": PNG}, 413, "body_too_large"),
        ({"content": iter([b"\0" * 2**20] * 21), "headers": PNG}, 413, "body_too_large"),
        ({"files": {"image": b"\0" * (20 * 2**20 + 1)}}, 413, "body_too_large"),
        ({"json": {"image": base64.b64encode(b"\0" * (20 * 2**20 + 1)).decode()}}, 413, "body_too_large"),
        ({"files": {"image": b""}}, 422, "invalid_image"),
        ({"files": {"picture": picture()}}, 400, "malformed_request"),
        ({"files": {"image": picture()}, "data": {"score_threshold": "0.5"}}, 400, "malformed_request"),
        ({"files": [("image", picture()), ("image", picture())]}, 400, "malformed_request"),
        ({"content": b"--x\r\n", "headers": FORM}, 400, "malformed_request"),
        ({"content": b"", "headers": FORM}, 400, "malformed_request"),
        ({"content": b"garbage", "headers": FORM}, 400, "malformed_request"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "malformed_request"),
        ({"json": {}}, 400, "malformed_request"),
        ({"json": []}, 400, "malformed_request"),
        ({"json": {"image": 5}}, 400, "malformed_request"),
        ({"json": {"image": "not base64!"}}, 400, "malformed_request"),
        ({"json": {"image": "", "score_threshold": 0.5}}, 400, "malformed_request"),
        ({"json": {"image": ""}}, 422, "invalid_image"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "malformed_request"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "malformed_request"),
        ({"content": b"\xff\xfe", "headers": {"Content-Type": "application/json"}}, 400, "malformed_request"),
        ({"content": picture()}, 415, "unsupported_media_type"),
        ({"content": picture(), "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": picture(), "headers": PNG | {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type"),
        ({"content": picture(), "headers": PNG, "params": {"score_threshold": "1.01"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"score_threshold": "nan"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"nms_threshold": "-0.1"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"max_detections": "0"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"max_detections": "5001"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"label": "unicorn"}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"label": ""}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"score_threshold": ""}}, 422, "invalid_parameter"),
        ({"content": picture(), "headers": PNG, "params": {"treshold": "0.5"}}, 422, "invalid_parameter"),
    ],
)  # fmt: skip
def test_a_bad_request_gets_its_problem(server: Serving, request_: dict[str, object], status: int, code: str) -> None:
    assert_problem(detect(server, **request_), status, code)


def test_too_many_pixels_are_refused_by_the_header(server: Serving) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = picture()[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture()[33:]
    assert_problem(detect(server, content=bomb, headers=PNG), 413, "too_many_pixels")


def test_a_bare_curl_is_told_how_to_mend_it(server: Serving) -> None:
    response = detect(server, content=picture(), headers={"Content-Type": "application/x-www-form-urlencoded"})
    problem = assert_problem(response, 415, "unsupported_media_type")
    assert "-F image=@FILE" in problem.detail


def test_an_unknown_path_and_a_wrong_method_are_problems(server: Serving) -> None:
    assert_problem(server.client.get("/nothing"), 404, "not_found")
    assert_problem(server.client.post("/detect/"), 404, "not_found")
    response = server.client.get("/detect")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_the_query_decides_what_is_kept(server: Serving) -> None:
    image = picture(colour=(51, 0, 0))  # scores 0.2

    def found(**query: object) -> int:
        return len(detect(server, content=image, headers=PNG, params=query).json()["detections"])

    assert found() == 1
    assert found(score_threshold=[0.1, 0.3]) == 0, "the last one counts"
    assert found(score_threshold=0.3) == 0
    assert found(score_threshold=0.1, label=["circle", "square"]) == 1
    assert found(label="square") == 0


def test_a_setting_wins_over_the_file_and_the_query_over_the_setting() -> None:
    image = picture(colour=(51, 0, 0))
    with serving(FakeDetector(), score_threshold=0.3) as server:
        assert server.client.get("/model").json()["defaults"]["score_threshold"] == 0.3
        assert detect(server, content=image, headers=PNG).json()["detections"] == []
        query = {"score_threshold": 0.1}
        assert len(detect(server, content=image, headers=PNG, params=query).json()["detections"]) == 1


def test_a_batch_answers_each_image_in_order(server: Serving) -> None:
    images = [picture(64, 64), b"broken", picture(96, 64)]
    before = server.metric("retinaserve_requests_total", outcome="ok"), server.metric("retinaserve_images_total")
    response = server.client.post("/detect/batch", files=[("image", image) for image in images])
    first, second, third = BatchAnswer.model_validate_json(response.content).results
    assert isinstance(first, Answer) and first.image.width == 64
    assert isinstance(second, Problem) and second.code == "invalid_image"
    assert isinstance(third, Answer) and third.image.width == 96
    after = server.metric("retinaserve_requests_total", outcome="ok"), server.metric("retinaserve_images_total")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 2)


def test_a_batch_of_seventeen_or_of_raw_bytes_is_refused(server: Serving) -> None:
    url = "/detect/batch"
    assert_problem(server.client.post(url, files=[("image", picture())] * 17), 400, "malformed_request")
    assert_problem(server.client.post(url, content=picture(), headers=PNG), 415, "unsupported_media_type")


@pytest.mark.parametrize(("media_type", "kind"), [("image/png", "PNG"), ("image/jpeg", "JPEG")])
def test_who_asks_for_a_picture_gets_the_boxes_drawn(server: Serving, media_type: str, kind: str) -> None:
    response = detect(server, content=picture(320, 240), headers=PNG | {"Accept": media_type})
    assert response.headers["content-type"] == media_type
    drawn = Image.open(io.BytesIO(response.content))
    assert (drawn.format, drawn.size) == (kind, (320, 240))
    assert len(set(drawn.convert("RGB").get_flattened_data())) > 2, "nothing is drawn"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("image/*", None),
        ("image/png", "png"),
        ("image/jpeg", "jpeg"),
        ("image/jpeg, image/png;q=0.9", "jpeg"),
        ("image/png, application/json", None),
        ("image/png, application/json;q=0.5", "png"),
        ("image/png;q=0.5, */*;q=0.8", None),
        ("image/png, */*;q=0.8", "png"),
        ("image/png;q=0", None),
        ("image/png;q=x", None),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/png,image/svg+xml,*/*;q=0.8", None),
    ],
)
def test_a_picture_is_sent_only_when_named_and_ranked_above_json(accept: str, wanted: str | None) -> None:
    assert picture_wanted(accept) == wanted


def test_the_model_describes_itself(server: Serving) -> None:
    card = ModelCard.model_validate_json(server.client.get("/model").content)
    assert (card.name, card.provider, card.device_requested) == ("fake", "CPUExecutionProvider", "auto")
    assert [(entry.class_id, entry.label) for entry in card.labels] == [(1, "circle"), (2, "square")]
    assert card.anchors is not None
    assert (card.anchors.base_sizes, card.anchors.lowest_level) == ([20, 40], 3)


def test_probes_answer_get_and_head(server: Serving) -> None:
    for path in ("/healthz", "/readyz"):
        assert server.client.get(path).status_code == server.client.head(path).status_code == 200


def test_the_openapi_document_describes_every_route_with_examples(server: Serving) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/detect", "/detect/batch", "/model", "/healthz", "/readyz", "/metrics"}
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
    assert set(answers) == {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503", "504"}
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
        assert re.match(r"/[^/]", link), "on this host"
        assert server.client.get(link).status_code == 200
    assert "/openapi.json" in page


def test_docs_can_be_switched_off() -> None:
    with serving(FakeDetector(), docs=False) as server:
        for path in ("/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"):
            assert server.client.get(path).status_code == 404


def test_with_keys_set_a_request_needs_one_but_a_probe_does_not() -> None:
    with serving(FakeDetector(), api_keys="first,second") as server:
        for headers in ({"Authorization": "Bearer second"}, {"X-API-Key": "first"}):
            assert detect(server, content=picture(), headers=PNG | headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer third"}, {"X-API-Key": ""}, {"Authorization": "Basic first"}):
            response = detect(server, content=picture(), headers=PNG | headers)
            assert_problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.client.get("/metrics").status_code == server.client.get("/model").status_code == 401
        assert server.client.get("/healthz").status_code == server.client.get("/readyz").status_code == 200
        assert server.metric("retinaserve_requests_total", outcome="invalid") == 4


def test_cors_is_off_unless_an_origin_is_set() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serving(FakeDetector(), cors_origins="https://a.example", api_keys="k") as server:
        response = server.client.options("/detect", headers=preflight)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
    with serving(FakeDetector()) as server:
        assert "access-control-allow-origin" not in server.client.options("/detect", headers=preflight).headers
