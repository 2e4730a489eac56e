"""Brings a database's schema to this release's, and says where it stands.

An sqlite file is brought there by whoever opens it, since it belongs to one machine; a server, which others may be
using, by `pedro db upgrade` alone. A migration is one transaction: a process that is killed leaves what was before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa

from pedro.errors import ConfigError, UnavailableError
from pedro.store import schema
from pedro.store.changes import audited
from pedro.store.database import Database, exclusive
from pedro.store.records import PLATFORM

OLDER = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0006",
    "0007",
    "0008",
    "0009",
    "0010",
)  # revisions before `schema.REVISION`
BEFORE_MIGRATIONS = "0.1.0"  # how a database is called whose tables no migration made
LOCK = "schema"


class SchemaState(StrEnum):
    CURRENT = "current"
    OLDER = "older"
    EMPTY = "empty"
    NEWER = "newer"


def ready(database: Database) -> None:
    """See that the schema is this release's; an sqlite file is brought there.

    Raises ConfigError for one of a newer release, UnavailableError for a server's that must be upgraded first.
    """
    revision = current(database)
    if revision == schema.REVISION:
        return
    if database.is_sqlite:
        upgrade(database)
        return
    if state_of(revision) is SchemaState.NEWER:
        raise newer(database, revision)
    stands = "has no schema yet"
    if revision is not None:
        stands = f"has the schema {revision}, and this release needs {schema.REVISION}"
    raise UnavailableError(
        f"database {database.shown}: {stands}; {remedy(database, revision)}", param="database_url", code="schema"
    )


def remedy(database: Database, revision: str | None) -> str:
    """What makes a database with that revision one that this release works with; empty where it is."""
    state = state_of(revision)
    if state is SchemaState.CURRENT or (database.is_sqlite and state is not SchemaState.NEWER):
        return ""
    if state is SchemaState.NEWER:
        return "install that release, or restore the backup that was made before its upgrade"
    return "back it up if it holds anything, then run `pedro db upgrade`"


def current(database: Database) -> str | None:
    """The revision of the schema, `BEFORE_MIGRATIONS` for tables of an earlier release, None for no tables.

    Raises UnavailableError when the database does not answer.
    """
    if not database.exists:
        return None
    with _answering(database), database.reading() as connection:
        return _revision(connection)


def state_of(revision: str | None) -> SchemaState:
    """How a revision stands to this release's."""
    if revision is None:
        return SchemaState.EMPTY
    if revision == schema.REVISION:
        return SchemaState.CURRENT
    return SchemaState.OLDER if revision in (*OLDER, BEFORE_MIGRATIONS) else SchemaState.NEWER


def upgrade(database: Database) -> str | None:
    """Bring the schema to this release's; the revision that it had. Of two processes at once, one waits for the other.

    Raises ConfigError for a schema of a newer release, and for tables that are not ours.
    """
    with exclusive(database.url, LOCK), _answering(database), database.writing() as connection:
        before = _revision(connection)
        if state_of(before) is SchemaState.NEWER:
            raise newer(database, before)
        if before != schema.REVISION:
            try:
                apply(connection)
            except ConfigError as error:
                raise ConfigError(f"database {database.shown}: {error.message}", param=error.param) from error
            if before is not None:
                states = {"before": {"schema": before}, "after": {"schema": schema.REVISION}}
                audited(connection, None, "db.upgrade", PLATFORM, "schema", **states)
    return before


def apply(connection: sa.Connection, to: str = schema.REVISION) -> None:
    """Run the migrations up to a revision, in the connection's transaction."""
    import logging

    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    command.upgrade(config, to)


def _revision(connection: sa.Connection) -> str | None:
    tables = sa.inspect(connection)
    if tables.has_table(schema.VERSION_TABLE):
        revision = connection.execute(sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")).scalar()  # noqa: S608
        return None if revision is None else str(revision)
    return BEFORE_MIGRATIONS if tables.has_table(schema.keys.name) else None


def newer(database: Database, revision: str | None) -> ConfigError:
    """The error of a database that a newer release made."""
    return ConfigError(
        f"database {database.shown}: has the schema {revision} of a newer release, and this one knows none after "
        f"{schema.REVISION}; {remedy(database, revision)}",
        param="database_url",
        code="schema",
    )


@contextmanager
def _answering(database: Database) -> Iterator[None]:
    """What cannot be opened at all is told with its address."""
    try:
        yield
    except (sa.exc.DBAPIError, UnavailableError) as error:
        cause = error.__cause__ if isinstance(error, UnavailableError) else error
        if not isinstance(cause, sa.exc.DBAPIError):
            raise
        why = str(cause.orig).partition("\n")[0]
        raise UnavailableError(
            f"database {database.shown}: cannot be opened ({why}); check PEDRO_DATABASE_URL", code="database"
        ) from error
