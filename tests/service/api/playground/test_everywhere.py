"""The page for everyone and everywhere: axe, light and dark, a telephone, below a path prefix of haproxy."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from tests.service.api.playground.conftest import NO_PICTURE, Several
from tests.support.browser import Playground
from tests.support.load import free_ports
from tests.support.serving import Serving, serving, wait_until

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
BELOW_A_PREFIX = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port}
  http-request redirect location /detector/ if {{ path /detector }}
  http-request deny deny_status 404 unless {{ path_beg /detector/ }}
  http-request replace-path /detector/(.*) /\\1
  default_backend service
backend service
  server service {address}
"""


def violations(playground: Playground) -> list[tuple[str, list[str]]]:
    found = Axe().run(playground.page).response["violations"]
    return [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(browser: Browser, server: Serving, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    opened = Playground(page, f"{server.url}/")
    opened.open()
    expect(page.get_by_role("heading", level=1)).to_have_text("fake")
    found = {"empty": violations(opened)}
    opened.use_example()
    opened.rows.first.focus()
    found["with boxes"] = violations(opened)
    opened.choose(NO_PICTURE)
    expect(opened.alert).to_be_visible()
    page.get_by_role("button", name="API key").click()
    found["with a problem and the key field"] = violations(opened)
    assert found == {state: [] for state in found}
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    opened.close()


def test_the_banner_of_the_fallback_is_readable_too(browser: Browser) -> None:
    with serving(Several(fell_back=True)) as server:
        for scheme in ("light", "dark"):
            opened = Playground(browser.new_page(color_scheme=scheme), f"{server.url}/")  # type: ignore[arg-type]
            opened.open()
            expect(opened.page.locator("#fallback")).to_be_visible()
            assert violations(opened) == []
            opened.close()


@pytest.fixture
def proxy(server: Serving, tmp_path: Path) -> Iterator[str]:
    """The URL of a haproxy that shows the service below /detector/ and nothing else."""
    if HAPROXY is None:
        pytest.skip("needs haproxy, Debian's package of that name")
    [port] = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(BELOW_A_PREFIX.format(port=port, address=server.url.removeprefix("http://")))
    process = subprocess.Popen([HAPROXY, "-f", config])
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/detector/readyz"))
        yield f"http://127.0.0.1:{port}/detector"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_it_works_below_a_path_prefix(browser: Browser, proxy: str) -> None:
    opened = Playground(browser.new_page(), proxy)
    opened.open()
    opened.use_example()
    expect(opened.rows).to_have_count(2)
    assert f"{proxy}/detect?score_threshold=" in opened.code("curl")
    opened.page.get_by_role("link", name="API reference").click()
    expect(opened.page.get_by_text("/detect/batch")).to_be_visible()
    opened.close()
