"""The dashboard as a reader meets it: served by Streamlit, opened in Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from dashboard_home import make_home

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHARTS = "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """A dashboard over a home with data, started as its users start it, on a free port."""
    pytest.importorskip("streamlit")
    home = make_home(tmp_path_factory.mktemp("browser") / "home").home
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "STREAMLIT_"))}
    server = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "dashboard/app.py", f"--server.port={port}"],
        cwd=ROOT,
        env={**env, "PEDRO_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, f"streamlit ended with {server.returncode}"
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            assert time.monotonic() < deadline, "streamlit did not come up in 90 s"
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_everything_without_an_error(browser, port, tmp_path, scheme):
    page = browser.new_page(viewport={"width": 1400, "height": 1700}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))
    page.goto(f"http://127.0.0.1:{port}")
    page.get_by_text("First answer by the new version").wait_for(timeout=90_000)
    page.wait_for_function("selector => document.querySelectorAll(selector).length >= 3", arg=CHARTS, timeout=60_000)
    page.locator("[data-testid=stDataFrame] canvas").first.wait_for(timeout=60_000)
    page.get_by_role("radio", name="Training loss").or_(page.get_by_text("Training loss")).first.click()
    page.wait_for_function("() => !document.querySelector('[data-stale=true]')", timeout=60_000)
    page.wait_for_function("selector => document.querySelectorAll(selector).length >= 3", arg=CHARTS, timeout=60_000)
    assert page.locator("[data-testid=stException]").count() == 0
    shot = tmp_path / f"dashboard-{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    page.close()
    assert shot.stat().st_size > 20_000
    assert errors == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="127.0.1.1 is an address of this machine on Linux only")
def test_no_other_address_than_loopback_answers(port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.1.1", port), timeout=5)
