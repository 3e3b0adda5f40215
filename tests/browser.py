"""A real Chromium for tests and for pictures, if there is one: from the system, never downloaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
"""A test runs as root, often; and it asks nothing of the network but what it was told to."""


def found() -> str:
    """Where a Chromium is; empty without one."""
    return next((path for name in NAMES if (path := shutil.which(name))), "")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs in a new profile. While it does, this thread counts as one with a running loop."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile, sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=found(), args=[*_QUIET], env={"HOME": profile, "XDG_CONFIG_HOME": profile}
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Look:
    """A page, with all that it said and asked for."""

    page: Page
    url: str
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        self.said.append(message.text)

    def _on_request(self, request: Request) -> None:
        self.asked.append(request.url)

    @property
    def strangers(self) -> list[str]:
        """What it asked of anybody else."""
        own = urlsplit(self.url).netloc
        return [url for url in self.asked if not url.startswith("data:") and urlsplit(url).netloc != own]

    @property
    def overflow_px(self) -> int:
        """By how much the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@contextmanager
def looking(
    browser: Browser, url: str, *, width: int = 1280, height: int = 900, scheme: str = "light", script: bool = True
) -> Iterator[Look]:
    """The page at ``url``, loaded, in a context of its own."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        java_script_enabled=script,
    )
    try:
        look = Look(context.new_page(), url)
        look.page.goto(url)
        yield look
    finally:
        context.close()
