"""Inference requests, well-formed and not: what is read of them, and that nothing else happens."""

import base64
import collections
import copy
import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from model.image import InvalidImage, TooManyPixels, decode_image
from service.api.errors import InvalidParameter
from service.api.openinference.pictures import TIFF_HEAD_BYTES, Limits
from service.api.openinference.request import InferBody, InferRequest, json_bytes_of
from service.api.openinference.tensors import OUTPUTS
from service.api.uploads import BodyTooLarge, MalformedRequest

LIMITS = Limits(max_images=4, max_image_bytes=1000, max_image_pixels=400)
FRAME = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
FORESEEN = (MalformedRequest, BodyTooLarge, TooManyPixels, InvalidImage, InvalidParameter)

Document = dict[str, Any]


def document_of(datatype: str, shape: list[int], **members: Any) -> Document:
    """`data` or `size` in the input, and whatever a request may have."""
    tensor: Document = {"name": "image", "datatype": datatype, "shape": shape}
    if "data" in members:
        tensor["data"] = members.pop("data")
    if "size" in members:
        tensor["parameters"] = {"binary_data_size": members.pop("size")}
    return {"inputs": [tensor]} | members


def of_files(*files: bytes, **members: Any) -> tuple[Document, bytes]:
    data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    return document_of("BYTES", [len(files)], size=len(data), **members), data


def of_frame(frame: Any = FRAME, **members: Any) -> tuple[Document, bytes]:
    return document_of("UINT8", list(frame.shape), size=frame.nbytes, **members), frame.tobytes()


def read(document: Any, data: bytes | None = None, piece_bytes: int = 10**9, limits: Limits = LIMITS) -> InferRequest:
    """Read a request that arrives in pieces. Without data it has no Inference-Header-Content-Length."""
    encoded = document if isinstance(document, bytes) else json.dumps(document).encode()
    body = InferBody(None if data is None else len(encoded), limits)
    whole = encoded + (data or b"")
    for start in range(0, len(whole), piece_bytes):
        body.feed(whole[start : start + piece_bytes])
    return body.finish()


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 5, 7, 50, 10**9])
def test_pictures_are_the_same_however_the_body_is_cut(piece_bytes: int) -> None:
    files = [b"", b"a", b"four", b"five5" * 9]
    wanted, pictures = read(*of_files(*files, id="a"), piece_bytes=piece_bytes)
    assert (wanted.id, pictures) == ("a", files)
    _, [picture] = read(*of_frame(), piece_bytes=piece_bytes)
    assert np.array_equal(decode_image(bytes(picture)), FRAME)


def test_json_and_binary_are_the_same_pictures() -> None:
    files = [bytes([number]) * 10 for number in range(3)]
    texts = [base64.b64encode(file).decode() for file in files]
    for shape, data in (([3], texts), ([3, 1], [[text] for text in texts])):
        assert read(document_of("BYTES", shape, data=data))[1] == files == read(*of_files(*files))[1]
    large = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
    for frame in (FRAME, large, np.stack([FRAME] * 3)):
        binary = read(*of_frame(frame))[1]
        for data in (frame.ravel().tolist(), frame.tolist()):
            assert read(document_of("UINT8", list(frame.shape), data=data))[1] == binary


def test_the_json_may_have_a_length_though_nothing_is_behind_it() -> None:
    frame = np.zeros((200, 200, 3), np.uint8)
    for data in (FRAME, frame):
        document = document_of("UINT8", list(data.shape), data=data.tolist())
        assert len(read(document, b"", limits=Limits(1, 1, 40_000))[1]) == 1


def test_what_is_asked_for_besides() -> None:
    outputs = [{"name": "labels", "parameters": {"binary_data": False}}, {"name": "boxes", "parameters": None}]
    options = {"binary_data_output": True, "timeout": 2_500_000, "priority": 1, "label": "a, b", "tile": 640}
    wanted, _ = read(*of_files(b"a", parameters=options, outputs=outputs, model_name="whatever"))
    assert dict(wanted.outputs) == {"labels": False, "boxes": True}
    assert (wanted.timeout_seconds, wanted.id) == (2.5, None)
    assert wanted.parameters == {"label": ["a", "b"], "tile": 640}
    plain, _ = read(*of_files(b"a", id=None, parameters=None, outputs=[]))
    assert (dict(plain.outputs), plain.timeout_seconds) == (dict.fromkeys(OUTPUTS, False), math.inf)


MALFORMED: dict[str, Any] = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "no object": [],
    "no inputs": {},
    "two inputs": {"inputs": of_files(b"a")[0]["inputs"] * 2},
    "an input of no members": {"inputs": [{}]},
    "another input": {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["YQ=="]}]},
    "neither data nor size": document_of("BYTES", [1]),
    "data and size": document_of("BYTES", [1], data=["YQ=="], size=5),
    "size without binary data": document_of("BYTES", [1], size=5),
    "size that is none": document_of("BYTES", [1], size=True),
    "no shape": {"inputs": [{"name": "image", "datatype": "BYTES", "data": ["YQ=="]}]},
    "shape that is negative": document_of("BYTES", [-1], data=["YQ=="]),
    "shape of a float": document_of("BYTES", [1.0], data=["YQ=="]),
    "shape of many": document_of("BYTES", [1] * 5, data=["YQ=="]),
    "no pictures": document_of("BYTES", [0], data=[]),
    "too many pictures": document_of("BYTES", [5], data=["YQ=="] * 5),
    "fewer than the shape": document_of("BYTES", [2], data=["YQ=="]),
    "datatype": document_of("FP32", [1, 1, 3], data=[0.1, 0.2, 0.3]),
    "no base64": document_of("BYTES", [1], data=["?"]),
    "numbers for files": document_of("BYTES", [1], data=[1]),
    "a frame of four channels": document_of("UINT8", [1, 1, 4], data=[1, 2, 3, 4]),
    "fewer numbers": document_of("UINT8", [1, 1, 3], data=[1, 2]),
    "ragged numbers": document_of("UINT8", [1, 1, 3], data=[[1], [2, 3]]),
    "fractions": document_of("UINT8", [1, 1, 3], data=[1, 2, 3.5]),
    "truths": document_of("UINT8", [1, 1, 3], data=[True, False, True]),
    "negative numbers": document_of("UINT8", [1, 1, 3], data=[1, 2, -3]),
    "large numbers": document_of("UINT8", [1, 1, 3], data=[1, 2, 256]),
    "huge numbers": document_of("UINT8", [1, 1, 3], data=[1, 2, 10**40]),
    "large numbers among many": document_of("UINT8", [20, 20, 3], data=[1] * 1199 + [256]),
    "fractions among many": document_of("UINT8", [20, 20, 3], data=[1] * 1199 + [0.5]),
    "more than many": document_of("UINT8", [20, 20, 3], data=[100] * 1500),
    "text for numbers": document_of("UINT8", [1, 1, 3], data="x" * 5000),
    "id": document_of("BYTES", [1], data=["YQ=="], id=5),
    "output": document_of("BYTES", [1], data=["YQ=="], outputs=[{"name": "masks"}]),
    "output twice": document_of("BYTES", [1], data=["YQ=="], outputs=[{"name": "boxes"}] * 2),
    "outputs that are no list": document_of("BYTES", [1], data=["YQ=="], outputs="boxes"),
    "binary that is no truth": document_of("BYTES", [1], data=["YQ=="], parameters={"binary_data_output": 1}),
    "parameters that are no object": document_of("BYTES", [1], data=["YQ=="], parameters=[1]),
    "shared memory": {"inputs": [{"name": "image", "parameters": {"shared_memory_region": "a"}}]},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_says_what_to_mend(kind: str) -> None:
    with pytest.raises(MalformedRequest) as raised:
        read(MALFORMED[kind])
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}])
def test_a_parameter_is_a_number_or_a_string(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="score_threshold"):
        read(*of_files(b"a", parameters={"score_threshold": value}))
    with pytest.raises(InvalidParameter, match="timeout"):
        read(*of_files(b"a", parameters={"timeout": value or 1.5}))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_sizes_that_do_not_sum_up_are_told(wrong: int) -> None:
    for document, data in (of_files(b"abc", b"de"), of_frame()):
        document["inputs"][0]["parameters"]["binary_data_size"] += wrong
        for behind in (data, data[:wrong] if wrong < 0 else data + b"x"):
            with pytest.raises(MalformedRequest):
                read(document, behind)
    with pytest.raises(MalformedRequest):
        read(of_files(b"abc", b"de")[0] | {}, of_files(b"abc", b"dex"[: 2 + wrong])[1])


@pytest.mark.parametrize("header", ["", "-1", "1.0", " 5", "5x", "٥", "9" * 19])
def test_a_length_of_the_json_that_is_none_is_told(header: str) -> None:
    with pytest.raises(MalformedRequest):
        json_bytes_of(header)


def test_limits_are_told_before_the_data_comes() -> None:
    cases = [
        (document_of("BYTES", [2], size=2009), BodyTooLarge),
        (document_of("UINT8", [21, 20, 3], size=1260), TooManyPixels),
        (document_of("UINT8", [2**62, 2**62, 3], size=2**62), TooManyPixels),
        (document_of("UINT8", [0, 5, 3], size=0), InvalidImage),
        (document_of("BYTES", [5], size=25), MalformedRequest),
    ]
    for document, error in cases:
        encoded = json.dumps(document).encode()
        with pytest.raises(error):
            InferBody(len(encoded), LIMITS).feed(encoded)
    with pytest.raises(BodyTooLarge):
        read(document_of("BYTES", [1], data=[base64.b64encode(bytes(1001)).decode()]))
    encoded = json.dumps(document_of("BYTES", [2], size=2008)).encode()
    with pytest.raises(BodyTooLarge, match="an image has 1001 bytes"):
        InferBody(len(encoded), LIMITS).feed(encoded + (1001).to_bytes(4, "little"))


def test_empty_elements_beyond_the_shape_take_no_memory() -> None:
    """5 million of them would take 280 MB for the 20 that they are sent in."""
    encoded = json.dumps(document_of("BYTES", [1], size=20_000_000)).encode()
    body = InferBody(len(encoded), Limits(1, 20_000_000, 1))
    body.feed(encoded)
    elements = bytes(4_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedRequest, match="more than 1 images"):
            body.feed(elements)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


EXTREMES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 255, 256, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "YQ==", "BYTES", "UINT8",
    "image", "boxes", [], [1], [7, 9, 3], [21, 20, 3], [4, 7, 9, 3], [[]], [[[[]]]], [None], ["YQ=="], {},
    {"name": "boxes"}, {"binary_data_size": 5}, "y" * 5000, [1] * 3000, [{}] * 50,
]  # fmt: skip


def seeds() -> list[tuple[Document, bytes | None]]:
    outputs = [{"name": "boxes", "parameters": {"binary_data": True}}, {"name": "labels"}]
    options = {"score_threshold": 0.5, "label": "a,b", "timeout": 10, "binary_data_output": True}
    texts = [base64.b64encode(bytes(600)).decode(), "YQ=="]
    many = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
    return [
        of_files(b"abc", id="r"),
        of_files(b"a" * 900, b"", b"c", parameters=options, outputs=outputs),
        of_frame(),
        of_frame(np.stack([FRAME] * 4), parameters=options),
        (document_of("BYTES", [2], data=texts, outputs=outputs, id="r"), None),
        (document_of("UINT8", [20, 20, 3], data=many.ravel().tolist(), parameters=options), None),
        (document_of("UINT8", [1, 2, 3], data=[[[1, 2, 3], [4, 5, 6]]], parameters=options), None),
    ]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a document, but of long lists a few."""
    keys = value if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def put_extremes(document: Document, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2))):
        container, key = chance.choice(list(places(document)) or [(document, "inputs")])
        if isinstance(container, dict) and chance.random() < 0.1:
            del container[key]
        else:
            container[key] = copy.deepcopy(chance.choice(EXTREMES))


def damage(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data) + 1)
    kind = chance.randrange(4)
    if kind == 0 and place < len(data):
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = data[: chance.choice((1, 4, 100))]
    else:
        data[place : place + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0"))


def fed(body: InferBody, data: bytes, chance: random.Random) -> InferRequest:
    position = 0
    while position < len(data):
        size = chance.choice((1, 3, 60, 5000))
        body.feed(data[position : position + size])
        position += size
    return body.finish()


def outcome_of(case: tuple[Document, bytes | None], chance: random.Random) -> str:
    """Mutate the request and have it read; an exception that is not foreseen passes through."""
    document, data = copy.deepcopy(case)
    if chance.random() < 0.6:
        put_extremes(document, chance)
    encoded, behind = bytearray(json.dumps(document).encode()), bytearray(data or b"")
    length = None if data is None else len(encoded)
    if chance.random() < 0.3:
        damage(chance.choice((encoded, behind)), chance)
    if length is not None and chance.random() < 0.2:
        length = max(0, length + chance.choice((-5, -1, 1, 5, 10**9, -(10**9))))
    whole = bytes(encoded + behind)
    try:
        wanted, pictures = fed(InferBody(length, LIMITS), whole, chance)
    except FORESEEN as error:
        return type(error).__name__
    assert 0 < len(pictures) <= LIMITS.max_images
    assert sum(map(len, pictures)) <= len(whole) + TIFF_HEAD_BYTES * len(pictures)
    assert max(map(len, pictures)) <= max(LIMITS.max_image_bytes, LIMITS.max_image_pixels * 3 + TIFF_HEAD_BYTES)
    assert wanted.outputs and set(wanted.outputs) <= set(OUTPUTS) and wanted.timeout_seconds > 0
    json.dumps(wanted.id)
    return "read"


def test_two_thousand_requests_of_every_shape_are_read_or_refused() -> None:
    chance, cases = random.Random(0), seeds()
    outcomes = collections.Counter(outcome_of(cases[number % len(cases)], chance) for number in range(2000))
    assert min(outcomes["read"], outcomes["MalformedRequest"]) > 300, outcomes
    assert set(outcomes) == {"read"} | {error.__name__ for error in FORESEEN}
