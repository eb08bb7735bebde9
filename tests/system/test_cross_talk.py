"""Five hundred requests at once, of other pixels, sizes, thresholds and labels: each gets the answer it gets alone."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.load import PNG, Reply, Scrape, agree, ask, blocks
from tests.support.serving import server_process
from tests.support.tiny_model import SHAPES, write_tiny_model

pytestmark = pytest.mark.slow

REQUESTS = 500
SIZES = ((64, 64), (90, 64), (100, 80), (64, 90), (200, 130))
NAMES = [label.label for label in SHAPES]


@dataclass(frozen=True)
class Question:
    images: tuple[bytes, ...]
    query: str

    def asked_alone(self, url: str) -> list[list[dict[str, Any]]]:
        """Picture by picture, without a batch."""
        return [detections_of(Question((image,), self.query).asked_of(url))[0] for image in self.images]

    def asked_of(self, url: str) -> Reply:
        if len(self.images) == 1:
            return ask(url, f"/detect?{self.query}", self.images[0], PNG)
        request = httpx.Request("POST", url, files=[("image", image) for image in self.images])
        return ask(
            url, f"/detect/batch?{self.query}", request.read(), {"Content-Type": request.headers["content-type"]}
        )


def questions(count: int) -> list[Question]:
    """No two alike; one in ten is a batch of three pictures."""
    chance, seeds = random.Random(0), itertools.count()
    return [
        Question(
            tuple(blocks(*chance.choice(SIZES), seed=next(seeds)) for _ in range(3 if number % 10 == 0 else 1)),
            str(
                httpx.QueryParams(
                    score_threshold=round(chance.uniform(0.05, 0.7), 3),
                    nms_threshold=round(chance.uniform(0.3, 1), 3),
                    max_detections=chance.randint(1, 30),
                    label=chance.sample(NAMES, chance.randint(0, 2)),
                )
            ),
        )
        for number in range(count)
    ]


def detections_of(reply: Reply) -> list[list[dict[str, Any]]]:
    """Those of each picture."""
    assert reply.status == 200, reply.body
    values = json.loads(reply.body)
    return [each["detections"] for each in values.get("results", [values])]


def test_each_of_500_concurrent_requests_gets_the_answer_it_gets_alone(tmp_path: Path) -> None:
    asked = questions(REQUESTS)
    write_tiny_model(tmp_path / "tiny.onnx")
    flags = ("--queue-capacity", "1000", "--max-batch-size", "8", "--request-timeout-seconds", "250", "--threads", "2")
    with server_process(tmp_path, *flags, model_path=tmp_path / "tiny.onnx") as server:
        alone = [question.asked_alone(server.url) for question in asked]
        runs_alone = Scrape(server.url)("retinaserve_batch_size_count")
        with ThreadPoolExecutor(REQUESTS) as pool:
            together = list(pool.map(lambda question: detections_of(question.asked_of(server.url)), asked))
        scrape = Scrape(server.url)
    images = sum(len(question.images) for question in asked)
    assert scrape("retinaserve_images_total") == 2 * images
    assert scrape("retinaserve_batch_size_count") - runs_alone < images, "no batch was ever shared"
    assert len({json.dumps(each) for answers in alone for each in answers}) > REQUESTS * 0.8, (
        "the questions are too alike"
    )
    wrong = [
        number
        for number, (answers, expected) in enumerate(zip(together, alone, strict=True))
        if len(answers) != len(expected) or not all(map(agree, answers, expected))
    ]
    assert wrong == []
