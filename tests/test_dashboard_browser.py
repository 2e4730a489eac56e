"""The dashboard as a reader meets it: in Chromium, over a platform that trains and serves.

Pictures of its pages are taken by dashboard_gallery.py.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from dashboard_pages import PATIENCE_MS, choose, chromium, settled, shown, started, take_file, visit
from dashboard_stack import ADAPTER, stack

from pedro.config import Settings
from pedro.store import Store

pytestmark = pytest.mark.slow
PAGES = (
    "Overview",
    "Compare",
    "Train",
    "Runs",
    "Sweeps",
    "Activations",
    "Adapters",
    "Usage",
    "Serving",
    "Playground",
    "Demo",
)
PROBE = re.compile(r":\d+/\w+/_stcore/(health|host-config)$")  # a page that is reloaded asks there first, in vain


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if (executable := chromium()) is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with started(executable) as browser:
        yield browser


@pytest.fixture(scope="module")
def platform(browser, tmp_path_factory):
    pytest.importorskip("streamlit")
    with stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture
def open_page(browser, platform) -> Iterator:
    """A function that opens the dashboard; no page may have logged an error in the end."""
    errors: list[str] = []
    pages = []

    def note(message) -> None:
        where = message.location.get("url", "")
        if message.type == "error" and not PROBE.search(where):
            errors.append(f"{message.text} {where}")

    def open_page(width: int = 1280, height: int = 900):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))
        pages.append(page)
        page.goto(f"http://127.0.0.1:{platform.port}")
        settled(page)
        return page

    yield open_page
    found = list(errors)  # closing a page may break requests off
    for page in pages:
        page.close()
    assert found == []


def type_key(page, platform) -> None:
    """A key that is typed on one page is there on every other."""
    if page.get_by_text("answers; admin key").count():
        return
    box = page.get_by_label("API key", exact=True)
    box.fill(platform.admin)
    box.press("Enter")
    page.get_by_text("answers; admin key").wait_for()
    settled(page)


@contextlib.contextmanager
def requests_all_the_while(platform) -> Iterator[None]:
    """Somebody else asks, one request after the other; each must be answered, whatever moves meanwhile."""
    ended, failed = threading.Event(), []

    def ask() -> None:
        for model in itertools.cycle((ADAPTER, f"{ADAPTER}:1", "stories260K")):
            body = {"model": model, "prompt": "play some jazz music", "max_tokens": 16}
            reply = httpx.post(f"{platform.gateway}/v1/completions", json=body, headers=key_of(platform), timeout=120)
            if reply.status_code != 200:
                failed.append(reply.text)
            if ended.wait(0.5):
                return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()
    assert failed == []


def key_of(platform) -> dict[str, str]:
    return {"Authorization": f"Bearer {platform.admin}"}


def champion(platform) -> int:
    reply = httpx.get(f"{platform.gateway}/v1/adapters/{ADAPTER}", headers=key_of(platform), timeout=30)
    return reply.json()["aliases"]["champion"]


def test_a_reader_visits_every_page_filters_promotes_and_asks(open_page, platform):
    page = open_page()
    look_at_results(page)
    look_at_rows(page, platform)
    look_at_vectors(page)
    from_a_file_to_a_chat(page, platform)
    watched = open_page()  # its page stays open and sees what follows
    visit(watched, "Serving")
    type_key(watched, platform)
    with requests_all_the_while(platform):
        move_the_champion_and_back(page, platform)
        ask_in_the_playground(page, platform)
    watched.get_by_role("heading", name="By adapter").wait_for()
    assert watched.locator("[data-testid=stMetric]", has_text="Adapters resident").inner_text()
    watched.locator("canvas td", has_text=re.compile(f"{ADAPTER}: .*→ v")).first.wait_for(state="attached")


def look_at_results(page) -> None:
    """Comparisons, filtered; the curves of a job; a sweep."""
    visit(page, "Compare")
    rows = page.locator(".pedro-table tbody tr")
    before = rows.count()
    choose(page, "Methods", "PEDRO", "LoRA")
    assert 0 < rows.count() < before
    assert "methods=" in page.url, "filters stand in the URL"
    page.reload()
    settled(page)
    assert 0 < rows.count() < before, "a reader who is sent the URL sees the same"
    visit(page, "Runs")
    choose(page, "Look at", f"{ADAPTER} · fine-tuning · succeeded")
    page.get_by_text("Specification").wait_for()
    visit(page, "Sweeps")


def look_at_rows(page, platform) -> None:
    """The rows behind a comparison, and those on which two methods differ."""
    page.goto(f"http://127.0.0.1:{platform.port}/compare?comparison=home/tiny_table1")
    shown(page, "Compare")
    choose(page, "Compare with", "LoRA")
    page.get_by_text("McNemar's exact test").first.wait_for()
    choose(page, "Rows", "differ")
    page.get_by_text("rows shown").first.wait_for()


def look_at_vectors(page) -> None:
    """Figure 2, and what an adapter makes of prompts."""
    visit(page, "Activations")
    choose(page, "Adapter", ADAPTER)
    page.get_by_role("button", name="Make the vectors").click()
    page.get_by_text("What the prompt decides").wait_for()
    settled(page)


def from_a_file_to_a_chat(page, platform) -> None:
    """A file is dropped, checked and estimated; its job is made, ends, and its adapter is asked, all by the mouse."""
    visit(page, "Train")
    type_key(page, platform)
    rows = "".join(f'{{"prompt": "play {n}", "completion": "{n % 2}"}}\n' for n in range(40))
    take_file(page, "My rows.jsonl", rows.encode())
    page.get_by_role("button", name="Estimate").click()
    page.get_by_text("Trained parameters").wait_for()
    settled(page)
    page.get_by_role("button", name="Start training").click()
    page.get_by_text("Events", exact=True).wait_for()
    job_id = page.url.rpartition("job=")[2]
    reply = httpx.get(f"{platform.gateway}/v1/fine_tuning/jobs/{job_id}", headers=key_of(platform), timeout=30)
    assert reply.json()["training_file"].startswith("file-")
    chat = page.get_by_role("link", name=re.compile("Chat with .*my-rows:[0-9]"))
    chat.wait_for()
    chat.click()
    shown(page, "Playground")
    page.get_by_role("button", name="Send").click()
    page.wait_for_function("() => (document.body.innerText.match(/latency/g) || []).length >= 2")
    settled(page)
    assert page.locator("[data-testid=stAlert]").count() == 0
    assert page.get_by_text(re.compile("my-rows:[0-9]")).count()


def move_the_champion_and_back(page, platform) -> None:
    """By the keyboard, and only after a question."""
    visit(page, "Adapters")
    type_key(page, platform)
    choose(page, "Adapter", ADAPTER)
    now = champion(platform)
    other = 1 if now != 1 else 2
    choose(page, "Version", f"v{other}")
    for button, then in ((f"Promote v{other}", other), (f"Roll back to v{now}", now)):
        page.get_by_role("button", name=button).press("Enter")
        page.get_by_role("dialog").get_by_role("button", name="Yes, move it").press("Enter")
        page.get_by_text(f"v{then} is the champion now").wait_for()
        settled(page)
        assert champion(platform) == then


def ask_in_the_playground(page, platform) -> None:
    """The champion and the one before side by side."""
    visit(page, "Playground")
    page.get_by_label("Prompt", exact=True).fill("play some jazz music")
    page.get_by_role("button", name="Send").click()
    page.wait_for_function("() => (document.body.innerText.match(/latency/g) || []).length >= 2")
    settled(page)
    assert page.locator("[data-testid=stCode]").count() >= 2
    assert page.locator("[data-testid=stAlert]").count() == 0
    page.get_by_role("button", name="Save", exact=True).click()
    page.wait_for_function("() => Object.values(localStorage).some(value => value.includes('play some jazz music'))")
    settled(page)
    page.reload()
    shown(page, "Playground")
    type_key(page, platform)
    choose(page, "Saved prompts", "play some jazz music")


def test_a_tenants_key_shows_its_own_alone(open_page, platform):
    store = Store(Settings.from_env({"PEDRO_HOME": str(platform.home)}).database_url)
    key = store.create_key("acme", ("read",))[1]
    store.close()
    page = open_page()
    box = page.get_by_label("API key", exact=True)
    box.fill(key)
    box.press("Enter")
    page.get_by_text("Only acme's data").wait_for()
    for title in ("Overview", "Runs", "Sweeps", "Adapters", "Usage"):
        visit(page, title)
        seen = page.locator("body").inner_text()
        assert "globex" not in seen, title
        assert "initech" not in seen, title


def test_every_page_fits_a_phone_without_an_error(open_page, platform):
    page = open_page(width=400, height=800)
    for title in PAGES:
        page.goto(f"http://127.0.0.1:{platform.port}/{title.lower()}")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            shown(page, title)
            main = page.locator("[data-testid=stMain]")
            width = main.evaluate("element => element.scrollWidth - element.clientWidth")
            assert width <= 1, f"{title} is {width} px wider than a phone where it is {scheme}"
        tops = [box.bounding_box()["y"] for box in page.locator("[data-testid=stMetric]").all()]
        rows = [tops.count(top) for top in dict.fromkeys(tops)]
        assert rows == [2] * (len(tops) // 2), f"{title}: figures two to a row"
        assert tops or title not in ("Overview", "Sweeps", "Adapters", "Serving", "Usage")


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.1.1 is an address of this machine on Linux only")
def test_no_other_address_than_loopback_answers(platform):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.1.1", platform.port), timeout=5)
