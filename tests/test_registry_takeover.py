"""What earlier releases left in MLflow's registry is taken over: once by itself, again by a command, losing nothing."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from serving_adapters import settings_at
from typer.testing import CliRunner

from pedro.cli import app
from pedro.errors import NotFoundError, UnavailableError
from pedro.registry import Registry
from pedro.registry.tags import stored
from pedro.registry.takeover import MOVE
from pedro.registry.versions import version_tags

NAME = "acme.old"


def as_of_before(settings):
    """Three versions as release 0.1.0 entered them, by MLflow alone: champion 2, previous 1, and a promotion of 3 that
    was broken off after it was decided."""
    registry = Registry.open(settings)
    client = registry.client
    run = client.create_run("0").info.run_id
    client.create_registered_model(NAME, tags=stored({"tenant": "acme", "adapter": "old"}))
    client.create_registered_model("somebody-elses")
    for number in (1, 2, 3):
        manifest = {
            "digest": f"sha256:{number}",
            "backbone": {"id": "stories260K", "digest": "sha256:bb"},
            "method": {"name": "pedro"},
            "metrics": {"accuracy": number / 10},
            "spec": {"tenant": "acme"},
            "trainable_parameters": 7,
        }
        tags = version_tags(manifest, f"passed: {number}")
        client.create_model_version(NAME, source=f"runs:/{run}/adapter", run_id=run, tags=tags)
    client.set_registered_model_alias(NAME, "champion", "2")
    client.set_registered_model_alias(NAME, "previous", "1")
    client.set_registered_model_alias(NAME, "candidate", "3")
    client.set_model_version_tag(NAME, "2", "pedro.promoted", "2025-01-02T03:04:05Z")
    client.set_registered_model_tag(NAME, MOVE, json.dumps({"champion": 3, "previous": 2, "candidate": None}))
    return SimpleNamespace(registry=registry, client=client, run=run)


def test_a_home_of_before_means_the_same_and_mlflow_is_put_right_by_the_next_move(tmp_path):
    settings = settings_at(tmp_path / "home")
    old = as_of_before(settings)
    registry = Registry.open(settings)
    assert list(registry.catalog()) == [NAME]
    assert registry.catalog()[NAME].aliases == {"champion": 3, "previous": 2}
    assert [(v.version, v.digest, v.gate, v.run_id) for v in registry.versions(NAME)] == [
        (number, f"sha256:{number}", f"passed: {number}", old.run) for number in (1, 2, 3)
    ]
    second = registry.get(NAME, 2)
    assert (second.metrics, second.spec, second.trainable_parameters) == ({"accuracy": 0.2}, {"tenant": "acme"}, 7)
    assert (second.promoted, second.backbone_id) == ("2025-01-02T03:04:05Z", "stories260K")
    assert second.created == registry.get(NAME, 1).created != ""
    assert registry.rollback(NAME).version == 2
    assert not registry.mirror(), "a machine that is busy tells MLflow later"
    model = old.client.get_registered_model(NAME)
    shown = {alias: int(version) for alias, version in model.aliases.items()}
    assert (shown, MOVE in model.tags) == ({"champion": 2, "previous": 3}, False)


def test_it_happens_once_and_the_command_adds_what_is_missing_but_moves_no_alias(tmp_path, monkeypatch):
    settings = settings_at(tmp_path / "home")
    old = as_of_before(settings)
    registry = Registry.open(settings)
    registry.promote(NAME, 1)
    late = old.client.create_model_version(NAME, source="x", run_id=old.run, tags=stored({"digest": "sha256:4"}))
    old.client.set_registered_model_alias(NAME, "champion", late.version)
    with pytest.raises(NotFoundError):
        Registry.open(settings).get(NAME, 4)
    monkeypatch.setenv("PEDRO_HOME", str(settings.home))

    def pedro(*words):
        done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert pedro("db", "import") == {"adapters": 0, "versions": 0, "refused": [f"{NAME}:4"]}
    assert pedro("db", "import", "--unsealed") == {"adapters": 0, "versions": 1, "refused": []}
    assert pedro("db", "import") == {"adapters": 0, "versions": 0, "refused": []}
    assert registry.get(NAME, 4).digest == "sha256:4"
    assert registry.get(NAME).version == 1
    assert pedro("db", "mirror") == {"unmirrored": []}
    assert int(old.client.get_registered_model(NAME).aliases["champion"]) == 1


def test_processes_that_open_an_older_home_at_once_take_it_over_once(tmp_path):
    settings = settings_at(tmp_path / "home")
    as_of_before(settings)
    look = (
        "from pedro.config import Settings; from pedro.registry import Registry; "
        "r = Registry.open(Settings.from_env()); print(r.get('acme.old').version, r.stamp().generation)"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", look],
            env={**settings.env(), "PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert {process.communicate(timeout=300)[0] for process in running} == {"3 1\n"}


def test_on_a_server_it_is_the_upgrade_that_takes_over_and_until_then_nobody_is_served(tmp_path, postgres, monkeypatch):
    settings = settings_at(tmp_path / "home")
    as_of_before(settings)
    for name, value in {**settings.env(), "PEDRO_DATABASE_URL": postgres.database()}.items():
        monkeypatch.setenv(name, value)

    def pedro(*words, code=0):
        done = CliRunner().invoke(app, ["db", *words, "--json"], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert pedro("current") == {"schema": None, "state": "empty"}
    assert "pedro db upgrade" in pedro("check", code=1)["remedy"]
    made = pedro("upgrade")
    assert (made["before"], made["taken_over"]) == (None, {"adapters": 1, "versions": 3, "refused": []})
    assert pedro("upgrade") == {"before": made["schema"], "schema": made["schema"], "taken_over": None}
    checked = pedro("check")
    assert (checked["ok"], checked["state"], checked["unmirrored"]) == (True, "current", [])


def test_a_server_that_was_not_taken_over_says_what_to_do(tmp_path, postgres):
    settings = settings_at(tmp_path / "home")
    registry = Registry(settings.tracking_uri, settings.artifact_root, settings.cache, postgres.ready_database())
    with pytest.raises(UnavailableError, match="pedro db upgrade"):
        registry.catalog()


def test_a_fresh_home_is_looked_at_without_mlflow(tmp_path):
    look = (
        "import sys; from pedro.config import Settings; from pedro.registry import Registry; "
        "Registry.open(Settings.from_env()).catalog(); print('mlflow' in sys.modules)"
    )
    for prepare in (lambda home: home.mkdir(), settings_at):
        home = tmp_path / prepare.__name__.strip("<>")
        prepare(home)
        done = subprocess.run(
            [sys.executable, "-c", look],
            env={"PEDRO_HOME": str(home), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_a_store_of_an_earlier_mlflow_is_upgraded_when_it_is_opened(tmp_path):
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    settings = settings_at(tmp_path / "home")
    head = _revision(settings.home / "mlflow.db")
    (settings.home / "mlflow.db").unlink()
    engine = create_engine(settings.tracking_uri)
    Base.metadata.create_all(engine)
    config = _get_alembic_config(settings.tracking_uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "c48cb773bb87")  # of 2020: before runs had names of their own
    engine.dispose()
    registry = Registry.open(settings)
    registry.connect()
    assert _revision(settings.home / "mlflow.db") == head
    assert registry.catalog() == {}


def _revision(database):
    with sqlite3.connect(database) as link:
        return link.execute("SELECT version_num FROM alembic_version").fetchone()[0]
