"""The model's card, the sliders, the label boxes and the list of detections."""

import re

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.service.api.playground.conftest import Several
from tests.support.browser import Playground
from tests.support.serving import serving


def test_it_says_first_what_the_model_knows(playground: Playground) -> None:
    expect(playground.page.get_by_role("heading", level=1)).to_have_text("fake")
    expect(playground.page.locator("#knows")).to_have_text("Finds circle, square, star and ring.")
    expect(playground.page.locator("#facts")).to_contain_text("CPU")
    expect(playground.page.locator("#facts")).to_contain_text("0" * 12)
    expect(playground.page.locator("#fallback")).to_be_hidden()


def test_it_says_loudly_that_the_cpu_stands_in_and_names_the_command_for_everyday_objects(browser: Browser) -> None:
    with serving(Several(name="shapes", fell_back=True)) as server:
        page = Playground(browser.new_page(), f"{server.url}/")
        page.open()
        expect(page.page.get_by_text("The CPU stands in for CUDA.")).to_be_visible()
        page.use_example()
        expect(page.status).not_to_contain_text("make coco")
        page.slide("Score threshold", 0.95)
        expect(page.status).to_contain_text("Nothing found above a score of 0.95.")
        expect(page.status).to_contain_text("make coco")
        page.close()


@pytest.mark.parametrize("suggested", [0.25, None])
def test_the_score_slider_starts_at_what_the_model_suggests(playground: Playground, suggested: float | None) -> None:
    def answer(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"suggested_score_threshold": suggested})

    playground.page.route("**/model", answer)
    playground.page.reload()
    expect(playground.page.get_by_role("slider", name="Score threshold")).to_have_value(str(suggested or 0.5))
    playground.use_example()
    expect(playground.rows).to_have_count(3 if suggested else 2)


def test_the_filters_make_no_request_and_a_change_of_nms_makes_one(playground: Playground) -> None:
    playground.use_example()
    assert [query["score_threshold"] for query in playground.queries()] == [["0.05"]]
    playground.slide("Score threshold", 0.2)
    expect(playground.rows).to_have_count(3)
    expect(playground.status).to_have_text("3 of 4 objects")
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


def test_a_tile_size_asks_again_and_is_in_the_code(playground: Playground) -> None:
    playground.use_example()
    select = playground.page.get_by_label("Tile size")
    with playground.page.expect_response("**/detect?*"):
        select.select_option("512")
    assert [query.get("tile") for query in playground.queries()] == [None, ["512"]]
    expect(playground.page.get_by_role("tabpanel")).to_contain_text("tile=512")
    with playground.page.expect_response("**/detect?*"):
        select.select_option("")
    assert playground.queries()[-1].get("tile") is None


def test_all_and_none_check_every_label(playground: Playground) -> None:
    playground.use_example()
    playground.page.get_by_role("button", name="None", exact=True).click()
    expect(playground.rows).to_have_count(0)
    playground.page.get_by_role("button", name="All", exact=True).click()
    expect(playground.rows).to_have_count(2)


def test_rows_and_boxes_light_each_other_up_by_keyboard_and_pointer(playground: Playground) -> None:
    playground.use_example()
    active = re.compile("active")
    playground.rows.first.focus()
    playground.page.keyboard.press("ArrowDown")
    expect(playground.rows.nth(1)).to_be_focused()
    expect(playground.boxes.nth(1)).to_have_class(active)
    assert [row.get_attribute("tabindex") for row in playground.rows.all()] == ["-1", "0"], "one tab stop"
    playground.boxes.first.hover(force=True)
    expect(playground.rows.first).to_have_class(active)
    expect(playground.boxes.nth(1)).not_to_have_class(active)


def test_the_smaller_of_two_boxes_in_one_another_is_the_one_below_the_pointer(playground: Playground) -> None:
    playground.use_example()
    playground.slide("NMS threshold", 0.8)
    expect(playground.rows).to_have_count(3)
    playground.boxes.first.hover(position={"x": 20, "y": 20}, force=True)
    expect(playground.rows.nth(1)).to_have_class(re.compile("active"))


def test_the_tab_key_stops_at_the_list_once(playground: Playground) -> None:
    playground.use_example()
    playground.page.get_by_role("checkbox", name="ring", exact=True).focus()
    stops = []
    for _ in range(2):
        playground.page.keyboard.press("Tab")
        stops.append(playground.page.evaluate("document.activeElement.closest('tbody') !== null"))
    assert stops == [True, False]
