"""Steps of a reader in a browser, by Playwright: open a page, wait until it is drawn, choose, type a key."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload, Page

SETTLED = """() => document.querySelector('h1')
  && !document.querySelector('[data-testid=stStatusWidget]')
  && !document.querySelector('[data-testid=stSkeleton]')
  && !document.querySelector('[data-testid=stSpinner]')
  && !document.querySelector('[data-stale=true]')"""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 600_000


def chromium() -> str | None:
    """Where one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def started(executable: str) -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


def settled(page: Page) -> None:
    """Wait until nothing is drawn any more; no exception may be shown."""
    page.wait_for_function(SETTLED)
    page.wait_for_timeout(500)
    page.wait_for_function(SETTLED)
    exceptions = page.locator("[data-testid=stException]")
    assert exceptions.count() == 0, exceptions.inner_text()


def visit(page: Page, title: str) -> None:
    page.locator("[data-testid=stSidebarNav]").get_by_role("link", name=title, exact=True).click()
    shown(page, title)


def shown(page: Page, title: str) -> None:
    heading = "pedro" if title == "Overview" else title
    page.locator("h1", has_text=re.compile(f"^{heading}$")).wait_for()
    settled(page)


def choose(page: Page, label: str, *texts: str) -> None:
    """Pick options of a selectbox or multiselect by the keyboard."""
    for text in texts:
        box = page.get_by_role("combobox", name=re.compile(rf"{label}$")).first
        box.click()
        box.fill(text)
        page.get_by_role("option", name=re.compile(re.escape(text))).first.wait_for()
        box.press("Enter")
        if page.get_by_role("option").count():  # a list of which several may be picked; a closed one would be cleared
            page.keyboard.press("Escape")
        settled(page)


def take_file(page: Page, name: str, content: bytes) -> None:
    """A file dropped on the Train page, until it is checked."""
    file: FilePayload = {"name": name, "mimeType": "application/jsonl", "buffer": content}
    page.locator("[data-testid=stFileUploaderDropzoneInput]").first.set_input_files(file)
    page.get_by_text("can be trained on").wait_for()
    settled(page)
