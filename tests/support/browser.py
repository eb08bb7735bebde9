"""Debian's chromium, driven by playwright (which downloads no browser of its own), and what it asked for and said."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Response, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
expect.set_options(timeout=60_000)  # milliseconds: other jobs keep a machine busy
REFUSED = "Failed to load resource: the server responded with a status of "
"""The browser's own line about a status that the page handles."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Keep it within a test module: while it is open, its thread can run no event loop of another."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Playground:
    """The page, open, by the names that people see."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    """Console errors, exceptions, requests to other hosts, and what is not there."""
    asked: list[Request] = field(default_factory=list)
    """The requests that detect."""

    def open(self) -> None:
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._sent)
        self.page.on("response", self._came)
        self.page.goto(self.url)

    def close(self) -> None:
        """Close the page, about which there must be nothing to complain."""
        self.page.close()
        assert not self.complaints, self.complaints

    @property
    def status(self) -> Locator:
        return self.page.get_by_role("status")

    @property
    def alert(self) -> Locator:
        return self.page.get_by_role("alert")

    @property
    def rows(self) -> Locator:
        return self.page.get_by_role("table", name="Detections").locator("tbody tr")

    @property
    def boxes(self) -> Locator:
        return self.page.locator(".box")

    def choose(self, picture: Path | dict[str, object], into: str = "Image") -> None:
        self.page.get_by_label(into, exact=True).set_input_files(picture)  # type: ignore[arg-type]

    def use_example(self) -> None:
        self.page.get_by_role("button", name="Use the example").click()
        self.status.filter(has_text="object").wait_for()
        self.page.locator("#viewport").wait_for()

    def slide(self, slider: str, value: float) -> None:
        self.page.get_by_role("slider", name=slider).fill(str(value))

    def code(self, tab: str) -> str:
        self.page.get_by_role("tab", name=tab, exact=True).click()
        return self.page.get_by_role("tabpanel").inner_text()

    def queries(self) -> list[dict[str, list[str]]]:
        return [parse_qs(urlsplit(request.url).query) for request in self.asked]

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(REFUSED):
            self.complaints.append(f"{message.text} ({message.location['url']})")

    def _came(self, response: Response) -> None:
        if response.status == 404:
            self.complaints.append(f"404 {response.url}")

    def _sent(self, request: Request) -> None:
        sent, own = urlsplit(request.url), urlsplit(self.url)
        if sent.scheme in ("http", "https") and sent.netloc != own.netloc:
            self.complaints.append(f"{request.method} {request.url}")
        if sent.path.endswith("/detect"):
            self.asked.append(request)
