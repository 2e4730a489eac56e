"""The schema: made, upgraded from that of earlier releases, and refused where it is of a later one."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from audit_entries import last_audit

from pedro.errors import ConfigError, UnavailableError
from pedro.store import AuditQuery, Database, Quota, Store, migrate, schema
from pedro.store.migrate import SchemaState, current, state_of, upgrade

FIRST_RELEASE = """
CREATE TABLE pedro_keys (id VARCHAR(40) NOT NULL PRIMARY KEY, tenant VARCHAR(63) NOT NULL, name VARCHAR(200) NOT NULL,
  scopes VARCHAR(100) NOT NULL, hint VARCHAR(4) NOT NULL, digest VARCHAR(64) NOT NULL UNIQUE, created FLOAT NOT NULL,
  revoked FLOAT);
CREATE INDEX ix_pedro_keys_tenant ON pedro_keys (tenant);
CREATE TABLE pedro_jobs (id VARCHAR(40) NOT NULL PRIMARY KEY, tenant VARCHAR(63) NOT NULL,
  adapter VARCHAR(63) NOT NULL, spec JSON NOT NULL, status VARCHAR(20) NOT NULL, submission_id VARCHAR(200),
  created FLOAT NOT NULL, finished FLOAT, message TEXT NOT NULL);
INSERT INTO pedro_keys VALUES ('key_1', 'acme', 'ci', 'infer,train', 'abcd', 'd1', 1.5, NULL);
INSERT INTO pedro_jobs VALUES ('ftjob-1', 'acme', 'support', '{"a": 1}', 'running', NULL, 2.5, NULL, '');
"""  # and neither quotas nor results, which came later in its time


def run(url: str, script: str) -> None:
    database = Database(url)
    with database.writing() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement.replace("%", "%%"))
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request, tmp_path) -> str:
    """The URL of a database without a schema."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/pedro.db"
    return request.getfixturevalue("postgres").database()


def tables(url: str) -> dict[str, list[str]]:
    """Every table with its columns."""
    database = Database(url)
    with database.reading() as connection:
        found = sa.inspect(connection)
        columns = {name: [one["name"] for one in found.get_columns(name)] for name in found.get_table_names()}
    database.close()
    return columns


def test_the_migrations_make_just_the_tables_that_the_store_uses(url):
    Store(url).close()
    database = Database(url)
    with database.reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == schema.REVISION
    database.close()


def test_the_last_migration_is_the_one_that_the_code_names_and_none_is_missing():
    scripts = ScriptDirectory(str(migrate.Path(migrate.__file__).parent / "migrations"))
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert scripts.get_heads() == [schema.REVISION]
    assert sorted(revisions) == [*migrate.OLDER, schema.REVISION]


def test_a_database_of_the_first_release_keeps_its_rows(empty):
    run(empty, FIRST_RELEASE)
    database = Database(empty)
    assert current(database) == migrate.BEFORE_MIGRATIONS
    assert upgrade(database) == migrate.BEFORE_MIGRATIONS
    assert current(database) == schema.REVISION
    assert upgrade(database) == schema.REVISION
    database.close()
    store = Store(empty)
    (entry,) = last_audit(store)  # of the upgrade that was one
    assert (entry.action, entry.tenant, entry.before) == ("db.upgrade", "*", {"schema": migrate.BEFORE_MIGRATIONS})
    (key,) = store.list_keys()
    assert (key.id, key.tenant, key.scopes, key.created, key.revoked) == (
        "key_1",
        "acme",
        ("infer", "train"),
        1.5,
        None,
    )
    job = store.get_job("ftjob-1")
    assert (job.spec, job.status, job.result) == ({"a": 1}, "running", None)
    assert store.set_quota(tenant="acme", tokens_per_minute=5) == Quota(None, 5)
    store.revoke_key("key_1")
    assert store.position().generation == 2
    store.close()


def stands_at(url: str, revision: str) -> None:
    """Give the empty database the schema of an earlier revision."""
    database = Database(url)
    with database.writing() as connection:
        migrate.apply(connection, revision)
    database.close()


def test_entries_of_an_older_audit_get_ids_by_chance_and_keep_their_order(empty):
    stands_at(empty, "0002")
    columns, values = "at, actor, tenant, action, subject", "{0}, 'user:ann', 'acme', 'key.create', 'key_{0}'"
    entry = f"INSERT INTO pedro_audit ({columns}) VALUES ({values})"
    run(empty, ";\n".join(entry.format(number) for number in range(1, 4)))
    upgrade(Database(empty))
    store = Store(empty)
    entries = last_audit(store, "acme")
    assert [one.subject for one in entries] == ["key_3", "key_2", "key_1"]
    assert len({one.public_id for one in entries}) == 3
    assert [one.subject for one in store.find_audit(AuditQuery(before=entries[0].public_id))] == ["key_2", "key_1"]
    store.close()


def test_a_file_upgrades_itself_when_it_is_opened_and_a_server_says_how(empty):
    if empty.startswith("sqlite"):
        stands_at(empty, "0002")
        Store(empty).close()
        assert current(Database(empty)) == schema.REVISION
        return
    with pytest.raises(UnavailableError, match=r"no schema yet.*`pedro db upgrade`"):
        Store(empty)
    run(empty, FIRST_RELEASE)
    with pytest.raises(
        UnavailableError, match=rf"schema 0\.1\.0, and this release needs {schema.REVISION}.*back it up"
    ):
        Store(empty)
    assert "pedro_adapters" not in tables(empty)
    upgrade(Database(empty))
    Store(empty).close()


def test_a_schema_of_a_newer_release_is_refused_and_left_alone(url):
    Store(url).close()
    run(url, f"UPDATE {schema.VERSION_TABLE} SET version_num = '0999'")
    before = tables(url)
    for use in (lambda: Store(url), lambda: upgrade(Database(url))):
        with pytest.raises(ConfigError, match=r"schema 0999 of a newer release.*install that release, or restore"):
            use()
    assert tables(url) == before
    assert state_of("0999") is SchemaState.NEWER


def test_a_migration_that_is_broken_off_leaves_what_was_there(empty, monkeypatch):
    run(empty, FIRST_RELEASE)
    before = tables(empty)
    database = Database(empty)
    migrate_whole = migrate.apply

    def broken(connection):
        migrate_whole(connection)
        raise ConfigError("cannot go on")

    with monkeypatch.context() as patched:
        patched.setattr(migrate, "apply", broken)
        with pytest.raises(ConfigError, match="cannot go on"):
            upgrade(database)
    assert tables(empty) == before
    upgrade(database)
    database.close()
    assert Store(empty).list_keys()


def test_a_table_of_another_program_is_told_by_name_and_nothing_is_changed(empty):
    run(empty, FIRST_RELEASE.replace("hint VARCHAR(4) NOT NULL, ", "").replace("'abcd', ", ""))
    with pytest.raises(ConfigError, match=r"pedro_keys lacks the column hint.*restore a backup"):
        upgrade(Database(empty))
    assert "pedro_adapters" not in tables(empty)
    assert schema.VERSION_TABLE not in tables(empty)


UPGRADES = """
import os, sys
from pedro.store import Database, Store
from pedro.store.migrate import upgrade
for _ in range(2):
    os.fork()  # four processes, which imported it once
upgrade(Database(sys.argv[1])) if sys.argv[1].startswith("postgresql") else Store(sys.argv[1])
print(f"{Store(sys.argv[1]).list_keys()[0].id} ", end="")
"""


def test_processes_that_upgrade_at_once_do_it_once(empty):
    run(empty, FIRST_RELEASE)
    done = subprocess.run([sys.executable, "-c", UPGRADES, empty], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["key_1"] * 4, done.stderr


def test_an_upgraded_file_is_opened_without_alembic(tmp_path):
    url = f"sqlite:///{tmp_path}/pedro.db"
    Store(url).close()
    look = "import sys; from pedro.store import Store; Store(sys.argv[1]); print('alembic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look, url], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


def test_a_writer_that_hangs_does_not_hold_the_others_up_for_ever(url, monkeypatch):
    Store(url).close()
    monkeypatch.setattr("pedro.store.database.BUSY_TIMEOUT_S", 1)
    one, other = Store(url), Store(url)
    with suppress(UnavailableError), one._database.writing() as connection:  # a server ends it
        connection.execute(sa.update(schema.counters).values(value=schema.counters.c.value))
        with ThreadPoolExecutor(1) as pool, suppress(UnavailableError):
            pool.submit(other.create_key, "acme", name="meanwhile").result(timeout=100)
    assert other.create_key("acme", name="later")[0].name == "later"
    one.close(), other.close()


def test_a_copy_of_a_file_that_lost_its_journal_mode_gets_it_back(tmp_path):
    Store(f"sqlite:///{tmp_path}/pedro.db").close()
    with sqlite3.connect(tmp_path / "pedro.db") as link:
        link.execute("PRAGMA journal_mode=DELETE")
    Store(f"sqlite:///{tmp_path}/pedro.db").close()
    with sqlite3.connect(tmp_path / "pedro.db") as link:
        assert link.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_versions_keep_all_that_they_had_without_the_column_that_nobody_filled(empty):
    stands_at(empty, "0006")
    row = {"tenant": "acme", "adapter": "faq", "version": 1, "digest": "sha256:1", "run_id": "r", "created": 1.0}
    texts = dict.fromkeys(("manifest_digest", "backbone_id", "backbone_digest", "method", "gate"), "x")
    columns = {**row, **texts, "trainable_parameters": 1, "metrics": "{}", "spec": "{}", "seal": "x"}
    run(empty, f"INSERT INTO pedro_versions ({', '.join(columns)}) VALUES ({', '.join(map(repr, columns.values()))})")
    upgrade(Database(empty))
    assert "seal" not in tables(empty)["pedro_versions"]
    database = Database(empty)
    with database.reading() as connection:
        kept = connection.execute(sa.select(schema.versions)).one()
    database.close()
    assert (kept.digest, kept.version, kept.metrics) == ("sha256:1", 1, {})
