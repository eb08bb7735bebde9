"""`GET /`: the page for browsers, JSON for programs, and what of it is open where keys are asked for."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from model.pretrained import EXAMPLE_PICTURE
from service.api.playground import FOLDER, MEDIA_TYPES
from tests.support.serving import FakeDetector, Serving, assert_problem, serving

ROOT = Path(__file__).parents[4]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' blob: data:",
    "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip


class Links(HTMLParser):
    """Collects the files that the page loads, and the attributes that its policy forbids."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.forbidden: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded |= {str(value) for name, value in attrs if name in ("src", "href") and tag != "a"}
        self.forbidden += [name for name, _ in attrs if name == "style" or name.startswith("on")]


@pytest.mark.parametrize("accept", [BROWSER, "*/*", "", "text/html", "application/json;q=0.5,text/html", "text/*"])
def test_who_does_not_prefer_json_gets_the_page(server: Serving, accept: str) -> None:
    response = server.client.get("/", headers={"Accept": accept})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")) == POLICY
    assert (response.headers["cache-control"], response.headers["vary"]) == ("no-cache", "Accept")


@pytest.mark.parametrize("accept", ["application/json", "application/json, */*", "text/html;q=0.1, application/json"])
def test_who_prefers_json_gets_links_that_lead_somewhere(server: Serving, accept: str) -> None:
    response = server.client.get("/", headers={"Accept": accept})
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"name", "links"}
    answers = {name: server.client.head(link).status_code for name, link in body["links"].items()}
    assert set(answers) > {"detect", "model", "docs"}
    assert not {404, 500} & set(answers.values())


def test_the_page_loads_its_own_files_by_relative_urls_alone(server: Serving) -> None:
    links = Links(server.client.get("/").text)
    assert links.forbidden == []
    assert {link for link in links.loaded if not link.startswith("playground/")} == set()
    for link in (*links.loaded, "playground/example.jpg"):
        response = server.client.get(f"/{link}")
        assert response.headers["content-type"].split(";")[0] in MEDIA_TYPES.values(), link
        again = server.client.get(f"/{link}", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert response.content == EXAMPLE_PICTURE.read_bytes()


def test_no_other_host_is_named_in_the_files() -> None:
    text = "".join(path.read_text() for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js", ".svg"))
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}, "SVG's namespace is all"


def test_a_file_that_the_page_has_not_is_a_problem(server: Serving) -> None:
    for name in ("", "index.html", "__init__.py", "../app.py", "%2e%2e/app.py"):
        assert_problem(server.client.get(f"/playground/{name}"), 404, "not_found")


def test_without_docs_everyone_gets_the_json_and_no_files() -> None:
    with serving(FakeDetector(), docs=False) as server:
        response = server.client.get("/", headers={"Accept": BROWSER})
        assert response.headers["content-type"] == "application/json"
        assert not {"docs", "openapi"} & response.json()["links"].keys()
        assert_problem(server.client.get("/playground/playground.js"), 404, "not_found")


def test_with_keys_the_page_is_open_and_what_it_asks_for_is_not() -> None:
    with serving(FakeDetector(), api_keys="secret") as server:
        for path in ("/", "/playground/playground.js", "/playground/example.jpg"):
            assert server.client.get(path).status_code == server.client.head(path).status_code == 200
        assert_problem(server.client.get("/model"), 401, "unauthorized")
        for path in ("/", "/playground/example.jpg", "/detect"):
            assert_problem(server.client.post(path), 401, "unauthorized")
        assert_problem(server.client.get("/playgrounds"), 401, "unauthorized")


def test_the_page_and_its_files_are_in_the_wheel() -> None:
    """As setuptools lists them, in a process of its own: it changes the interpreter that imports it."""
    list_files = (
        "from setuptools import Distribution\n"
        "distribution = Distribution()\n"
        "distribution.parse_config_files()\n"
        "distribution.include_package_data = False\n"  # which writes an egg-info
        "build = distribution.get_command_obj('build_py')\n"
        "build.ensure_finalized()\n"
        "print(*(f'{source}/{name}' for _, source, _, names in build.data_files for name in names), sep='\\n')"
    )
    command = [sys.executable, "-W", "ignore", "-c", list_files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wheel = {ROOT / "service/api/playground" / Path(line).name for line in listed.splitlines() if "playground" in line}
    assert {path for path in FOLDER.iterdir() if path.suffix in {".html", *MEDIA_TYPES}} <= wheel
    assert str(EXAMPLE_PICTURE.relative_to(ROOT)) in listed
