"""A backup is restored as what it was: answers, versions, aliases, history, jobs, logs, keys, on both databases."""

from __future__ import annotations

import random
import shutil
import threading
from types import SimpleNamespace

import pytest
from audit_entries import last_audit
from backup_homes import back_up, files_of, frozen_home, members_of, restore, rows_of, settings_of, unpacked_bytes
from equality_probe import greedy_answers
from serving_adapters import register, settings_at, stub_adapter
from store_moves import NAME, attempt, fill, random_moves
from webhook_stubs import stub_endpoint

from pedro.backup import make_backup
from pedro.errors import NotFoundError
from pedro.registry import Registry
from pedro.registry.queries import search_runs
from pedro.store import Database, Store, schema
from pedro.store.dump import dump, load, read
from pedro.store.migrate import upgrade
from pedro.training.job_log import kept_log


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory):
    """A home with all kinds of things in it, its answers and its backup."""
    folder = tmp_path_factory.mktemp("lived-in")
    settings, expected = frozen_home(folder)
    registry = Registry.open(settings)
    registry.store.create_webhook(stub_endpoint())
    registry.rollback("acme.colours")
    registry.canary("acme.colours", 2, 0.25)
    registry.store.create_key("acme", ["infer", "train"], "since then")
    (settings.home / "comparisons" / "mine").mkdir(parents=True)
    (settings.home / "comparisons" / "mine" / "runs.jsonl").write_text("{}\n")
    backbone = settings.home / "backbones" / "mine"
    backbone.mkdir(parents=True)
    (backbone / "config.json").write_text("{}")
    (backbone / "model.safetensors").write_bytes(bytes(1000))
    (settings.home / "backbones" / ".mine.lock").touch()
    archive = back_up(settings, folder / "backup.tar.gz")
    return SimpleNamespace(settings=settings, archive=archive, expected=expected, folder=folder)


def new_database(kind: str, request: pytest.FixtureRequest) -> str | None:
    """None for the home's own sqlite file, else the URL of an empty database of a server."""
    return None if kind == "sqlite" else request.getfixturevalue("postgres").database()


def answers(settings, expected):
    """Greedy answers of all versions, through the registry's own way of fetching them and the engine."""
    registry = Registry.open(settings)

    def loaded(name: str):
        plain, _, version = name.partition(":")
        return registry.download(registry.get(plain, int(version)))

    names = [f"{plain}:{row['version']}" for plain, rows in expected["versions"].items() for row in rows]
    return greedy_answers(loaded, names, expected["prompts"])


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_restored_home_answers_as_before_and_has_all_that_was_there(lived_in, kind, request, tmp_path):
    """To another place and, for PostgreSQL, another kind of database; then again from there."""
    settings, expected = settings_of(tmp_path / "new", new_database(kind, request)), lived_in.expected
    restored = restore(settings, lived_in.archive)
    assert rows_of(settings.database_url) == rows_of(lived_in.settings.database_url)
    assert restored.rows["pedro_versions"] == 3
    assert restored.rows["pedro_webhook_deliveries"] >= 1
    if kind == "postgresql":
        archive = back_up(settings, tmp_path / "again.tar.gz")
        shutil.rmtree(settings.home)
        settings = settings_of(tmp_path / "newer", new_database(kind, request))
        restore(settings, archive)
    assert answers(settings, expected) == expected["greedy"]
    registry, old = Registry.open(settings), Registry.open(lived_in.settings)
    assert registry.get("acme.colours").version == 1
    assert registry.catalog()["acme.colours"].standing == old.catalog()["acme.colours"].standing
    assert registry.store.alias_history("acme.colours") == old.store.alias_history("acme.colours")
    assert registry.store.list_jobs() == old.store.list_jobs()
    for job, lines in expected["logs"].items():
        assert (kept_log(settings.storage, job) or "").splitlines() == lines
    assert registry.store.authenticate(expected["secrets"]["tenant"])[0].tenant == "acme"
    runs = {run.id for run in search_runs(registry, list(expected["versions"])).runs}
    assert {row["run_id"] for rows in expected["versions"].values() for row in rows} <= runs
    for part in ("artifacts", "storage", "comparisons", "backbones/mine"):
        assert files_of(settings.home / part) == files_of(lived_in.settings.home / part), part
    assert [entry.action for entry in last_audit(old.store)].count("backup.create") == 1
    assert [entry.action for entry in last_audit(registry.store)].count("backup.restore") >= 1
    registry.store.create_key("globex", name="afterwards")  # whose audit has a number of its own
    assert registry.rollback("acme.colours").version == 2


def test_a_version_that_is_registered_in_a_restored_home_comes_after_those_that_it_has(lived_in, tmp_path):
    settings = settings_of(tmp_path / "new")
    restore(settings, lived_in.archive)
    adapter = lived_in.settings.home / "artifacts" / "globex.colours"
    (directory,) = adapter.glob("*/artifacts/adapter")
    assert register(Registry.open(settings), directory, "globex.colours").version == 2


def test_the_archive_is_its_owners_alone_and_holds_no_secret_of_a_key(lived_in):
    assert lived_in.archive.stat().st_mode & 0o777 == 0o600
    held = unpacked_bytes(lived_in.archive)
    assert lived_in.expected["secrets"]["tenant"].encode() not in held
    assert b"pedro_keys" in held
    names = members_of(lived_in.archive)
    assert not [name for name in names if "secrets" in name or "cache" in name or name.endswith(".lock")]


def test_a_gateway_that_followed_the_old_database_reads_the_restored_one_anew(url):
    store = Store(url)
    fill(store, 3)
    followed = store.position()
    lines: list[str] = []
    dump(store._database, lines.append)
    store.promote(NAME, 2)
    store.close()
    with Database(url).writing() as connection:  # wiped
        for table in ("adapters", "versions", "alias_history", "changes", "audit"):
            connection.exec_driver_sql(f"DELETE FROM pedro_{table}")
    load(Database(url), schema.REVISION, lines, told=True, publish=lambda: None)
    again = Store(url)
    assert again.position().generation == followed.generation
    delta = again.changes(followed)
    assert not delta.complete
    assert delta.position.epoch != followed.epoch
    assert again.get_adapter(NAME).aliases == {}
    again.close()


def test_a_backup_beside_moves_holds_the_state_of_one_moment(url, tmp_path):
    """Of every adapter what the last move in its history made of it, and no move is missing in between."""
    store = Store(url)
    names = (NAME, "globex.raced")
    for name in names:
        fill(store, 8, name)
    filled, stop, looks = store.position().generation, threading.Event(), []

    def move() -> None:
        rng = random.Random(threading.get_ident())
        while not stop.is_set():
            for kind, arguments in random_moves(rng, 20, 8):
                if kind in ("promote", "rollback", "set_canary", "set_alias"):
                    attempt(store, "mover", kind, arguments)
            store.promote(names[1], rng.randint(1, 8))

    movers = [threading.Thread(target=move) for _ in range(2)]
    for mover in movers:
        mover.start()
    try:
        while len(looks) < 5 or looks[-1][0] < filled + 50:
            lines: list[str] = []
            dump(store._database, lines.append)
            looks.append((store.position().generation, lines))
    finally:
        stop.set()
        for mover in movers:
            mover.join()
    store.close()
    for _, lines in looks[-5:]:
        tables: dict[str, list] = {}
        for table, row in read(lines):
            tables.setdefault(table, []).append(row)
        (generation,) = [row["value"] for row in tables["pedro_counters"] if row["name"] == "generation"]
        moves = sorted(tables.get("pedro_alias_history", []), key=lambda row: row["generation"])
        assert [row["generation"] for row in moves] == list(range(filled + 1, generation + 1))
        for row in tables["pedro_adapters"]:
            own = [move for move in moves if move["adapter"] == row["adapter"] and move["tenant"] == row["tenant"]]
            if own:
                canary = {"canary": row["canary"]} if row["canary"] else {}
                assert {"aliases": row["aliases"], **canary} == own[-1]["after"]
                assert row["generation"] == own[-1]["generation"]


def test_a_version_that_is_registered_while_files_are_copied_is_not_in_the_backup_and_disturbs_nothing(tmp_path):
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)
    register(registry, stub_adapter(tmp_path / "one", "one", "sha256:bb"), "acme.busy")

    def meanwhile(line: str) -> None:
        if line.startswith("registry: "):  # rows and MLflow's database are read; files are next
            stub = stub_adapter(tmp_path / "two", "two", "sha256:bb")
            thread = threading.Thread(target=register, args=(registry, stub, "acme.busy"))
            thread.start()
            started.append(thread)

    started: list[threading.Thread] = []
    made = make_backup(settings, tmp_path / "backup.tar.gz", meanwhile)
    started[0].join()
    assert made.missing == []
    assert registry.get("acme.busy").version == 2
    copy = settings_of(tmp_path / "copy")
    restore(copy, tmp_path / "backup.tar.gz")
    restored = Registry.open(copy)
    assert restored.get("acme.busy").version == 1
    with pytest.raises(NotFoundError):
        restored.get("acme.busy", 2)
    assert restored.download(restored.get("acme.busy")).is_dir()
    assert register(restored, tmp_path / "two", "acme.busy").version == 2


def test_versions_whose_files_are_gone_or_others_are_told(tmp_path):
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)
    made = [register(registry, stub_adapter(tmp_path / mark, mark, "sha256:bb"), "acme.lost") for mark in "abc"]
    folders = {version.version: next(settings.home.glob(f"artifacts/*/{version.run_id}/artifacts")) for version in made}
    shutil.rmtree(folders[1])
    shutil.copy(folders[3] / "adapter" / "pedro_adapter.json", folders[2] / "adapter")
    (folders[3] / "link").symlink_to("/etc/passwd")
    told = make_backup(settings, tmp_path / "backup.tar.gz", lambda _: None)
    assert told.missing == ["acme.lost:1", "acme.lost:2"]
    assert [name.rpartition("/")[2] for name in told.left_out] == ["link"]


def test_a_database_of_an_earlier_release_is_backed_up_before_its_upgrade_and_upgraded_when_it_is_restored(tmp_path):
    settings, expected = frozen_home(tmp_path)
    archive = back_up(settings, tmp_path / "backup.tar.gz")
    database = Database(settings.database_url)
    with database.reading() as connection:
        assert not connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'pedro_adapters'").all()
    database.close()
    copy = settings_of(tmp_path / "copy")
    assert restore(copy, archive).schema == "0.1.0"
    registry = Registry.open(copy)
    assert registry.catalog()["acme.colours"].aliases == {"champion": 2, "previous": 1}, "MLflow's were taken over"
    assert registry.store.authenticate(expected["secrets"]["tenant"])[0].tenant == "acme"
    assert len(registry.store.list_jobs()) == len(expected["jobs"])


def test_a_server_with_its_schema_and_no_rows_is_empty(postgres, lived_in, tmp_path):
    settings = settings_of(tmp_path / "new", postgres.database())
    database = Database(settings.database_url)
    upgrade(database)
    database.close()
    restore(settings, lived_in.archive)
    assert rows_of(settings.database_url) == rows_of(lived_in.settings.database_url)


def test_checkpoints_are_kept_of_jobs_that_have_not_ended(tmp_path):
    settings = settings_at(tmp_path / "home")
    store = Store(settings.database_url)
    store.create_job("acme", "a", {}, "ftjob-open")
    store.create_job("acme", "b", {}, "ftjob-ended")
    store.update_job("ftjob-ended", status="failed")
    store.close()
    wanted = ("runs/ftjob-open/c/x", "runs/ftjob-open-trial-001/c", "jobs/ftjob-ended/log.txt", "datasets/1.jsonl")
    for name in (
        *wanted,
        "runs/ftjob-ended/c/x",
        "tune/s/state",
        "backbones/b.json",
        "jobs/ftjob-open/.new-1",
        "uploads/.new/f",
    ):
        path = settings.home / "storage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    names = members_of(back_up(settings, tmp_path / "backup.tar.gz"))
    assert {name for name in names if name.startswith("storage/")} == {f"storage/{name}" for name in wanted}
