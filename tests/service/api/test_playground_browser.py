"""The playground in a real browser: pictures in, boxes out, filters, code that runs, problems, keys."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from model.metadata import Label
from model.pretrained import EXAMPLE_PICTURE
from model.types import Candidates, CanvasImage
from tests.support.browser import CHROMIUM, Playground, chromium
from tests.support.serving import FakeDetector, Serving, picture, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")

FOUND = (
    (1, 0.9, (0.1, 0.1, 0.5, 0.5)),
    (1, 0.8, (0.1, 0.1, 0.5, 0.4)),  # IoU 0.75 with the first: dropped at 0.5
    (2, 0.7, (0.6, 0.1, 0.9, 0.5)),
    (3, 0.3, (0.2, 0.6, 0.3, 0.8)),
    (2, 0.1, (0.6, 0.6, 0.9, 0.9)),
)
"""Class, score, and xyxy as shares of the picture."""


@dataclass
class Several(FakeDetector):
    """Finds the same in every picture."""

    labels: tuple[Label, ...] = (Label(1, "circle"), Label(2, "square"), Label(3, "star"), Label(4, "ring"))

    def _candidates(self, canvas: CanvasImage) -> Candidates:
        height, width = canvas.size
        classes, scores, boxes = zip(*FOUND, strict=True)
        pixels = np.array(boxes, np.float32) * np.array([width, height, width, height], np.float32)
        return Candidates(pixels, np.array(scores, np.float32), np.array(classes, np.int64))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(Several()) as running:
        yield running


@pytest.fixture
def playground(browser: Browser, server: Serving) -> Iterator[Playground]:
    """Open, and at the end without a complaint."""
    page = browser.new_page()
    opened = Playground(page, f"{server.url}/")
    opened.open()
    yield opened
    page.close()
    assert opened.complaints == []


def upload(name: str = "photo.png", kind: str = "PNG") -> dict[str, object]:
    return {"name": name, "mimeType": f"image/{kind.lower()}", "buffer": picture(320, 240, kind=kind)}


def test_it_says_first_what_the_model_knows(playground: Playground, server: Serving) -> None:
    expect(playground.page.get_by_role("heading", level=1)).to_have_text("fake")
    expect(playground.page.locator("#knows")).to_have_text("Finds circle, square, star and ring.")
    expect(playground.page.locator("#facts")).to_contain_text("CPU")
    expect(playground.page.locator("#facts")).to_contain_text("0" * 12)
    expect(playground.page.locator("#fallback")).to_be_hidden()


@pytest.mark.parametrize("name", ["Image", "Camera"])
def test_a_chosen_picture_gets_its_boxes_at_once(playground: Playground, name: str) -> None:
    playground.choose(upload(), into=name)
    expect(playground.status).to_contain_text("2 objects in ")
    expect(playground.rows).to_have_count(2)
    expect(playground.boxes).to_have_count(2)
    expect(playground.page.get_by_role("img", name="The picture with 2 boxes: 1 circle, 1 square")).to_be_visible()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(playground: Playground, kind: str) -> None:
    playground.page.evaluate(
        """([kind, base64]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            const make = kind === "drop" ? DragEvent : ClipboardEvent;
            const key = kind === "drop" ? "dataTransfer" : "clipboardData";
            document.body.dispatchEvent(new make(kind, { [key]: transfer, bubbles: true, cancelable: true }));
        }""",
        [kind, base64.b64encode(picture(320, 240)).decode()],
    )
    expect(playground.rows).to_have_count(2)
    assert "dropped.png" in playground.code("curl")


def test_the_filters_make_no_request_and_a_change_of_nms_makes_one(playground: Playground) -> None:
    playground.use_example()
    assert [query["score_threshold"] for query in playground.queries()] == [["0.05"]]
    playground.slide("Score threshold", 0.2)
    expect(playground.rows).to_have_count(3)
    playground.slide("Score threshold", 0.05)
    expect(playground.rows).to_have_count(4)
    playground.page.get_by_role("checkbox", name="square", exact=True).uncheck()
    expect(playground.rows).to_have_count(2)
    expect(playground.boxes).to_have_count(2)
    playground.slide("Score threshold", 1)
    expect(playground.status).to_contain_text("Nothing found with these labels above a score of 1.00.")
    assert len(playground.asked) == 1
    playground.slide("Score threshold", 0.05)
    playground.slide("NMS threshold", 0.8)
    expect(playground.rows).to_have_count(3)
    assert [query["nms_threshold"] for query in playground.queries()] == [["0.5"], ["0.8"]]


def test_rows_and_boxes_light_each_other_up_by_keyboard_and_pointer(playground: Playground) -> None:
    playground.use_example()
    playground.rows.first.focus()
    playground.page.keyboard.press("ArrowDown")
    expect(playground.rows.nth(1)).to_be_focused()
    expect(playground.boxes.nth(1)).to_have_class(re.compile("active"))
    assert [row.get_attribute("tabindex") for row in playground.rows.all()] == ["-1", "0"], "one tab stop"
    playground.boxes.first.hover(force=True)
    expect(playground.rows.first).to_have_class(re.compile("active"))
    expect(playground.boxes.nth(1)).not_to_have_class(re.compile("active"))


def test_the_json_is_the_answer_as_it_is_shown(playground: Playground, server: Serving) -> None:
    playground.use_example()
    playground.page.get_by_role("checkbox", name="circle", exact=True).uncheck()
    shown = json.loads(playground.code("JSON"))
    query = {"score_threshold": 0.5, "label": ["square", "star", "ring"]}
    answer = server.client.post("/detect", params=query, content=EXAMPLE_PICTURE.read_bytes()).json()
    assert shown.keys() == answer.keys()
    assert shown["detections"] == answer["detections"]


def test_the_curl_call_runs_as_it_is_pasted(playground: Playground, tmp_path: Path) -> None:
    playground.use_example()
    done = subprocess.run(["bash", "-ec", playground.code("curl")], cwd=tmp_path, capture_output=True, check=True)
    assert [found["label"] for found in json.loads(done.stdout)["detections"]] == ["circle", "square"]


@pytest.mark.parametrize("name", ["photo.png", 'it\'s; a "photo", $HOME.png'])
def test_calls_with_ones_own_file_run_as_they_are_pasted(playground: Playground, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(picture(320, 240))
    playground.choose(tmp_path / name)
    expect(playground.rows).to_have_count(2)
    playground.page.get_by_role("checkbox", name="circle", exact=True).uncheck()
    done = subprocess.run(["bash", "-ec", playground.code("curl")], cwd=tmp_path, capture_output=True, check=True)
    assert [found["label"] for found in json.loads(done.stdout)["detections"]] == ["square"]
    assert run_python(playground.code("Python"), tmp_path) == ["square"]


def run_python(code: str, folder: Path, **environment: str) -> list[str]:
    """The labels that it prints."""
    command, variables = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines()]


def test_a_problem_is_shown_with_its_code(playground: Playground) -> None:
    playground.choose({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(playground.alert).to_contain_text("invalid_image")
    expect(playground.rows).to_have_count(0)
    playground.use_example()
    expect(playground.alert).to_be_hidden()


def test_too_many_requests_count_down_and_repeat(playground: Playground) -> None:
    refusals = iter(
        [{"status": 429, "headers": {"Retry-After": "1"}, "body": '{"code": "overloaded", "detail": "full"}'}]
    )
    playground.page.route(
        "**/detect?*", lambda route: route.fulfill(**again) if (again := next(refusals, None)) else route.continue_()
    )
    playground.page.get_by_role("button", name="Use the example").click()
    expect(playground.alert).to_contain_text("overloaded")
    expect(playground.alert).to_contain_text("Repeats in 1 s")
    expect(playground.rows).to_have_count(2)
    expect(playground.alert).to_be_hidden()
    assert len(playground.asked) == 2


def test_a_401_opens_the_key_field_and_the_key_is_kept_in_memory_only(browser: Browser, tmp_path: Path) -> None:
    with serving(Several(), api_keys="very-secret") as server:
        opened = Playground(browser.new_page(), f"{server.url}/")
        opened.open()
        expect(opened.page.get_by_label("API key")).to_be_focused()
        opened.page.get_by_label("API key").fill("very-secret")
        opened.page.keyboard.press("Enter")
        expect(opened.page.get_by_role("heading", level=1)).to_have_text("fake")
        opened.use_example()
        snippets = {tab: opened.code(tab) for tab in ("curl", "Python", "JavaScript")}
        assert "Bearer $RETINASERVE_API_KEY" in snippets["curl"]
        assert all("RETINASERVE_API_KEY" in code and "very-secret" not in code for code in snippets.values())
        assert run_python(snippets["Python"], tmp_path, RETINASERVE_API_KEY="very-secret") == ["circle", "square"]
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
        assert opened.page.evaluate(kept) == '[{},{},"",null]'
        assert "very-secret" not in opened.page.content()
        opened.page.close()
    assert opened.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(browser: Browser, server: Serving, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    opened = Playground(page, f"{server.url}/")
    opened.open()
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    found = {"empty": violations(opened)}
    opened.use_example()
    found["with boxes"] = violations(opened)
    opened.choose({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(opened.alert).to_be_visible()
    found["with a problem"] = violations(opened)
    assert found == {"empty": [], "with boxes": [], "with a problem": []}
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    page.close()


def violations(playground: Playground) -> list[tuple[str, list[str]]]:
    found = Axe().run(playground.page).response["violations"]
    return [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found]
