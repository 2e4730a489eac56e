"""What is taken from MLflow bears the platform's seal: who can write to MLflow alone gets nothing in."""

from __future__ import annotations

import json
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from serving_adapters import register, settings_at, stub_adapter
from store_moves import stub_version

from pedro.config import Settings
from pedro.errors import ConfigError
from pedro.registry import Registry
from pedro.registry.seal import TAG, Seal
from pedro.registry.tags import stored
from pedro.store import Store

NAME = "acme.sealed"


@pytest.fixture
def lost(tmp_path):
    """A registry with two registered versions, whose database was lost: what MLflow holds is all that there is."""
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)
    for mark in ("one", "two"):
        register(registry, stub_adapter(tmp_path / mark, mark, "sha256:bb"), NAME)
    registry.store.close()
    for path in settings.home.glob("pedro.db*"):
        path.unlink()
    empty = Store(settings.database_url)
    empty.mark_imported()  # the first taking over is long ago
    empty.close()
    return SimpleNamespace(settings=settings, registry=Registry.open(settings))


def rewrite(lost, statement, *values):
    """What somebody does who can write to MLflow's database."""
    with sqlite3.connect(lost.settings.home / "mlflow.db") as link:
        assert link.execute(statement, values).rowcount


def test_versions_that_this_platform_registered_are_taken_again(lost):
    taken = lost.registry.take_over()
    assert (taken.adapters, taken.versions, taken.refused) == (1, 2, ())
    assert lost.registry.get(NAME).version == 2
    assert lost.registry.download(lost.registry.get(NAME)).is_dir()


@pytest.mark.parametrize("tag", ["digest", "manifest_digest"])
def test_a_version_whose_digests_were_rewritten_is_left_out(lost, tag):
    rewrite(lost, "UPDATE model_version_tags SET value = 'sha256:evil' WHERE key = ? AND version = 2", f"pedro.{tag}")
    taken = lost.registry.take_over()
    assert (taken.versions, taken.refused) == (1, (f"{NAME}:2",))
    assert lost.registry.take_over(unsealed=True).versions == 1


def test_a_seal_is_of_one_version_of_one_adapter_and_one_run(lost):
    client = lost.registry.client
    good = client.get_model_version(NAME, "1")
    client.create_registered_model("globex.victim", tags=stored({"tenant": "globex", "adapter": "victim"}))
    client.create_model_version("globex.victim", source="x", run_id=good.run_id, tags=good.tags)
    client.create_model_version(NAME, source="x", run_id=good.run_id, tags=good.tags)
    rewrite(lost, "UPDATE model_versions SET run_id = 'evil' WHERE name = ? AND version = 2", NAME)
    taken = lost.registry.take_over()
    assert taken.refused == (f"{NAME}:2", f"{NAME}:3", "globex.victim:1")
    assert lost.registry.models() == [NAME]


def test_a_key_is_replaced_by_one_in_front_and_gone_with_its_line(tmp_path):
    seal, version = Seal(tmp_path / "secrets" / "seal.key"), stub_version(1)
    file = tmp_path / "secrets" / "seal.key"
    old = seal.of(version)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not seal.holds(replace(version, digest="sha256:other"), old)
    file.write_text("f" * 64 + "\n" + file.read_text())
    assert seal.of(version) != old
    assert seal.holds(version, old)
    assert seal.holds(version, seal.of(version))
    file.write_text("f" * 64)
    assert not seal.holds(version, old)
    assert not seal.holds(version, "")


def test_processes_that_seal_first_at_once_have_one_key(tmp_path):
    version = stub_version(1)
    with ThreadPoolExecutor(8) as pool:
        seals = set(pool.map(lambda _: Seal(tmp_path / "seal.key").of(version), range(16)))
    assert len(seals) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["seal.key"]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_a_file_without_a_key_is_told(tmp_path, content):
    (tmp_path / "seal.key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"PEDRO_SEAL_KEY_FILE: .*seal\.key"):
        Seal(tmp_path / "seal.key").of(stub_version(1))


def test_a_file_of_ones_own_is_named_and_reaches_jobs_by_its_path(tmp_path):
    file = tmp_path / "own.key"
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path), "PEDRO_SEAL_KEY_FILE": str(file)})
    assert settings.seal_file == file
    assert settings.env()["PEDRO_SEAL_KEY_FILE"] == str(file)
    assert Settings.from_env(settings.env()).seal_file == file
    plain = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    assert Settings.from_env(plain.env()).seal_file == tmp_path / "secrets" / "seal.key"


def test_the_seal_stands_in_mlflow_and_holds_no_key(lost):
    tags = lost.registry.client.get_model_version(NAME, "1").tags
    key = lost.settings.seal_file.read_text().strip()
    assert len(tags[TAG]) == 64
    assert key not in json.dumps(tags)
