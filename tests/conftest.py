"""What every test process needs before Ray is first imported."""

import os
import sys
from collections import Counter

import pytest

# Ray reads this once, at import, and a local head of pedro listens on loopback alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Files whose tests are few and long. Left to the end, where a worker finds nothing else to do, they would make the run
# longer; the rest is sorted as pytest-xdist does it.
LONG = ("training_workers", "serving_http", "wheel", "methods_peft", "cli", "training_loop", "bench", "comparison_grid")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist take files in this order: the long ones first, then those of many tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    counts = Counter(item.path.name for item in items)
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), -counts[item.path.name], item.path.name))


@pytest.fixture(autouse=True)
def _main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit's AppTest makes its page `__main__`, which a process spawned by a later test would then run."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
