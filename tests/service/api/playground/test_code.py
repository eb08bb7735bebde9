"""The answer and the same call, to copy: each is run as a reader would paste it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import expect

from model.pretrained import EXAMPLE_PICTURE
from tests.support.browser import Playground
from tests.support.serving import Serving, picture

NODE = compute_driver_executable()[0]
"""The one that playwright brings."""
NAMES = ["photo.png", 'it\'s; a "photo", $HOME \\ 50%.png']


def run(*command: str, folder: Path, **environment: str) -> str:
    variables = os.environ | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def labels(playground: Playground, tab: str, folder: Path, **environment: str) -> list[str]:
    """Run the code of this tab unchanged, and return the labels that it finds."""
    code = playground.code(tab)
    if tab == "curl":
        printed = json.loads(run("bash", "-ec", code, folder=folder, **environment))
        return [found["label"] for found in printed["detections"]]
    command = [sys.executable, "-c"] if tab == "Python" else [NODE, "--input-type=module", "--eval"]
    return [line.split()[0] for line in run(*command, code, folder=folder, **environment).splitlines()]


@pytest.mark.parametrize("tab", ["curl", "Python", "JavaScript"])
def test_the_call_with_the_example_runs_as_it_is_pasted(playground: Playground, tmp_path: Path, tab: str) -> None:
    playground.use_example()
    playground.slide("Score threshold", 0.2)
    assert labels(playground, tab, tmp_path) == ["circle", "square", "star"]


@pytest.mark.parametrize("tab", ["curl", "Python", "JavaScript"])
@pytest.mark.parametrize("name", NAMES)
def test_the_call_with_ones_own_file_runs_as_it_is_pasted(
    playground: Playground, tmp_path: Path, tab: str, name: str
) -> None:
    (tmp_path / name).write_bytes(picture(320, 240))
    playground.choose(tmp_path / name)
    expect(playground.rows).to_have_count(2)
    playground.page.get_by_role("checkbox", name="circle", exact=True).uncheck()
    assert labels(playground, tab, tmp_path) == ["square"]


def test_the_json_is_the_answer_as_it_is_shown(playground: Playground, server: Serving) -> None:
    playground.use_example()
    playground.page.get_by_role("checkbox", name="circle", exact=True).uncheck()
    shown = json.loads(playground.code("JSON"))
    query = {"score_threshold": 0.5, "label": ["square", "star", "ring"]}
    answer = server.client.post("/detect", params=query, content=EXAMPLE_PICTURE.read_bytes()).json()
    assert shown.keys() == answer.keys()
    assert shown["detections"] == answer["detections"]


def test_the_shown_code_is_copied(playground: Playground) -> None:
    playground.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = playground.code("Python")
    playground.page.get_by_role("button", name="Copy").click()
    copied = "navigator.clipboard.readText().then((text) => text.trim())"
    playground.page.wait_for_function(f"(code) => {copied}.then((text) => text === code)", arg=code.strip())


def test_the_tabs_are_reached_by_arrow_keys(playground: Playground) -> None:
    playground.page.get_by_role("tab", name="curl").focus()
    playground.page.keyboard.press("ArrowRight")
    expect(playground.page.get_by_role("tab", name="Python")).to_be_focused()
    assert "import httpx" in playground.page.get_by_role("tabpanel").inner_text()


def test_the_json_and_the_picture_with_its_boxes_are_saved(playground: Playground) -> None:
    playground.use_example()
    with playground.page.expect_download() as json_file:
        playground.page.get_by_role("button", name="Download JSON").click()
    assert json_file.value.suggested_filename == "example.json"
    assert json.loads(json_file.value.path().read_text()) == json.loads(playground.code("JSON"))
    with playground.page.expect_download() as picture_file:
        playground.page.get_by_role("button", name="Download picture").click()
    assert picture_file.value.suggested_filename == "example-detections.jpg"
    saved, example = Image.open(io.BytesIO(picture_file.value.path().read_bytes())), Image.open(EXAMPLE_PICTURE)
    assert saved.size == example.size
    corner = (round(0.1 * saved.width), round(0.3 * saved.height))  # on the first box's left side
    assert max(abs(a - b) for a, b in zip(saved.getpixel(corner), example.getpixel(corner), strict=True)) > 50  # type: ignore[arg-type]
