"""The routes that detect, over real sockets, around a detector written by hand."""

import base64
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.detector import Detector
from service.api.schemas import Answer, BatchAnswer, Problem
from tests.support.serving import PNG, Serving, assert_problem, detect, picture, serving
from tests.support.tiny_model import write_tiny_model

FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def encoded_form(image: bytes) -> bytes:
    head = b'Content-Disposition: form-data; name="image"; filename="a"\r\nContent-Transfer-Encoding: base64'
    return b"a preamble\r\n--x\r\n" + head + b"\r\n\r\n" + base64.encodebytes(image) + b"\r\n--x--\r\n"


def test_raw_bytes_multipart_and_base64_get_the_same_answer(server: Serving) -> None:
    image = picture(90, 60)
    answers = [
        Answer.model_validate_json(response.content)
        for response in (
            detect(server, content=image, headers=PNG),
            detect(server, content=image, headers={"Content-Type": "application/octet-stream"}),
            detect(server, content=image),
            detect(server, content=image, headers=PNG | {"Content-Encoding": "Identity"}),
            detect(server, content=image, headers=PNG | {"Content-Encoding": ""}),
            detect(server, files={"image": ("name.png", image, "image/png")}),
            detect(server, files={"file": ("name.png", image, "image/png")}),
            detect(server, content=encoded_form(image), headers=FORM),
            detect(server, json={"image": base64.b64encode(image).decode()}),
            detect(server, json={"image": "data:image/png;base64," + base64.urlsafe_b64encode(image).decode()}),
            detect(server, json={"image": base64.encodebytes(image).decode()}),
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
        ({"files": {"picture": (None, "a field, no file")}}, 400, "malformed_request"),
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
        ({"content": b"no image at all"}, 422, "invalid_image"),
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
