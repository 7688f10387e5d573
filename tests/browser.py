"""Debian's Chromium for tests of pages: headless, a clean profile, and a record of what pages ask for and complain of."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Error, Page, Request

# Nothing that Chromium does of its own accord (updates, synchronisation) may leave the machine either.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# MLflow greets a new browser with an assistant that covers half of the page.
NO_ASSISTANT = """if (location.protocol === 'http:') {
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
}"""
PATIENCE_MILLISECONDS = 45_000.0


def missing_parts() -> str:
    """What is not installed of the parts that a browser test needs; empty where it can run."""
    missing = [] if chromium() else ["chromium"]
    try:
        import playwright  # noqa: F401
    except ImportError:
        missing.append("playwright")
    return ", ".join(missing)


def chromium() -> str | None:
    """Path of the browser."""
    return shutil.which("chromium")


@dataclass
class Browser:
    """Opens pages; `outside` and `errors` hold what none of them may do."""

    page: "Page"
    screenshots: Path
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, url: str) -> "Page":
        """Open a page anew: MLflow's links differ in what follows the `#`, which alone loads nothing."""
        self.page.goto("about:blank")
        self.page.goto(url)
        return self.page

    def note_request(self, request: "Request") -> None:
        """Remember what is asked for elsewhere than here."""
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:")):
            self.outside.append(request.url)

    def note_error(self, error: "Error") -> None:
        """Remember what a page stumbles over; that a chart changes size while it is drawn does no harm."""
        if "ResizeObserver" not in str(error):
            self.errors.append(str(error))

    def keep(self, name: str) -> Path:
        """Take a screenshot."""
        path = self.screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser; screenshots go to the folder that SHARDLINE_SCREENSHOTS names, or to `folder`."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    screenshots = Path(os.environ.get("SHARDLINE_SCREENSHOTS", folder))
    screenshots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        context = started.new_context(viewport={"width": 1500, "height": 950})
        context.set_default_timeout(PATIENCE_MILLISECONDS)
        context.add_init_script(NO_ASSISTANT)
        found = Browser(context.new_page(), screenshots)
        found.page.on("request", found.note_request)
        found.page.on("pageerror", found.note_error)
        try:
            yield found
        finally:
            started.close()
