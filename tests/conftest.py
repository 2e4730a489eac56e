"""What every test process needs before Ray is first imported."""

import os
import sys

import pytest

# Ray reads this once, at import, and a local head of pedro listens on loopback alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(autouse=True)
def _main_module(monkeypatch):
    """Streamlit's AppTest makes its page `__main__`, which a process spawned by a later test would then run."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
