"""Errors are shown with their code, temporary ones are waited for, and a key is asked for and forgotten."""

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from service.config import MIB
from tests.service.api.playground.conftest import NO_PICTURE, Several
from tests.service.api.playground.test_code import labels
from tests.support.browser import Playground
from tests.support.serving import serving

KEY = "very-secret"


def test_a_problem_is_shown_with_its_code_and_goes_with_the_next_picture(playground: Playground) -> None:
    playground.choose(NO_PICTURE)
    expect(playground.alert).to_contain_text("invalid_image")
    expect(playground.rows).to_have_count(0)
    playground.use_example()
    expect(playground.alert).to_be_hidden()


def test_a_lost_connection_is_a_problem_that_can_be_tried_again(playground: Playground) -> None:
    playground.page.route("**/detect?*", lambda route: route.abort(), times=1)
    playground.page.get_by_role("button", name="Use the example").click()
    expect(playground.alert).to_contain_text("connection_lost")
    playground.page.get_by_role("button", name="Try again now").click()
    expect(playground.rows).to_have_count(2)
    playground.complaints[:] = [line for line in playground.complaints if "net::ERR_FAILED" not in line]


@pytest.mark.parametrize("status", [200, 502])
def test_the_page_of_a_proxy_is_a_problem_too(playground: Playground, status: int) -> None:
    playground.page.route("**/detect?*", lambda route: route.fulfill(status=status, body="<h1>Sign in</h1>"))
    playground.page.get_by_role("button", name="Use the example").click()
    expect(playground.alert).to_contain_text(f"http_{status}")


def test_a_picture_that_is_too_large_is_told_from_a_lost_connection(playground: Playground) -> None:
    playground.choose({"name": "large.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8" + bytes(21 * MIB)})
    expect(playground.alert).to_contain_text("body_too_large")


def refuse(status: int, code: str, seconds: int = 600) -> dict[str, Any]:
    return {"status": status, "headers": {"Retry-After": str(seconds)}, "json": {"code": code, "title": "Not now"}}


@pytest.mark.parametrize(("status", "code"), [(429, "overloaded"), (503, "not_ready")])
def test_what_passes_counts_down_and_is_asked_again(playground: Playground, status: int, code: str) -> None:
    playground.page.clock.install()
    playground.page.route("**/detect?*", lambda route: route.fulfill(**refuse(status, code)), times=1)
    playground.page.get_by_role("button", name="Use the example").click()
    expect(playground.alert).to_contain_text(code)
    expect(playground.alert).to_contain_text(re.compile(r"Repeats in \d{3} s"))
    playground.page.clock.fast_forward(520_000)
    expect(playground.alert).to_contain_text(re.compile(r"Repeats in \d\d s"))
    assert len(playground.asked) == 1
    playground.page.clock.fast_forward(100_000)
    expect(playground.rows).to_have_count(2)
    expect(playground.alert).to_be_hidden()
    assert len(playground.asked) == 2


def test_a_queue_that_is_full_is_what_the_page_waits_for(browser: Browser) -> None:
    with serving(detector := Several(), queue_capacity=1) as server:
        detector.gate.clear()
        first, second = (Playground(browser.new_page(), f"{server.url}/") for _ in range(2))
        for page in (first, second):
            page.open()
        first.page.get_by_role("button", name="Use the example").click()
        server.wait_until(lambda: server.metric("retinaserve_queue_depth") == 1)
        second.page.get_by_role("button", name="Use the example").click()
        expect(second.alert).to_contain_text("overloaded")
        detector.gate.set()
        expect(second.rows).to_have_count(2)
        for page in (first, second):
            page.close()


def test_repeating_can_be_stopped(playground: Playground) -> None:
    playground.page.clock.install()
    playground.page.route("**/detect?*", lambda route: route.fulfill(**refuse(429, "overloaded")))
    playground.page.get_by_role("button", name="Use the example").click()
    playground.page.get_by_role("button", name="Stop repeating").click()
    playground.page.clock.fast_forward(700_000)
    expect(playground.alert).not_to_contain_text("Repeats")
    with playground.page.expect_request("**/detect?*"):
        playground.page.get_by_role("button", name="Try again now").click()
    assert len(playground.asked) == 2


def test_a_model_that_loads_is_waited_for(playground: Playground) -> None:
    loading = True

    def answer(route: Route) -> None:
        if loading:
            route.fulfill(**refuse(503, "not_ready", 1))
        else:
            route.continue_()

    playground.page.route("**/model", answer)
    playground.page.reload()
    expect(playground.page.locator("#knows")).to_have_text("The model is loading …")
    loading = False
    expect(playground.page.get_by_role("heading", level=1)).to_have_text("fake")


def test_a_401_opens_the_key_field_and_the_key_is_kept_in_memory_only(browser: Browser, tmp_path: Path) -> None:
    with serving(Several(), api_keys=KEY) as server:
        page = Playground(browser.new_page(), f"{server.url}/")
        page.open()
        field = page.page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.page.keyboard.press("Enter")
        expect(page.alert).to_contain_text("unauthorized")
        field.fill(KEY)
        page.page.keyboard.press("Enter")
        expect(page.page.get_by_role("heading", level=1)).to_have_text("fake")
        expect(page.alert).to_be_hidden()
        expect(field).to_be_hidden()
        page.use_example()
        for tab in ("curl", "Python", "JavaScript"):
            assert "RETINASERVE_API_KEY" in page.code(tab)
            assert labels(page, tab, tmp_path, RETINASERVE_API_KEY=KEY) == ["circle", "square"]
        assert "Bearer $RETINASERVE_API_KEY" in page.code("curl")
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
        assert page.page.evaluate(kept) == '[{},{},"",null]'
        assert KEY not in page.page.content()
        page.page.reload()
        expect(field).to_be_focused()
        page.close()
