"""JSON or a drawing, as the client asks."""

import io

import pytest
from PIL import Image

from service.api.replies import picture_wanted
from tests.support.serving import PNG, Serving, assert_problem, detect, picture


@pytest.mark.parametrize(("media_type", "kind"), [("image/png", "PNG"), ("image/jpeg", "JPEG")])
def test_who_asks_for_a_picture_gets_the_boxes_drawn(server: Serving, media_type: str, kind: str) -> None:
    response = detect(server, content=picture(320, 240), headers=PNG | {"Accept": media_type})
    assert response.headers["content-type"] == media_type
    drawn = Image.open(io.BytesIO(response.content))
    assert (drawn.format, drawn.size) == (kind, (320, 240))
    assert len(set(drawn.convert("RGB").get_flattened_data())) > 2, "nothing is drawn"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("image/*", None),
        ("image/png", "png"),
        ("image/jpeg", "jpeg"),
        ("image/jpeg, image/png;q=0.9", "jpeg"),
        ("image/png, application/json", None),
        ("image/png, application/json;q=0.5", "png"),
        ("image/png;q=0.5, */*;q=0.8", None),
        ("image/png, */*;q=0.8", "png"),
        ("image/png;q=0", None),
        ("image/png;q=x", None),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/png,image/svg+xml,*/*;q=0.8", None),
    ],
)
def test_a_picture_is_sent_only_when_named_and_ranked_above_json(accept: str, wanted: str | None) -> None:
    assert picture_wanted(accept) == wanted


@pytest.mark.parametrize("size", [(65_501, 8), (8, 65_501)])
def test_a_drawing_that_jpeg_cannot_hold_is_406_and_png_can(server: Serving, size: tuple[int, int]) -> None:
    image = picture(*size)
    response = detect(server, content=image, headers=PNG | {"Accept": "image/jpeg"})
    assert "ask for PNG" in assert_problem(response, 406, "not_acceptable").detail
    assert detect(server, content=image, headers=PNG | {"Accept": "image/png"}).status_code == 200
    longest = picture(*(min(side, 65_500) for side in size))
    assert detect(server, content=longest, headers=PNG | {"Accept": "image/jpeg"}).status_code == 200
