"""Chromium, a server whose detector finds the same in every picture, and the page open in the one on the other."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from playwright.sync_api import Browser

from model.metadata import Label
from model.types import Candidates, CanvasImage
from tests.support.browser import CHROMIUM, Playground, chromium
from tests.support.serving import FakeDetector, Serving, picture, serving

FOUND = (
    (1, 0.9, (0.1, 0.1, 0.5, 0.5)),
    (1, 0.8, (0.1, 0.1, 0.5, 0.4)),  # IoU 0.75 with the first: dropped at 0.5
    (2, 0.7, (0.6, 0.1, 0.9, 0.5)),
    (3, 0.3, (0.2, 0.6, 0.3, 0.8)),
    (2, 0.1, (0.6, 0.6, 0.9, 0.9)),
)
"""Class, score, and xyxy as shares of the picture: at the page's first thresholds a circle and a square are shown."""


@dataclass
class Several(FakeDetector):
    """Finds FOUND in every picture."""

    labels: tuple[Label, ...] = (Label(1, "circle"), Label(2, "square"), Label(3, "star"), Label(4, "ring"))

    def _candidates(self, canvas: CanvasImage) -> Candidates:
        height, width = canvas.size
        classes, scores, boxes = zip(*FOUND, strict=True)
        pixels = np.array(boxes, np.float32) * np.array([width, height, width, height], np.float32)
        return Candidates(pixels, np.array(scores, np.float32), np.array(classes, np.int64))


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with chromium() as running:
        yield running


@pytest.fixture(scope="package")
def server() -> Iterator[Serving]:
    with serving(Several()) as running:
        yield running


@pytest.fixture
def playground(browser: Browser, server: Serving) -> Iterator[Playground]:
    """Open, and at the end without a complaint."""
    opened = Playground(browser.new_page(), f"{server.url}/")
    opened.open()
    yield opened
    opened.close()


def upload(name: str = "photo.png", kind: str = "PNG") -> dict[str, object]:
    """A picture for a file input: 320 pixels wide, 240 high."""
    return {"name": name, "mimeType": f"image/{kind.lower()}", "buffer": picture(320, 240, kind=kind)}


NO_PICTURE: dict[str, object] = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}
