"""All rows of the store as lines of JSON, and back into an empty database: what a backup keeps of it.

Tables are dumped as they are found, whatever release made them, so that a database can be backed up before it is
upgraded; an older dump becomes this release's schema when it is loaded. sqlite's dump may be loaded into PostgreSQL
and the other way round.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from pedro.errors import ConfigError, ConflictError
from pedro.store import migrate, schema
from pedro.store.changes import EPOCH, GENERATION, audited
from pedro.store.database import Database, exclusive
from pedro.store.records import PLATFORM

PREFIX = "pedro_"
TOGETHER = 500  # rows in one statement


@dataclass(frozen=True)
class Dumped:
    """What a dump holds."""

    schema: str
    rows: dict[str, int] = field(default_factory=dict)
    """How many of each table."""


def dump(database: Database, write: Callable[[str], object]) -> Dumped:
    """Write every row, a line each, all of them as of one moment. Writers are not held up.

    Raises ConfigError for a database without tables of ours or of a newer release, UnavailableError for one that does
    not answer.
    """
    revision = migrate.current(database)
    if revision is None:
        raise ConfigError(
            f"database {database.shown}: holds nothing of the platform yet; set PEDRO_HOME or PEDRO_DATABASE_URL to "
            "what is meant",
            param="database_url",
        )
    if migrate.state_of(revision) is migrate.SchemaState.NEWER:
        raise migrate.newer(database, revision)
    rows: dict[str, int] = {}
    with database.reading() as connection:
        write(json.dumps({"schema": revision}) + "\n")
        for table in _tables(connection):
            rows[table.name] = 0
            for row in connection.execution_options(yield_per=TOGETHER).execute(sa.select(table)):
                write(json.dumps({"table": table.name, "row": dict(row._mapping)}) + "\n")
                rows[table.name] += 1
    return Dumped(revision, rows)


def read(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a dump: each one's table and columns. Raises ConfigError where it is no dump."""
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if number > 1:
                yield str(entry["table"]), dict(entry["row"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"the store's rows: line {number} is no row; take another backup") from error


def check_empty(database: Database) -> None:
    """Raise ConflictError where the database holds rows of the platform, ConfigError where a newer release made it."""
    revision = migrate.current(database)
    if revision is None:
        return
    if migrate.state_of(revision) is migrate.SchemaState.NEWER:
        raise migrate.newer(database, revision)
    with database.reading() as connection:
        _check_empty(database, connection)


def check_schema(made_by: str) -> None:
    """Raise ConfigError for a dump of a newer release's schema."""
    if migrate.state_of(made_by) is migrate.SchemaState.NEWER:
        raise ConfigError(
            f"the backup has the schema {made_by} of a newer release, and this one knows none after "
            f"{schema.REVISION}; restore it with that release",
            code="schema",
        )


def load(database: Database, made_by: str, lines: Iterable[str], *, told: bool, publish: Callable[[], None]) -> Dumped:
    """Make an empty database hold a dump of the schema `made_by`, in one transaction, as this release's schema.

    The change feed starts a new life, so that gateways that follow it forget what they know. `told` says that the
    registry was saved at the same moment; otherwise all of it is told again. `publish` is called before the commit: it
    may raise, and nothing has happened then. Raises ConflictError for a database that is not empty, ConfigError for
    rows that do not fit.
    """
    check_schema(made_by)
    made = migrate.OLDER[0] if made_by == migrate.BEFORE_MIGRATIONS else made_by
    with exclusive(database.url, migrate.LOCK), database.writing() as connection:
        _check_empty(database, connection)
        for name in _names(connection):
            connection.execute(sa.schema.DropTable(sa.Table(name, sa.MetaData())))
        migrate.apply(connection, made)
        rows = _enter(connection, lines)
        migrate.apply(connection, schema.REVISION)
        _begin_anew(connection, told, sum(rows.values()))
        publish()
    return Dumped(made_by, rows)


def _names(connection: sa.Connection) -> list[str]:
    """All tables of ours, that of the schema's revision too."""
    return sorted(name for name in sa.inspect(connection).get_table_names() if name.startswith(PREFIX))


def _tables(connection: sa.Connection) -> list[sa.Table]:
    """The tables with rows of the platform, as they are."""
    found = sa.MetaData()
    names = [name for name in _names(connection) if name != schema.VERSION_TABLE]
    found.reflect(connection, only=names, resolve_fks=False)
    for table in found.tables.values():
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                column.type = sa.JSON(none_as_null=bool(column.nullable))
    return [found.tables[name] for name in names]


def _check_empty(database: Database, connection: sa.Connection) -> None:
    for table in _tables(connection):
        if table.name == schema.counters.name:
            continue
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise ConflictError(
                f"database {database.shown}: {table.name} has rows, and a backup is restored into an empty database "
                "alone; set PEDRO_HOME to a new folder, or PEDRO_DATABASE_URL to an empty database",
                param="database_url",
            )


def _enter(connection: sa.Connection, lines: Iterable[str]) -> dict[str, int]:
    tables = {table.name: table for table in _tables(connection)}
    rows = dict.fromkeys(tables, 0)
    for table in tables.values():  # a migration has put counters there
        connection.execute(sa.delete(table))
    for name, group in itertools.groupby(read(lines), key=lambda one: one[0]):
        if name not in tables:
            raise ConfigError(f"the store's rows: {name!r} is no table of this schema; take another backup")
        while some := [row for _, row in itertools.islice(group, TOGETHER)]:
            _insert(connection, tables[name], some)
            rows[name] += len(some)
    if connection.dialect.name == "postgresql":
        for table in tables.values():
            _count_on(connection, table)
    return rows


def _insert(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    columns = {column.name for column in table.columns}
    if not all(row.keys() == rows[0].keys() <= columns for row in rows):
        raise ConfigError(f"the store's rows: {table.name} has other columns than its schema; take another backup")
    try:
        connection.execute(sa.insert(table), rows)
    except sa.exc.StatementError as error:
        if isinstance(error, sa.exc.OperationalError | sa.exc.InternalError):  # the database's fault, not the rows'
            raise
        why = str(error.orig).partition("\n")[0]
        raise ConfigError(f"the store's rows: {table.name} does not take them ({why}); take another backup") from error


def _count_on(connection: sa.Connection, table: sa.Table) -> None:
    """PostgreSQL numbers new rows after those that are there."""
    for column in table.primary_key.columns:
        find = sa.text("SELECT pg_get_serial_sequence(:table, :column)")
        sequence = connection.execute(find, {"table": table.name, "column": column.name}).scalar()
        last = connection.execute(sa.select(sa.func.max(column))).scalar() if sequence else None
        if last is not None:
            connection.execute(sa.text("SELECT setval(:sequence, :last)"), {"sequence": sequence, "last": last})


def _begin_anew(connection: sa.Connection, told: bool, rows: int) -> None:
    counter = schema.counters
    connection.execute(sa.update(counter).where(counter.c.name == EPOCH).values(value=secrets.randbits(62)))
    if not told:
        connection.execute(sa.update(schema.adapters).values(mirrored=0))
    generation = connection.execute(sa.select(counter.c.value).where(counter.c.name == GENERATION)).scalar_one()
    audited(connection, None, "backup.restore", PLATFORM, "store", after={"generation": generation, "rows": rows})
