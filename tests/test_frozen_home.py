"""A home that version 0.1.0 left behind works unchanged: its adapters, jobs, logs, keys and runs, and rollback.

make.py in the archive made it; expected.json is what that version itself said of it.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from equality_probe import greedy_answers
from typer.testing import CliRunner

from pedro.cli import app
from pedro.config import Settings
from pedro.errors import AuthenticationError
from pedro.registry import Registry
from pedro.registry.queries import search_runs
from pedro.store import Store

FROZEN = Path(__file__).parent / "fixtures" / "home_0_1.tar.gz"


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """The home, unpacked where it never was before, and what it must hold."""
    with tarfile.open(FROZEN) as archive:
        archive.extractall(tmp_path, filter="data")
    for name in [name for name in os.environ if name.startswith(("PEDRO_", "MLFLOW_", "RAY_ADDRESS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    settings = Settings.from_env()
    expected = json.loads((tmp_path / "expected.json").read_text(encoding="utf-8"))
    return SimpleNamespace(settings=settings, registry=Registry.open(settings), **expected)


def pedro(*words: str) -> Any:
    """What a command prints as JSON."""
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def holds(found: Any, expected: Any) -> bool:
    """Whether all that is expected is there; later versions may tell more."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(k in found and holds(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(holds, found, expected))
    return bool(found == expected)


def test_the_home_gets_this_releases_schema_when_it_is_first_used(frozen):
    assert pedro("db", "current") == {"schema": "0.1.0", "state": "older"}
    assert pedro("db", "check")["ok"], "it needs no command"
    pedro("adapters", "list")
    checked = pedro("db", "check")
    assert (checked["state"], checked["taken_over"], checked["unmirrored"]) == ("current", True, [])


def test_adapters_are_listed_and_shown_as_they_were(frozen):
    assert holds(pedro("adapters", "list"), frozen.adapters)
    for name, versions in frozen.versions.items():
        assert holds(pedro("adapters", "show", name), versions)


def test_adapters_answer_with_the_same_tokens_also_after_a_rollback(frozen):
    def load(name: str) -> Path:
        plain, _, version = name.partition(":")
        return frozen.registry.download(frozen.registry.get(plain, version or "champion"))

    names = [f"{plain}:{row['version']}" for plain, rows in frozen.versions.items() for row in rows]
    answers = greedy_answers(load, names, frozen.prompts)
    assert answers == frozen.greedy
    assert any(answers[f"acme.colours:1/{n}"] != answers[f"acme.colours:2/{n}"] for n in range(len(frozen.prompts)))
    assert frozen.registry.get("acme.colours").version == 2
    assert pedro("adapters", "rollback", "acme.colours")["version"] == 1
    assert load("acme.colours") == load("acme.colours:1")


def test_jobs_and_their_logs_are_shown_though_their_cluster_is_gone(frozen):
    jobs = pedro("jobs", "list")
    assert holds(jobs, frozen.jobs)
    assert [job["status"] for job in jobs] == ["failed", "succeeded", "succeeded", "succeeded"]
    for job, lines in frozen.logs.items():
        assert pedro("jobs", "logs", job)["lines"] == lines


def test_keys_are_accepted_unless_they_were_revoked_and_quotas_hold(frozen):
    assert holds(pedro("keys", "list"), frozen.keys)
    assert holds(pedro("tenants", "list"), frozen.tenants)
    store = Store(frozen.settings.database_url)
    assert store.authenticate(frozen.secrets["tenant"])[0].tenant == "acme"
    assert "admin" in store.authenticate(frozen.secrets["admin"])[0].scopes
    with pytest.raises(AuthenticationError):
        store.authenticate(frozen.secrets["revoked"])
    store.close()


def test_runs_are_listed_with_their_curves(frozen):
    runs = search_runs(frozen.registry, list(frozen.versions)).runs
    trained = {row["run_id"] for rows in frozen.versions.values() for row in rows}
    assert trained <= {run.id for run in runs}
    for run_id in trained:
        assert next(step for step, _ in frozen.registry.metric_history(run_id, "dev/loss")) == 10
