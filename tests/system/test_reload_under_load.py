"""Swaps between two models under load, bad files in between: no request fails, and no answer mixes two models.

The two give every picture other boxes and scores, and the one label name that they share another class id.
"""

import collections
import contextlib
import hashlib
import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest

from model.detector import Detector
from model.image import decode_image
from model.metadata import Label
from tests.support.load import PNG, Scrape, address, agree, ask, blocks, constantly
from tests.support.replicas import REPLICAS, proxy
from tests.support.serving import ServerProcess, server_process, wait_until
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.slow

CLIENTS = 4
SHARED = "square"
IMAGES = [blocks(80 + 10 * number, 90, seed=number) for number in range(6)]
LABELS = {
    "even": (Label(1, "circle"), Label(2, SHARED), Label(4, "triangle")),
    "odd": (Label(1, SHARED), Label(7, "cat")),
}


@dataclass
class Models:
    """The two files, and what each finds in each picture, found without a server."""

    paths: dict[str, Path]
    expected: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for seed, (name, path) in enumerate(self.paths.items()):
            write_tiny_model(path, name=name, labels=LABELS[name], seed=seed)
            detector = Detector(path, device="cpu", threads=1)
            self.sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            self.expected[name] = [found_by(detector, image) for image in IMAGES]

    def assert_true(self, answer: dict[str, Any], image: int, label: str | None) -> None:
        """The answer is wholly that of the model it names."""
        name = answer["model"]["name"]
        assert answer["model"]["sha256"] == self.sha256[name]
        expected = [each for each in self.expected[name][image] if label in (None, each["label"])]
        assert agree(answer["detections"], expected), f"not an answer of {name}"


def found_by(detector: Detector, image: bytes) -> list[dict[str, Any]]:
    found = detector.detect(decode_image(image))
    names = {label.class_id: label.label for label in detector.metadata.labels}
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        {"label": names[class_id], "class_id": class_id, "score": score, "box": dict(zip(corners, box, strict=True))}
        for class_id, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    ]


def write_bad_files(folder: Path, good: Path) -> list[Path]:
    data, no_labels, no_metadata = good.read_bytes(), onnx.load(good), onnx.load(good)
    del no_labels.graph.output[2]
    del no_metadata.metadata_props[:]
    contents = {
        "empty": b"",
        "corrupt": data[:1000] + bytes(1000) + data[2000:],
        "truncated": data[: len(data) // 2],
        "wrong-contract": no_labels.SerializeToString(),
        "no-metadata": no_metadata.SerializeToString(),
    }
    for name, content in contents.items():
        (folder / f"{name}.onnx").write_bytes(content)
    return [folder / f"{name}.onnx" for name in contents]


def put(source: Path, target: Path) -> None:
    """Replace a file at once, as a deployment does."""
    copy = target.with_suffix(".new")
    copy.write_bytes(source.read_bytes())
    copy.replace(target)


def reloads(server: ServerProcess, outcome: str) -> float:
    return Scrape(server.url)("retinaserve_model_reloads_total", outcome=outcome)


def wait_for_reloads(server: ServerProcess, outcome: str, count: int) -> None:
    wait_until(lambda: reloads(server, outcome) == count, 60)


def serving_now(server: ServerProcess) -> str:
    name: str = json.loads(ask(server.url, "/model", method="GET").body)["name"]
    return name


@pytest.mark.parametrize(("noticed_by", "swaps"), [("signal", 25), ("polling", 10)])
def test_swaps_and_bad_files_under_load_lose_no_request_and_mix_no_answer(
    tmp_path: Path, noticed_by: str, swaps: int
) -> None:
    answered = swap_under_load(tmp_path, swaps, noticed_by)
    assert min(collections.Counter(answered).values()) >= swaps // 2


def swap_under_load(folder: Path, swaps: int, noticed_by: str, *, behind_proxy: bool = False) -> list[str]:
    """Swap the model of a server, or of two behind a proxy; the model of each answer, all of them right."""
    models = Models({name: folder / f"{name}.onnx" for name in LABELS})
    bad_files = write_bad_files(folder, models.paths["even"])
    answered: list[str] = []

    def call(client: int) -> None:
        turn = len(answered)
        image, label = turn % len(IMAGES), SHARED if turn % 3 == 0 else None
        reply = ask(url, "/detect" + (f"?label={label}" if label else ""), IMAGES[image], PNG)
        assert reply.status == 200, reply.body
        answer = json.loads(reply.body)
        models.assert_true(answer, image, label)
        answered.append(answer["model"]["name"])

    def deploy(path: Path, outcome: str, count: int) -> None:
        put(path, live)
        for server in servers:
            if noticed_by == "signal":
                server.process.send_signal(signal.SIGHUP)
            wait_for_reloads(server, outcome, count)

    def wait_for_answer_of(name: str) -> None:
        before = len(answered)
        wait_until(lambda: name in answered[before:], 60)

    live = folder / "live.onnx"
    put(models.paths["even"], live)
    poll_seconds = "0" if noticed_by == "signal" else "0.05"
    flags = ("--model-poll-seconds", poll_seconds, "--threads", "2", "--max-batch-size", "4")
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(server_process(folder, *flags, model_path=live)) for _ in range(1 + behind_proxy)
        ]
        url = servers[0].url
        if behind_proxy:
            through = stack.enter_context(proxy(folder, *(address(server.url)[1] for server in servers)))
            wait_until(lambda: through.serves_with(*REPLICAS))
            url = through.url
        with constantly(CLIENTS, call):
            for swap in range(1, swaps + 1):
                name = "odd" if swap % 2 else "even"
                deploy(models.paths[name], "success", swap)
                assert {serving_now(server) for server in servers} == {name}
                if swap % 5 == 0:
                    deploy(bad_files[swap // 5 % len(bad_files)], "failure", swap // 5)
                    assert {serving_now(server) for server in servers} == {name}
                wait_for_answer_of(name)
        for server in servers:
            assert (reloads(server, "success"), reloads(server, "failure")) == (swaps, swaps // 5)
        counts = [Scrape(server.url).by_label("retinaserve_requests_total", "outcome") for server in servers]
    assert sum((collections.Counter(each) for each in counts), collections.Counter()) == {"ok": len(answered)}
    return answered


def test_a_file_of_another_hash_than_asked_for_is_never_served(tmp_path: Path) -> None:
    models = Models({name: tmp_path / f"{name}.onnx" for name in LABELS})
    live = tmp_path / "live.onnx"
    put(models.paths["even"], live)
    answered: list[str] = []

    def call(client: int) -> None:
        reply = ask(server.url, "/detect", IMAGES[0], PNG)
        assert reply.status == 200, reply.body
        answered.append(json.loads(reply.body)["model"]["sha256"])

    flags = ("--model-sha256", models.sha256["even"], "--model-poll-seconds", "0", "--threads", "1")
    with server_process(tmp_path, *flags, model_path=live) as server, constantly(CLIENTS, call):
        for attempt in range(1, 6):
            for name, outcome in (("odd", "failure"), ("even", "success")):
                put(models.paths[name], live)
                server.process.send_signal(signal.SIGHUP)
                wait_for_reloads(server, outcome, attempt)
    assert set(answered) == {models.sha256["even"]}
