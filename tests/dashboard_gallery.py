"""Takes the pictures of docs/operations.md from a dashboard that runs, with what its home holds.

    PEDRO_ADMIN_KEY=… pedro dashboard --port 8501 &
    python tests/dashboard_gallery.py http://127.0.0.1:8501 --adapter acme.voice --rows train.jsonl [--all FOLDER]

A desktop's light ones go to dashboard/screenshots/; `--all` writes dark ones and those of a phone, too. Says what a
page logged as an error, and which is wider than its window.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dashboard_pages import PATIENCE_MS, chromium, settled, shown, started, take_file

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page

SCREENSHOTS = Path(__file__).resolve().parents[1] / "dashboard" / "screenshots"
DESKTOP, PHONE = 1280, 390
TALLEST = {DESKTOP: 2400, PHONE: 6000}
PAGES = (
    "overview",
    "compare",
    "train",
    "runs",
    "sweeps",
    "activations",
    "adapters",
    "usage",
    "serving",
    "playground",
    "demo",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--adapter", required=True, help="of Adapters, Activations, Runs and the Playground")
    parser.add_argument("--rows", type=Path, required=True, help="the file of the Train page")
    parser.add_argument("--comparison", default="", help="of Compare; the first if not given")
    parser.add_argument("--job", default="", help="the open row of Runs")
    parser.add_argument("--prompt", default="play some jazz music")
    parser.add_argument("--window", default="15 minutes", help="of Serving")
    parser.add_argument("--pages", default=",".join(PAGES))
    parser.add_argument("--all", type=Path, help="a folder for every variant")
    options = parser.parse_args(arguments)
    executable = chromium()
    if executable is None:
        parser.error("no Chromium is installed")
    faults: list[str] = []
    with started(executable) as browser:
        for name in options.pages.split(","):
            page = browser.new_page(viewport={"width": DESKTOP, "height": 900}, color_scheme="light")
            page.set_default_timeout(PATIENCE_MS)
            page.on("console", lambda message, name=name: note(faults, name, message))
            page.on("pageerror", lambda error, name=name: faults.append(f"{name}: {error}"))
            query = {
                "compare": f"comparison={options.comparison}" if options.comparison else "",
                "runs": f"job={options.job}" if options.job else "",
                "activations": f"adapter={options.adapter}",
                "adapters": f"adapter={options.adapter}",
                "playground": f"model={options.adapter}",
            }.get(name, "")
            page.goto(f"{options.url}/{name}?{query}")
            shown(page, name.title())
            prepare(page, name, options)
            take(page, name, options.all, faults)
            page.close()
    sys.stdout.write("\n".join(faults or ["no console error; every page fits its window"]) + "\n")
    return 1 if faults else 0


def note(faults: list[str], name: str, message: ConsoleMessage) -> None:
    if message.type == "error" and "_stcore" not in message.location.get("url", ""):
        faults.append(f"{name}: {message.text}")


def prepare(page: Page, name: str, options: argparse.Namespace) -> None:
    """What a reader would do before the page shows what it is for."""
    if name == "train":
        take_file(page, options.rows.name, options.rows.read_bytes())
        page.get_by_role("radio", name="A sweep").or_(page.get_by_text("A sweep", exact=True)).first.click()
        settled(page)
        page.get_by_role("button", name="Estimate").click()
        page.get_by_text("Trained parameters").wait_for()
    elif name == "serving":
        page.get_by_text(options.window, exact=True).click()
    elif name == "activations":
        page.get_by_role("button", name="Make the vectors").click()
        page.get_by_text("What the prompt decides").wait_for()
    elif name == "playground":
        page.get_by_text("Sampling", exact=True).click()
        page.get_by_text("Token probabilities").click()
        settled(page)
        page.get_by_label("Prompt", exact=True).fill(options.prompt)
        page.get_by_role("button", name="Send").click()
        page.wait_for_function("() => (document.body.innerText.match(/latency/g) || []).length >= 2")
    settled(page)


def take(page: Page, name: str, folder: Path | None, faults: list[str]) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    for width in (DESKTOP, PHONE) if folder else (DESKTOP,):
        for scheme in ("light", "dark") if folder else ("light",):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            settled(page)
            main = page.locator("[data-testid=stMain]")
            if (wider := main.evaluate("element => element.scrollWidth - element.clientWidth")) > 1:
                faults.append(f"{name}: {wider} px wider than a window of {width} px, {scheme}")
            main.evaluate("element => element.scrollTo(0, 0)")
            height = int(main.evaluate("element => element.scrollHeight"))
            page.set_viewport_size({"width": width, "height": max(600, min(height, TALLEST[width]))})
            page.wait_for_timeout(1500)
            settled(page)
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=folder / f"{name}-{width}-{scheme}.png")
            if (width, scheme) == (DESKTOP, "light"):
                page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.emulate_media(color_scheme="light")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
