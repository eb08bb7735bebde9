"""The recipe of docs/clients.md for supervision, with the released package, on the answer in docs/http-api.md."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from retinaserve_client.answer import answer_of

ROOT = Path(__file__).parents[3]


def block(page: str, heading: str, language: str) -> str:
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1]
    [found, *_] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(found)


ANSWER: dict[str, Any] = json.loads(block("http-api.md", "Read the answer", "json"))


class Service(BaseHTTPRequestHandler):
    """Gives that answer to each picture."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_recipe_draws_what_was_found(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (672, 480)).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(block("clients.md", "supervision", "python").replace("http://127.0.0.1:8000", url), names)
    [found], box = ANSWER["detections"], [*ANSWER["detections"][0]["box"].values()]
    detections = names["detections"]
    assert isinstance(detections, sv.Detections)
    np.testing.assert_allclose(detections.xyxy, [box], rtol=1e-6)
    assert detections.class_id.tolist() == [found["class_id"]]
    assert detections.confidence.tolist() == pytest.approx([found["score"]])
    assert detections["class_name"].tolist() == [found["label"]]
    xmin, ymin = round(box[0]), round(box[1])
    drawn = np.asarray(names["drawn"])
    assert drawn[ymin - 2 : ymin + 3, xmin : xmin + 20].any() and not drawn[400:].any()


def test_detections_may_be_filtered_and_merged_and_none_is_fine() -> None:
    none = answer_of({**ANSWER, "detections": []}).to_supervision()
    some = answer_of(ANSWER).to_supervision()
    assert len(none) == 0 and none.is_empty()
    assert len(sv.Detections.merge([none, some, some])) == 2
    assert len(some[some.confidence > 0.99]) == 0
