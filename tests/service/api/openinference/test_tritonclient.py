"""NVIDIA's tritonclient as released, unchanged, against the real service."""

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.support.load import agree, blocks
from tests.support.serving import PNG, FakeDetector, ServerProcess, server_process, serving

THRESHOLD = {"score_threshold": 0.7}
PICTURES = [blocks(200, 150, 1), blocks(90, 120, 2), blocks(64, 64, 3)]
DATATYPES = {
    "num_detections": np.int32, "boxes": np.float32, "scores": np.float32, "class_ids": np.int64, "labels": np.object_,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--max-image-bytes", "100000", "--max-image-pixels", "40000", "--model-name", "shapes")
    with server_process(tmp_path_factory.mktemp("triton"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def input_of(values: Any, datatype: str = "BYTES", *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", list(values.shape), datatype)
    return tensor.set_data_from_numpy(values, binary_data=binary)


def files(*pictures: bytes) -> Any:
    return np.array(pictures, dtype=np.object_)


def detections(server: ServerProcess, picture: bytes, **query: Any) -> list[dict[str, Any]]:
    answer = httpx.post(server.url + "/detect", content=picture, headers=PNG, params=query)
    found: list[dict[str, Any]] = answer.json()["detections"]
    return found


def assert_equal(result: triton.InferResult, expected: list[list[dict[str, Any]]]) -> None:
    """The same detections as /detect's, padded to the picture that has most."""
    tensors = {name: result.as_numpy(name) for name in DATATYPES}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == DATATYPES
    counts, most = [len(each) for each in expected], max(map(len, expected))
    assert tensors["num_detections"].tolist() == counts
    assert tensors["boxes"].shape == (len(expected), most, 4)
    for number, count in enumerate(counts):
        found, padding = unpadded({name: tensor[number] for name, tensor in tensors.items()}, count)
        assert agree(found, expected[number])
        nothing = {"label": "", "class_id": -1, "score": 0, "box": dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), 0)}
        assert padding == [nothing] * (most - count)


def unpadded(tensors: dict[str, Any], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One picture's detections in /detect's form, and the padding behind them."""
    labels = [label.decode() if isinstance(label, bytes) else label for label in tensors["labels"]]
    boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in tensors["boxes"].tolist()]
    rows = zip(labels, tensors["class_ids"].tolist(), tensors["scores"].tolist(), boxes, strict=True)
    every = [{"label": label, "class_id": of, "score": score, "box": box} for label, of, score, box in rows]
    return every[:count], every[count:]


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("shapes") and client.is_model_ready("shapes", "1")
    assert not client.is_model_ready("other") and not client.is_model_ready("shapes", "2")
    assert client.get_server_metadata()["name"] == "retinaserve"
    metadata = client.get_model_metadata("shapes")
    assert [each["datatype"] for each in metadata["outputs"]] == ["INT32", "FP32", "FP32", "INT64", "BYTES"]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("binary_answer", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_files_are_detected_in_as_by_detect(
    server: ServerProcess, client: triton.InferenceServerClient, binary: bool, binary_answer: bool, number: int
) -> None:
    pictures = PICTURES[:number]
    given = pictures if binary else [base64.b64encode(picture) for picture in pictures]
    outputs = None if binary_answer else [triton.InferRequestedOutput(name, binary_data=False) for name in DATATYPES]
    result = client.infer("shapes", [input_of(files(*given), binary=binary)], outputs=outputs, parameters=THRESHOLD)
    expected = [detections(server, picture, **THRESHOLD) for picture in pictures]
    assert len({len(each) for each in expected}) == min(number, 2), "padding shows"
    assert_equal(result, expected)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("binary", [True, False])
def test_frames_of_rgb_are_detected_in(
    server: ServerProcess, client: triton.InferenceServerClient, binary: bool, several: bool
) -> None:
    picture = blocks(81, 67, 5)
    frame = np.asarray(Image.open(io.BytesIO(picture)))
    frames = np.stack([frame, frame]) if several else frame
    result = client.infer("shapes", [input_of(frames, "UINT8", binary=binary)])
    assert_equal(result, [detections(server, picture)] * (2 if several else 1))


def test_options_are_parameters_and_outputs_are_those_asked_for(
    server: ServerProcess, client: triton.InferenceServerClient
) -> None:
    options = {"score_threshold": 0.3, "label": "circle, square", "max_detections": 3}
    wanted = [triton.InferRequestedOutput("scores"), triton.InferRequestedOutput("labels", binary_data=False)]
    result = client.infer(
        "shapes", [input_of(files(PICTURES[0]))], "1", wanted, "request-7", sequence_id=4, priority=2,
        timeout=60_000_000, parameters=options,
    )  # fmt: skip
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("request-7", "shapes", "1")
    assert [each["name"] for each in response["outputs"]] == ["scores", "labels"]
    expected = detections(server, PICTURES[0], score_threshold=0.3, label=["circle", "square"], max_detections=3)
    assert len(expected) == 3
    assert result.as_numpy("scores")[0] == pytest.approx([each["score"] for each in expected], abs=2e-3)
    assert result.as_numpy("labels")[0].tolist() == [each["label"] for each in expected]


def test_tiles_are_a_parameter_too_of_files_and_of_frames(
    server: ServerProcess, client: triton.InferenceServerClient
) -> None:
    tiles = {"tile": 64, "overlap": 0.25} | THRESHOLD
    expected = [detections(server, PICTURES[0], **tiles)]
    assert not agree(expected[0], detections(server, PICTURES[0], **THRESHOLD))
    frame = np.asarray(Image.open(io.BytesIO(PICTURES[0])))
    for tensor in (input_of(files(PICTURES[0])), input_of(frame, "UINT8")):
        assert_equal(client.infer("shapes", [tensor], parameters=tiles), expected)


@pytest.mark.parametrize("binary", [True, False])
def test_nothing_found_is_an_answer(client: triton.InferenceServerClient, binary: bool) -> None:
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in DATATYPES]
    result = client.infer("shapes", [input_of(files(PICTURES[0]))], outputs=wanted, parameters={"score_threshold": 1})
    assert result.as_numpy("num_detections").tolist() == [0]
    assert [result.as_numpy(name).shape for name in ("boxes", "labels")] == [(1, 0, 4), (1, 0)]


def test_the_asynchronous_call_works_too(client: triton.InferenceServerClient) -> None:
    assert client.async_infer("shapes", [input_of(files(PICTURES[0]))]).get_result().as_numpy("boxes") is not None


Call = Callable[[triton.InferenceServerClient], Any]
ERRORS: dict[str, tuple[Call, str, str]] = {
    "no picture": (lambda c: c.infer("shapes", [input_of(files(b"no picture"))]), "422", "invalid_image: "),
    "a bad one of two": (lambda c: c.infer("shapes", [input_of(files(PICTURES[0], b"x"))]), "422", "invalid_image: "),
    "option": (
        lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], parameters={"score_threshold": 2}),
        "422", "invalid_parameter: score_threshold",
    ),
    "unknown option": (
        lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], parameters={"treshold": 0.5}),
        "422", "invalid_parameter: treshold",
    ),
    "label": (
        lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], parameters={"label": "circle,unicorn"}),
        "422", "invalid_parameter: label: 'unicorn'",
    ),
    "too many bytes": (lambda c: c.infer("shapes", [input_of(files(bytes(100_001)))]), "413", "body_too_large: "),
    "too many pixels": (
        lambda c: c.infer("shapes", [input_of(np.zeros((201, 200, 3), np.uint8), "UINT8")]), "413", "too_many_pixels: ",
    ),
    "too many pictures": (lambda c: c.infer("shapes", [input_of(files(*PICTURES * 6))]), "400", "malformed_request: "),
    "datatype": (lambda c: c.infer("shapes", [input_of(np.zeros((1, 4), np.float32), "FP32")]), "400", "malformed_"),
    "output": (
        lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], outputs=[triton.InferRequestedOutput("masks")]),
        "400", "malformed_request: the output 'masks'",
    ),
    "classification": (
        lambda c: c.infer(
            "shapes", [input_of(files(PICTURES[0]))], outputs=[triton.InferRequestedOutput("scores", class_count=2)]
        ),
        "400", "malformed_request: classification",
    ),
    "compressed": (
        lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], request_compression_algorithm="gzip"),
        "415", "unsupported_media_type: ",
    ),
    "model": (lambda c: c.infer("other", [input_of(files(PICTURES[0]))]), "404", "not_found: unknown model 'other'"),
    "version": (lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], "2"), "404", "not_found: "),
    "no time": (lambda c: c.infer("shapes", [input_of(files(PICTURES[0]))], timeout=1), "504", "deadline_exceeded: "),
    "extension": (lambda c: c.get_model_config("shapes"), "404", "not_found: "),
    "method": (lambda c: c.get_model_repository_index(), "404", "not_found: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_the_client_reads_every_error(client: triton.InferenceServerClient, kind: str) -> None:
    call, status, says = ERRORS[kind]
    with pytest.raises(InferenceServerException) as raised:
        call(client)
    assert (raised.value.status(), raised.value.message()[: len(says)]) == (status, says)


def test_with_keys_the_probes_are_open_and_the_rest_is_not(tmp_path: Path) -> None:
    with server_process(tmp_path, "--api-keys", "secret", "--queue-capacity", "1") as server:
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        assert client.is_server_live() and client.is_server_ready()
        with pytest.raises(InferenceServerException, match="unauthorized: "):
            client.get_model_metadata("tiny")
        headers = {"X-API-Key": "secret"}
        assert client.get_model_metadata("tiny", headers=headers)["name"] == "tiny"
        with pytest.raises(InferenceServerException, match="1 to 1 are allowed"):
            client.infer("tiny", [input_of(files(*PICTURES[:2]))], headers=headers)
        client.close()


def test_a_full_line_and_a_lost_device_are_told() -> None:
    detector = FakeDetector()
    detector.gate.clear()
    with serving(detector, queue_capacity=1) as server, ThreadPoolExecutor(1) as pool:
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        waiting = pool.submit(server.client.post, "/detect", content=PICTURES[0], headers=PNG)
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 1)
        with pytest.raises(InferenceServerException, match="overloaded: ") as raised:
            client.infer("fake", [input_of(files(PICTURES[0]))])
        assert raised.value.status() == "429"
        detector.gate.set()
        assert waiting.result().status_code == 200
        server.service.store.device_fault = "it fell off the bus"
        assert not client.is_server_live() and not client.is_model_ready("fake")
        with pytest.raises(InferenceServerException, match="not_ready: ") as raised:
            client.infer("fake", [input_of(files(PICTURES[0]))])
        assert raised.value.status() == "503"
        client.close()
