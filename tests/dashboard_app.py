"""Runs pages of the dashboard by Streamlit's AppTest. What they show is for the tests to check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from made_once import make_once

DASHBOARD = Path(__file__).resolve().parents[1] / "dashboard"
if str(DASHBOARD) not in sys.path:
    sys.path.append(str(DASHBOARD))  # its modules, as Streamlit finds them


def opener(monkeypatch: pytest.MonkeyPatch, view: str = "overview") -> Callable[..., Any]:
    """A function `open_page(home, tracking_uri=None, **query)` that runs the page `view` for a home and returns its
    AppTest; a page that raises fails the test."""
    streamlit = pytest.importorskip("streamlit")
    testing = pytest.importorskip("streamlit.testing.v1")
    make_once()
    monkeypatch.setattr("drawing.CHECKED", True)

    def open_page(home: Path, tracking_uri: str | None = None, **query: str | list[str]) -> Any:
        for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "RAY_ADDRESS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PEDRO_HOME", str(home))
        if tracking_uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
        streamlit.cache_data.clear()
        streamlit.cache_resource.clear()
        shown = testing.AppTest.from_file(str(DASHBOARD / "app.py"), default_timeout=600)
        if view != "overview":
            shown = shown.switch_page(f"views/{view}.py")
        for name, value in query.items():
            shown.query_params[name] = value
        return healthy(shown.run())

    return open_page


def healthy(shown: Any) -> Any:
    """The page, which must not have raised."""
    assert not shown.exception, shown.exception
    return shown


def words(elements: Iterable[Any]) -> str:
    """The text of several elements, one a line."""
    return "\n".join(str(element.value) for element in elements)
