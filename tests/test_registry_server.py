"""MLflow's server behind its own password: the registry works through it, Ray sees no password, erasure reaches it."""

from __future__ import annotations

import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow_server import ADMIN, mlflow_server
from retention_home import GONE, version

from pedro.cli.tenants import gc_command
from pedro.config import Settings
from pedro.errors import UnavailableError
from pedro.registry import Registry
from pedro.retention.erasure import erase_tenant

USER, WORD = "pedro", "w:rd of/the%platform"
NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "server") as running:
        running.make_user(USER, WORD)
        yield running


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    """What one registry sets is gone for the next test."""
    for name in NAMES:
        monkeypatch.setenv(name, "0")
    for name in NAMES[:2]:
        monkeypatch.delenv(name)


def settings_of(server, tmp_path, **env) -> Settings:
    (tmp_path / "word").write_text(f"{WORD}\n")
    home = {"PEDRO_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": server.url}
    own = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD_FILE": str(tmp_path / "word")}
    return Settings.from_env({**home, **own, **env})


def fill(registry: Registry, folder: Path, tenant: str) -> None:
    """An adapter with two versions, one of them champion, and an import."""
    for number in (1, 2):
        version(registry, folder, f"{tenant}.support", f"{tenant}-{number}", {"note": f"of {tenant}"})
    registry.promote(f"{tenant}.support", 2)
    run = registry.start_run(experiment=tenant, name=f"import of {tenant}", params={"from": tenant}, tags={})
    (folder / f"note-{tenant}").mkdir()
    (folder / f"note-{tenant}" / "note.txt").write_text(f"of {tenant}")
    registry.log_artifacts(run, folder / f"note-{tenant}", "adapter")


@pytest.mark.slow
def test_a_server_with_mlflows_own_passwords_serves_the_platform_alone_and_ray_sees_no_password(server, tmp_path):
    for auth in ({}, {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": "wrong"}):
        address = {"PEDRO_HOME": str(tmp_path / "other"), "MLFLOW_TRACKING_URI": server.url}
        with pytest.raises(UnavailableError, match="no registry answers") as refused:
            Registry.open(Settings.from_env({**address, **auth})).connect()
        assert "wrong" not in str(refused.value)
    settings = settings_of(server, tmp_path)
    registry = Registry.open(settings)
    fill(registry, tmp_path, "acme")
    assert int(registry.client.get_model_version_by_alias("acme.support", "champion").version) == 2
    assert (registry.download(registry.get("acme.support")) / "pedro_adapter.json").is_file()
    # what Ray shows of a job is what its driver and its workers begin with
    handed = settings.env()
    assert WORD not in repr(handed)
    assert "w%3Ard" not in repr(handed)
    code = (
        "import sys; from pedro.config import Settings; from pedro.registry import Registry\n"
        "registry = Registry.open(Settings.from_env())\n"
        "run = registry.start_run(experiment='acme.support', name='a worker', params={}, tags={})\n"
        "registry.log_metrics(run, 1, {'loss': 0.5}); registry.finish_run(run); print(run)"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PEDRO_"))}
    done = subprocess.run([sys.executable, "-c", code], env={**env, **handed}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert registry.metric_history(done.stdout.split()[-1], "loss") == [(1, 0.5)]


def erase(settings: Settings, registry: Registry, tenant: str):
    return erase_tenant(tenant, settings, registry, lambda: GONE, lambda job: None)


@pytest.mark.slow
def test_an_erased_tenant_leaves_nothing_at_mlflows_server_once_the_command_was_run_that_is_told(server, tmp_path):
    settings = settings_of(server, tmp_path)
    registry = Registry.open(settings)
    for tenant in ("initech", "hooli"):
        fill(registry, tmp_path, tenant)
    done = erase(settings, registry, "initech")
    assert done.at_server == 5, "three runs and two experiments"
    assert len(done.hidden_experiments) == 2
    artifacts = [path for path in server.found("initech") if "/artifacts/" in path]
    assert not artifacts, "its files are gone at once"
    fresh = version(registry, tmp_path / "anew", "initech.support", "another")  # the name is free again
    assert fresh.version == 1
    registry.delete("initech.support")
    erase(settings, registry, "initech")
    hidden = registry.client.search_experiments(view_type=2)
    command = gc_command(settings, [one.experiment_id for one in hidden])
    assert WORD not in command
    command = command.replace("DATABASE", server.database)
    env = {**os.environ, "MLFLOW_TRACKING_USERNAME": ADMIN[0], "MLFLOW_TRACKING_PASSWORD": ADMIN[1]}
    words = shlex.split(command)
    gone = subprocess.run([sys.executable, "-m", *words], env=env, capture_output=True, text=True)
    assert gone.returncode == 0, gone.stderr
    assert server_rows(server, "initech") == []
    assert server.found("hooli")
    assert registry.get("hooli.support").version == 2
    assert (registry.download(registry.get("hooli.support")) / "pedro_adapter.json").is_file()


@pytest.mark.slow
def test_where_the_database_behind_the_server_is_named_nothing_is_left_at_once(server, tmp_path):
    settings = settings_of(server, tmp_path, MLFLOW_BACKEND_STORE_URI=server.database)
    registry = Registry.open(settings)
    for tenant in ("umbrella", "wayne"):
        fill(registry, tmp_path, tenant)
    wrong = settings_of(server, tmp_path, MLFLOW_BACKEND_STORE_URI=f"sqlite:///{tmp_path}/another.db")
    with pytest.raises(UnavailableError, match="names another database"):
        erase(wrong, Registry.open(wrong), "umbrella")
    done = erase(settings, registry, "umbrella")
    assert (done.at_server, done.hidden_experiments) == (0, [])
    assert server_rows(server, "umbrella") == []
    assert server.found("umbrella") == [], "nor in a free page of its database"
    assert server_rows(server, "wayne")


def server_rows(server, text: str) -> list[str]:
    """The tables of the server's two databases in whose rows a text stands."""
    found = []
    for name in ("server.db", "auth.db"):
        with closing(sqlite3.connect(server.folder / name, timeout=60)) as link:
            tables = [row[0] for row in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            found += [table for table in tables if text in repr(link.execute(f"SELECT * FROM {table}").fetchall())]
    return found
