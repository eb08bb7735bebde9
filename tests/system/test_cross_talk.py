"""Three hundred requests at once, of other pixels, sizes, options and forms: each gets the answer it gets alone.

The forms: raw bytes, multipart, base64, a batch, Hugging Face's, files and frames of /v2, a drawing, tiles.
"""

import base64
import io
import itertools
import json
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from model.types import Pixels
from tests.support.load import PNG, Reply, Scrape, agree, ask, blocks
from tests.support.serving import server_process
from tests.support.tiny_model import SHAPES, write_tiny_model

pytestmark = pytest.mark.slow

REQUESTS = 300
SIZES = ((64, 64), (90, 64), (100, 80), (64, 90), (200, 130))
NAMES = [label.label for label in SHAPES]
JSON_TYPE = {"Content-Type": "application/json"}
INFER = "/v2/models/tiny/infer"
Answers = list[list[dict[str, Any]]]
"""The detections of each picture."""


@dataclass(frozen=True)
class Question:
    images: tuple[bytes, ...]
    options: Mapping[str, Any]
    form: str

    @property
    def query(self) -> str:
        return str(httpx.QueryParams(dict(self.options)))

    def asked_of(self, url: str) -> "Answers | Pixels":
        return FORMS[self.form](self, url)

    def asked_alone(self, url: str) -> "Answers | Pixels":
        """Picture by picture, in the plainest form that has this answer."""
        if self.form in ("drawing", "tiles"):
            return self.asked_of(url)
        return [raw(Question((image,), self.options, "raw"), url)[0] for image in self.images]


def raw(question: Question, url: str) -> Answers:
    return answers(ask(url, f"/detect?{question.query}", question.images[0], PNG))


def tiles(question: Question, url: str) -> Answers:
    return answers(ask(url, f"/detect?tile=64&{question.query}", question.images[0], PNG))


def multipart(question: Question, url: str, path: str = "/detect") -> Answers:
    request = httpx.Request("POST", url, files=[("image", image) for image in question.images])
    headers = {"Content-Type": request.headers["content-type"]}
    return answers(ask(url, f"{path}?{question.query}", request.read(), headers))


def batch(question: Question, url: str) -> Answers:
    return multipart(question, url, "/detect/batch")


def in_json(question: Question, url: str) -> Answers:
    body = json.dumps({"image": base64.b64encode(question.images[0]).decode()}).encode()
    return answers(ask(url, f"/detect?{question.query}", body, JSON_TYPE))


def hugging_face(question: Question, url: str) -> Answers:
    inputs = base64.b64encode(question.images[0]).decode()
    return answers(ask(url, "/", json.dumps({"inputs": inputs, "parameters": question.options}).encode(), JSON_TYPE))


def files(question: Question, url: str) -> Answers:
    data = [base64.b64encode(image).decode() for image in question.images]
    return infer(question, url, {"datatype": "BYTES", "shape": [len(data)], "data": data})


def frames(question: Question, url: str) -> Answers:
    pixels = pixels_of(question.images[0])
    tensor = {"datatype": "UINT8", "shape": pixels.shape, "parameters": {"binary_data_size": pixels.nbytes}}
    return infer(question, url, tensor, pixels.tobytes())


def infer(question: Question, url: str, tensor: Mapping[str, Any], data: bytes = b"") -> Answers:
    labels = {"label": ",".join(question.options["label"])} if question.options["label"] else {}
    numbers = {name: value for name, value in question.options.items() if name != "label"}
    head = json.dumps({"inputs": [{"name": "image", **tensor}], "parameters": numbers | labels}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if data else JSON_TYPE
    return answers(ask(url, INFER, head + data, headers))


def drawing(question: Question, url: str) -> Pixels:
    reply = ask(url, f"/detect?{question.query}", question.images[0], PNG | {"Accept": "image/png"})
    assert reply.status == 200, reply.body
    return pixels_of(reply.body)


FORMS: Mapping[str, "Callable[[Question, str], Answers | Pixels]"] = {
    "batch": batch, "multipart": multipart, "json": in_json, "hugging face": hugging_face, "files": files,
    "frames": frames, "drawing": drawing, "tiles": tiles, "raw": raw,
}  # fmt: skip
IMAGES = {"batch": 3, "files": 2}
"""In one request, where that is not 1."""


def pixels_of(image: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def answers(reply: Reply) -> Answers:
    assert reply.status == 200, reply.body
    values = json.loads(reply.body)
    if isinstance(values, list):
        return [values]
    if "outputs" in values:
        return out_of_tensors({output["name"]: output["data"] for output in values["outputs"]})
    return [each["detections"] for each in values.get("results", [values])]


def out_of_tensors(data: Mapping[str, list[Any]]) -> Answers:
    most, boxes = max(data["num_detections"]), np.reshape(data["boxes"], (-1, 4)).tolist()
    sides = ("xmin", "ymin", "xmax", "ymax")
    found = [
        {"label": label, "class_id": class_id, "score": score, "box": dict(zip(sides, box, strict=True))}
        for label, class_id, score, box in zip(data["labels"], data["class_ids"], data["scores"], boxes, strict=True)
    ]
    return [found[number * most :][:count] for number, count in enumerate(data["num_detections"])]


def questions(count: int, seed: int = 0) -> list[Question]:
    """No two alike; every form in turn."""
    chance, seeds, forms = random.Random(seed), itertools.count(seed * 10**6), itertools.cycle(FORMS)
    return [
        Question(
            tuple(blocks(*chance.choice(SIZES), seed=next(seeds)) for _ in range(IMAGES.get(form, 1))),
            {
                "score_threshold": round(chance.uniform(0.05, 0.7), 3),
                "nms_threshold": round(chance.uniform(0.3, 1), 3),
                "max_detections": chance.randint(1, 30),
                "label": chance.sample(NAMES, chance.randint(0, 2)),
            },
            form,
        )
        for form in itertools.islice(forms, count)
    ]


def same(together: "Answers | Pixels", alone: "Answers | Pixels") -> bool:
    if isinstance(together, np.ndarray) and isinstance(alone, np.ndarray):
        return together.shape == alone.shape and float((together != alone).mean()) < 0.02  # float noise moves a line
    return len(together) == len(alone) and all(map(agree, together, alone))


def cross_talk(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Ask so many questions one after the other, and then all at once. Returns how many runs of the device it took."""
    asked = questions(count, seed)
    write_tiny_model(folder / "tiny.onnx")
    flags = ("--queue-capacity", str(2 * count), "--max-batch-size", "8", "--request-timeout-seconds", "250")
    with server_process(folder, *flags, "--threads", "2", model_path=folder / "tiny.onnx") as server:
        alone = [question.asked_alone(server.url) for question in asked]
        runs_alone = int(Scrape(server.url)("retinaserve_batch_size_count"))
        with ThreadPoolExecutor(count) as pool:
            together = list(pool.map(lambda question: question.asked_of(server.url), asked))
        scrape = Scrape(server.url)
    runs_together = int(scrape("retinaserve_batch_size_count")) - runs_alone
    assert scrape("retinaserve_images_total") == 2 * sum(len(question.images) for question in asked)
    assert runs_together < runs_alone, "no batch was ever shared"
    assert len({str(answer) for answer in alone}) > count * 0.8, "the questions are too alike"
    wrong = [
        (number, question.form)
        for number, (question, *both) in enumerate(zip(asked, together, alone, strict=True))
        if not same(*both)
    ]
    assert wrong == []
    return {"runs_alone": runs_alone, "runs_together": runs_together}


def test_each_of_300_concurrent_requests_gets_the_answer_it_gets_alone(tmp_path: Path) -> None:
    cross_talk(tmp_path, REQUESTS)
