"""Requests and answers of both clients, over a transport with prepared answers."""

import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from model.types import Detections, coco_results
from retinaserve_client import Answer, Box, DetectError, Detection, Label
from retinaserve_client.answer import answer_of
from service.api.schemas import ANSWER, MODEL_CARD, PROBLEM
from tests.client.driven import MakeClient
from tests.support.pictures import encode, picture

ROOT = Path(__file__).parents[2]
FILE = encode(picture(), "JPEG")


@dataclass
class Wire:
    """Answers each request with the next of these, the last one for ever; keeps the requests."""

    answers: list[httpx.Response | Exception]
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)


def found(**extra: object) -> httpx.Response:
    return httpx.Response(200, json={**ANSWER, **extra})


def test_an_answer_is_read_and_what_is_new_in_it_left_out(make_client: MakeClient) -> None:
    wire = Wire([found(a_new_key=1, image={"width": 640, "height": 480, "depth": 8})])
    with make_client("http://service", transport=wire.transport) as client:
        answer = client.detect(FILE)
    assert answer.detections == (Detection("circle", 1, 0.97, Box(10.5, 20.0, 110.2, 96.0)),)
    assert [*answer] == [*answer.detections] and len(answer) == 1
    assert (answer.image.width, answer.model.name, answer.timing_ms.total) == (640, "shapes", 68.4)
    assert hash(answer) == hash(answer_of(ANSWER)), "a frozen value"


def test_nothing_is_sent_that_was_not_given(make_client: MakeClient) -> None:
    wire = Wire([found()])
    with make_client("http://service", transport=wire.transport) as client:
        client.detect(FILE)
    [request] = wire.requests
    assert str(request.url).rstrip("?") == "http://service/detect"
    assert "authorization" not in request.headers
    assert request.headers["content-type"] == "application/octet-stream"


def test_options_a_key_and_a_path_prefix_are_sent(make_client: MakeClient) -> None:
    wire = Wire([found()])
    options = {"score_threshold": 0.0, "nms_threshold": 0.4, "max_detections": 7, "tile": 512, "overlap": 0.25}
    with make_client("https://site/vision/", "a-secret", transport=wire.transport) as client:
        client.detect(FILE, labels=("a&b", "ä"), **options)
        [*_] = client.detect_many([FILE], labels="circle", score_threshold=None)
    first, second = wire.requests
    assert (first.url.path, first.headers["authorization"]) == ("/vision/detect", "Bearer a-secret")
    assert first.url.params.multi_items() == [
        *((name, str(value)) for name, value in options.items()),
        ("label", "a&b"),
        ("label", "ä"),
    ]
    assert second.url.params.multi_items() == [("label", "circle")]


def test_all_attempts_of_a_call_carry_one_id(make_client: MakeClient) -> None:
    wire = Wire([httpx.RemoteProtocolError("closed"), found()])
    with make_client("http://service", transport=wire.transport) as client:
        client.detect(FILE)
        client.detect(FILE)
    first, again, other = (request.headers["x-request-id"] for request in wire.requests)
    assert first == again != other


def images(folder: Path) -> Iterator[tuple[str, object]]:
    path = folder / "photo.jpg"
    path.write_bytes(FILE)
    yield from {
        "a path": path,
        "a path's text": str(path),
        "bytes": FILE,
        "a bytearray": bytearray(FILE),
        "a memoryview": memoryview(FILE),
        "a file in memory": io.BytesIO(FILE),
    }.items()


def test_a_file_s_bytes_go_as_they_are_every_time(make_client: MakeClient, tmp_path: Path) -> None:
    wire = Wire(list(itertools.chain.from_iterable([(httpx.ReadError("reset"), found())] * 7)))
    with make_client("http://service", transport=wire.transport) as client, (tmp_path / "x").open("w+b") as file:
        file.write(FILE)
        file.seek(0)
        for _, image in [*images(tmp_path), ("a file", file)]:
            client.detect(image)
    assert [request.content for request in wire.requests] == [FILE] * 14


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        picture()[:, ::-1],
        picture()[..., ::-1],
        np.asfortranarray(picture(1, 1)),
        Image.fromarray(picture()),
        Image.fromarray(picture()).convert("RGBA"),
        Image.fromarray(picture()).convert("L"),
        Image.fromarray(picture()).convert("P"),
    ],
)
def test_pixels_arrive_as_they_are(image: Any) -> None:
    from retinaserve_client.images import encode as sent

    expected = image.convert("RGB") if isinstance(image, Image.Image) else image
    received = Image.open(io.BytesIO(sent(image)))
    assert (received.format, received.mode) == ("PNG", "RGB")
    assert np.array_equal(received, expected)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (io.StringIO("text"), TypeError),
        (17, TypeError),
        (None, TypeError),
        (np.zeros((4, 4), np.uint8), ValueError),
        (np.zeros((3, 4, 4), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.float32), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        ("no/such.jpg", FileNotFoundError),
    ],
)
def test_what_is_no_image_is_not_sent(make_client: MakeClient, image: object, error: type[Exception]) -> None:
    wire = Wire([found()])
    with make_client("http://service", transport=wire.transport) as client:
        with pytest.raises(error):
            client.detect(image)
        first, second = client.detect_many([image, FILE])
    assert isinstance(first, error) and isinstance(second, Answer)
    assert len(wire.requests) == 1


def test_an_option_that_there_is_not_is_an_error_of_the_caller(make_client: MakeClient) -> None:
    with make_client("http://service", transport=Wire([found()]).transport) as client:
        with pytest.raises(TypeError, match="treshold"):
            client.detect_many([FILE], treshold=0.5)
        with pytest.raises(ValueError, match="concurrency"):
            client.detect_many([FILE], concurrency=0)


ERRORS: dict[str, tuple[httpx.Response | Exception, tuple[str, int | None, str]]] = {
    "a problem": (
        httpx.Response(422, json=PROBLEM),
        ("invalid_image", 422, "the image is empty"),
    ),
    "a page": (httpx.Response(404, html="<h1>Not here</h1>"), ("unexpected_answer", 404, "Not here")),
    "another's JSON": (httpx.Response(400, json=["no"]), ("unexpected_answer", 400, "no")),
    "nothing": (httpx.Response(403), ("unexpected_answer", 403, "Forbidden")),
    "another's answer": (httpx.Response(200, json={"boxes": []}), ("unexpected_answer", 200, "boxes")),
    "a redirect": (
        httpx.Response(308, headers={"Location": "https://service/detect"}),
        ("unexpected_answer", 308, "https://service/detect"),
    ),
    "no answer": (httpx.ConnectError("refused"), ("connection_lost", None, "ConnectError: refused")),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_tells_code_status_detail_and_request(make_client: MakeClient, what: str) -> None:
    outcome, (code, status, detail) = ERRORS[what]
    wire = Wire([outcome])
    with make_client("http://service", attempts=1, transport=wire.transport) as client:
        with pytest.raises(DetectError) as raised:
            client.detect(FILE)
        [value] = client.detect_many([FILE])
    error = raised.value
    assert (error.code, error.status) == (code, status)
    assert detail in error.detail and detail in str(error)
    given = wire.requests[0].headers["x-request-id"]
    assert error.request_id == (PROBLEM["request_id"] if what == "a problem" else given)
    assert isinstance(value, DetectError) and value.code == code


def test_a_drawing_is_asked_for_as_png(make_client: MakeClient) -> None:
    drawn = httpx.Response(200, content=b"PNG", headers={"Content-Type": "image/png"})
    wire = Wire([drawn, found()])
    with make_client("http://service", transport=wire.transport) as client:
        assert client.draw(FILE, score_threshold=0.5) == b"PNG"
        with pytest.raises(DetectError, match="unexpected_answer"):
            client.draw(FILE)
    assert wire.requests[0].headers["accept"] == "image/png"
    assert wire.requests[0].url.params.multi_items() == [("score_threshold", "0.5")]


def test_the_model_is_a_value(make_client: MakeClient) -> None:
    wire = Wire([httpx.Response(200, json=MODEL_CARD)])
    with make_client("http://service", transport=wire.transport) as client:
        model = client.model()
    assert model.labels == (Label(1, "circle"),)
    assert (model.name, model.ap, model.defaults.max_detections) == ("shapes", 0.436, 300)
    assert hash(model)


@pytest.mark.parametrize(
    ("outcome", "ready"),
    [
        (httpx.Response(200, json={"status": "ready"}), True),
        (httpx.Response(503, json=PROBLEM), False),
        (httpx.ConnectError("refused"), False),
    ],
)
def test_readiness_is_asked_once(make_client: MakeClient, outcome: httpx.Response | Exception, ready: bool) -> None:
    wire = Wire([outcome])
    with make_client("http://service", transport=wire.transport) as client:
        assert client.ready() is ready
    assert [request.url.path for request in wire.requests] == ["/readyz"]


@pytest.mark.parametrize("outcome", [httpx.Response(404), httpx.UnsupportedProtocol("ftp")])
def test_what_is_no_service_is_not_merely_not_ready(
    make_client: MakeClient, outcome: httpx.Response | Exception
) -> None:
    with make_client("http://service", transport=Wire([outcome]).transport) as client, pytest.raises(DetectError):
        client.ready()


def test_pictures_are_taken_when_they_are_needed(make_client: MakeClient) -> None:
    taken = itertools.count()
    endless = (FILE for _ in iter(lambda: next(taken), None))
    with make_client("http://service", transport=Wire([found()]).transport) as client:
        answers = client.detect_many(endless, concurrency=2)
        for _ in range(5):
            assert isinstance(next(answers), Answer)
        answers.close()
    assert next(taken) < 20


def test_coco_results_are_those_of_service_detect() -> None:
    boxes, scores = np.array([[10.5, 20.0, 110.2, 96.0]], np.float32), np.array([0.97], np.float32)
    [expected] = coco_results(7, Detections(boxes, scores, np.array([1])))
    [result] = answer_of(ANSWER).to_coco(7)
    assert result.keys() == expected.keys()
    assert result["bbox"] == pytest.approx(expected["bbox"], abs=1e-4)
    assert (result["image_id"], result["category_id"]) == (expected["image_id"], expected["category_id"])
    assert result["score"] == pytest.approx(expected["score"])


@pytest.mark.parametrize("detections", [ANSWER["detections"], []])
def test_supervision_gets_arrays_of_its_shapes(detections: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which tests/foreign/supervision runs."""
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **given: given))
    given: Any = answer_of({**ANSWER, "detections": detections}).to_supervision()
    count = len(detections)
    assert (given["xyxy"].shape, given["xyxy"].dtype) == ((count, 4), np.float32)
    assert given["class_id"].tolist() == [1] * count and given["class_id"].dtype == np.int64
    assert given["confidence"] == pytest.approx([0.97] * count)
    assert given["data"]["class_name"].tolist() == ["circle"] * count


ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(["numpy", "PIL", "tqdm", "supervision", "model", "service"]))  # None: ImportError
import httpx
from retinaserve_client import Client
with Client("http://x", transport=httpx.MockTransport(lambda request: httpx.Response(503)), attempts=1) as client:
    [error] = client.detect_many([b"x"])
    print(error.code)
"""


def test_httpx_is_all_that_it_needs() -> None:
    command = [sys.executable, "-W", "error", "-c", ALONE, str(ROOT / "client")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("unexpected_answer\n", "")
