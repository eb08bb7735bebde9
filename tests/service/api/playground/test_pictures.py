"""Pictures in, boxes out: by every way that a picture comes, and also where the browser cannot show it."""

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from tests.service.api.playground.conftest import Several, upload
from tests.support.browser import Playground
from tests.support.serving import serving

ORIENTATION = 0x0112
TURNED = 6
"""EXIF's value for a picture that is to be turned by a quarter."""


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
        [kind, base64.b64encode(bytes(upload()["buffer"])).decode()],  # type: ignore[call-overload]
    )
    expect(playground.rows).to_have_count(2)
    assert "dropped.png" in playground.code("curl")


def test_the_boxes_lie_where_they_were_found(playground: Playground) -> None:
    playground.use_example()
    frame, box = playground.page.locator("#picture").bounding_box(), playground.boxes.first.bounding_box()
    assert frame is not None and box is not None
    shares = [(box["x"] - frame["x"]) / frame["width"], (box["y"] - frame["y"]) / frame["height"]]
    shares += [box["width"] / frame["width"], box["height"] / frame["height"]]
    assert shares == pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.01)


@pytest.mark.parametrize(("name", "kind"), [("scan.tif", "TIFF"), ("moving.gif", "GIF")])
def test_the_service_draws_what_the_browser_cannot_show_as_it_is(playground: Playground, name: str, kind: str) -> None:
    playground.choose(upload(name, kind))
    playground.page.locator("#viewport").wait_for()
    assert [query["score_threshold"] for query in playground.queries()] == [["0.05"], ["1"]]
    assert playground.asked[1].headers["accept"] == "image/png"
    expect(playground.boxes).to_have_count(2)
    assert playground.page.evaluate("[picture.naturalWidth, picture.naturalHeight]") == [320, 240]


def test_a_photograph_that_is_stored_lying_is_shown_upright_without_a_drawing(playground: Playground) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = TURNED
    Image.new("RGB", (320, 240), "teal").save(file, "JPEG", exif=exif)
    playground.choose({"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": file.getvalue()})
    expect(playground.boxes).to_have_count(2)
    assert playground.page.evaluate("[picture.naturalWidth, picture.naturalHeight]") == [240, 320]
    assert len(playground.asked) == 1


def test_a_large_picture_zooms_by_keys_and_fits_again(playground: Playground) -> None:
    playground.use_example()
    width = "canvas.clientWidth / canvas.parentElement.clientWidth"
    assert playground.page.evaluate(width) <= 1
    playground.page.locator("#viewport").focus()
    for _ in range(3):
        playground.page.keyboard.press("+")
    assert playground.page.evaluate(width) > 2
    playground.page.evaluate("canvas.parentElement.scrollTo(0, 0)")
    expect(playground.boxes.nth(1)).not_to_be_in_viewport()
    playground.rows.nth(1).focus()
    expect(playground.boxes.nth(1)).to_be_in_viewport()
    playground.page.get_by_role("button", name="Fit the picture").click()
    assert playground.page.evaluate(width) <= 1


def test_it_says_what_it_is_doing_while_one_waits(browser: Browser) -> None:
    with serving(detector := Several()) as server:
        waiting = Playground(browser.new_page(), f"{server.url}/")
        waiting.open()
        detector.gate.clear()
        waiting.page.get_by_role("button", name="Use the example").click()
        expect(waiting.status).to_have_text("Detecting …")
        detector.gate.set()
        expect(waiting.status).to_contain_text("2 objects in ")
        waiting.close()
