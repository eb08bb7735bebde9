"""KServe's InferenceRESTClient as released, unchanged, against the real service: run by `make test-foreign`."""

import asyncio
import base64
import io
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from PIL import Image

from tests.support.serving import PNG, ServerProcess, server_process, wait_until

THRESHOLD = {"score_threshold": 0.7}
NAMES = ["num_detections", "boxes", "scores", "class_ids", "labels"]


def picture(seed: int, width: int = 90, height: int = 70) -> bytes:
    """A PNG of random colours in 8 x 6 blocks."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(1), picture(2, 120, 64), picture(3, 64, 64)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--max-image-bytes", "100000", "--max-image-pixels", "40000", "--drain-delay-seconds", "30")
    with server_process(tmp_path_factory.mktemp("kserve"), *flags) as running:
        yield running


def ask(call: Callable[[InferenceRESTClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
            return await call(client)

    return asyncio.run(run())


def infer(server: ServerProcess, *tensors: InferInput, model: str = "tiny", **members: Any) -> InferResponse:
    request = InferRequest(model, list(tensors), **members)
    return ask(lambda client: client.infer(server.url, request, model_name=model))


def input_of(values: Any, datatype: str = "BYTES", *, binary: bool = True) -> InferInput:
    tensor = InferInput("image", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def files(*pictures: bytes) -> Any:
    return np.array(pictures, dtype=np.object_)


def detections(server: ServerProcess, image: bytes, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.post(server.url + "/detect", content=image, headers=PNG, params=query).json()[
        "detections"
    ]
    return found


def assert_equal(response: InferResponse, expected: list[list[dict[str, Any]]]) -> None:
    """The same detections as /detect's, as far as there are any."""
    tensors = {output.name: output.as_numpy() for output in response.outputs}
    assert list(tensors) == NAMES
    assert tensors["num_detections"].tolist() == [len(each) for each in expected]
    for number, found in enumerate(expected):
        count = len(found)
        assert tensors["labels"][number][:count].tolist() == [each["label"] for each in found]
        assert tensors["class_ids"][number][:count].tolist() == [each["class_id"] for each in found]
        assert tensors["scores"][number][:count] == pytest.approx([each["score"] for each in found], abs=2e-3)
        boxes = np.array([list(each["box"].values()) for each in found])
        assert np.allclose(tensors["boxes"][number][:count], boxes, rtol=0, atol=2e-3)
        assert not tensors["scores"][number][count:].any()
        assert set(tensors["class_ids"][number][count:].tolist()) <= {-1}


def test_health(server: ServerProcess) -> None:
    assert ask(lambda client: client.is_server_live(server.url)) is True
    assert ask(lambda client: client.is_server_ready(server.url)) is True
    assert ask(lambda client: client.is_model_ready(server.url, "tiny")) is True
    assert ask(lambda client: client.is_model_ready(server.url, "other")) is False


@pytest.mark.parametrize("binary_answer", [False, True])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_files_are_detected_in_as_by_detect(
    server: ServerProcess, number: int, binary: bool, binary_answer: bool
) -> None:
    given = PICTURES[:number] if binary else [base64.b64encode(each) for each in PICTURES[:number]]
    outputs = [RequestedOutput(name, {"binary_data": True}) for name in NAMES] if binary_answer else None
    tensor = input_of(files(*given), binary=binary)
    response = infer(server, tensor, request_id="r-1", parameters=THRESHOLD, request_outputs=outputs)
    assert (response.id, response.model_name) == ("r-1", "tiny")
    assert_equal(response, [detections(server, each, **THRESHOLD) for each in PICTURES[:number]])


@pytest.mark.parametrize("binary", [True, False])
def test_frames_of_rgb_are_detected_in(server: ServerProcess, binary: bool) -> None:
    frame = np.asarray(Image.open(io.BytesIO(PICTURES[0])))
    assert_equal(infer(server, input_of(frame, "UINT8", binary=binary)), [detections(server, PICTURES[0])])


def test_a_dictionary_goes_out_as_it_is(server: ServerProcess) -> None:
    data = [base64.b64encode(PICTURES[0]).decode()]
    body = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": data}]}
    answer = ask(lambda client: client.infer(server.url, body, model_name="tiny"))
    assert_equal(answer, [detections(server, PICTURES[0])])


def test_nothing_found_is_an_answer(server: ServerProcess) -> None:
    response = infer(server, input_of(files(PICTURES[0])), parameters={"score_threshold": 1.0})
    assert {output.name: output.shape for output in response.outputs}["boxes"] == [1, 0, 4]


ERRORS: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "no picture": (files(b"no picture"), {}, 422, "invalid_image: "),
    "option": (files(PICTURES[0]), {"parameters": {"score_threshold": 2.0}}, 422, "invalid_parameter: "),
    "label": (files(PICTURES[0]), {"parameters": {"label": "unicorn"}}, 422, "invalid_parameter: label"),
    "too many bytes": (files(bytes(100_001)), {}, 413, "body_too_large: "),
    "too many pixels": (np.zeros((201, 200, 3), np.uint8), {}, 413, "too_many_pixels: "),
    "too many pictures": (files(*PICTURES * 6), {}, 400, "malformed_request: "),
    "datatype": (np.zeros((1, 4), np.float32), {}, 400, "malformed_request: "),
    "output": (files(PICTURES[0]), {"request_outputs": [RequestedOutput("masks", {})]}, 400, "malformed_request: "),
    "model": (files(PICTURES[0]), {"model": "other"}, 404, "not_found: unknown model 'other'"),
    "no time": (files(PICTURES[0]), {"parameters": {"timeout": 1}}, 504, "deadline_exceeded: "),
}
DATATYPES = {"O": "BYTES", "u": "UINT8", "f": "FP32"}


@pytest.mark.parametrize("kind", ERRORS)
def test_the_client_shows_every_error(server: ServerProcess, kind: str) -> None:
    values, members, status, says = ERRORS[kind]
    with pytest.raises(httpx.HTTPStatusError) as raised:
        infer(server, input_of(values, DATATYPES[values.dtype.kind]), **members)
    assert raised.value.response.status_code == status
    assert str(raised.value).startswith(says)


def test_with_keys_the_probes_are_open_and_the_rest_is_not(tmp_path_factory: pytest.TempPathFactory) -> None:
    with server_process(tmp_path_factory.mktemp("keys"), "--api-keys", "secret") as server:
        assert ask(lambda client: client.is_server_ready(server.url)) is True
        with pytest.raises(httpx.HTTPStatusError, match=r"^unauthorized: "):
            infer(server, input_of(files(PICTURES[0])))


def test_a_server_that_drains_is_not_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    with server_process(tmp_path_factory.mktemp("drains"), "--drain-delay-seconds", "30") as server:
        server.process.terminate()
        wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        with pytest.raises(httpx.HTTPStatusError, match=r"^not_ready: draining"):
            ask(lambda client: client.is_server_ready(server.url))
        assert ask(lambda client: client.is_server_live(server.url)) is True
