"""Opens sqlite or PostgreSQL, creates tables and runs transactions; what the tables mean is the store's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.schema import CreateIndex, CreateTable

from pedro.errors import ConfigError, UnavailableError

BUSY_TIMEOUT_S = 20
LOCK, LOCK_TIMEOUT_S = "moves", 60


class Database:
    """The tables of `metadata` behind one URL, made where they are missing, as are columns that may be empty.

    Raises ConfigError for a URL that cannot be used and for tables that lack another column, UnavailableError when the
    database does not answer.
    """

    def __init__(self, url: str, metadata: sa.MetaData) -> None:
        self._engine = _open(_parse(url))
        self._create(metadata)

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction: committed at the end of the block, undone by an exception. Raises UnavailableError."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            raise UnavailableError("The platform's database does not answer; try again.", code="database") from error

    def upsert(self, table: sa.Table, key: dict[str, Any], values: dict[str, Any]) -> sa.Insert:
        """The statement that writes `values` into the row of `key`, new or not."""
        dialect: Any = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        insert = dialect.insert(table).values(**key, **values)
        upsert: sa.Insert = insert.on_conflict_do_update(index_elements=list(key), set_=values)
        return upsert

    def _create(self, metadata: sa.MetaData) -> None:
        for last_try in (False, False, True):
            try:
                with self._engine.begin() as connection:
                    for table in metadata.sorted_tables:
                        connection.execute(CreateTable(table, if_not_exists=True))
                        self._complete(connection, table)
                        for index in table.indexes:
                            connection.execute(CreateIndex(index, if_not_exists=True))
                return
            except sa.exc.DBAPIError as error:  # another process may be creating the same tables
                if last_try:
                    where = self._engine.url.render_as_string(hide_password=True)
                    raise UnavailableError(
                        f"database {where}: cannot be opened ({error.orig}); check PEDRO_DATABASE_URL", code="database"
                    ) from error
                time.sleep(0.2)

    def _complete(self, connection: Connection, table: sa.Table) -> None:
        """Add the columns that a table of an earlier release lacks, if its rows may be without them."""
        there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name in there:
                continue
            if not column.nullable:
                where = self._engine.url.render_as_string(hide_password=True)
                raise ConfigError(
                    f"database {where}: its table {table.name} lacks the column {column.name}: another release, or "
                    "another program, made it; restore a backup, or point PEDRO_DATABASE_URL at another database",
                    param="database_url",
                )
            quoted = connection.dialect.identifier_preparer
            kind = column.type.compile(connection.dialect)
            connection.execute(
                sa.text(f"ALTER TABLE {quoted.format_table(table)} ADD COLUMN {quoted.format_column(column)} {kind}")
            )


class FileWatch:
    """Tells whether an sqlite file changed, without reading its tables. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[tuple[int, int], sqlite3.Connection] | None = None  # the file's identity, and a look at it

    def stamp(self, path: str) -> object:
        """A value that changes with every commit (https://www.sqlite.org/pragma.html#pragma_data_version).

        Raises OSError or sqlite3.Error where the file is gone.
        """
        with self._lock:
            file = os.stat(path)
            if self._open is None or self._open[0] != (file.st_dev, file.st_ino):
                uri = f"{Path(path).absolute().as_uri()}?mode=ro"
                self._open = (file.st_dev, file.st_ino), sqlite3.connect(uri, uri=True, check_same_thread=False)
            identity, link = self._open
            return identity, link.execute("PRAGMA data_version").fetchone()[0]


@contextlib.contextmanager
def exclusive(url: str, name: str) -> Iterator[None]:
    """Hold a lock that every process with this database shares, whatever host it is on; it ends with its process.

    Beside an sqlite file it is a file's lock, one for all names; in PostgreSQL an advisory one. Raises
    UnavailableError if somebody else holds it for too long.
    """
    parsed = _parse(url)
    with contextlib.ExitStack() as held:
        try:
            if parsed.get_backend_name() == "sqlite":
                Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{parsed.database}.{LOCK}.lock", timeout=LOCK_TIMEOUT_S))
            else:
                held.enter_context(_advisory_lock(parsed, name))
        except (sa.exc.OperationalError, Timeout, OSError) as error:
            raise UnavailableError(
                f"{name}: somebody else is changing it, or the lock of {parsed.render_as_string()} cannot be had; "
                "try again",
                code="database",
            ) from error
        yield


@contextlib.contextmanager
def _advisory_lock(url: URL, name: str) -> Iterator[None]:
    engine = sa.create_engine(
        url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5}
    )
    key = int.from_bytes(hashlib.sha256(f"{LOCK}:{name}".encode()).digest()[:8], signed=True)
    with engine.connect() as connection:
        connection.execute(sa.text(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'"))
        connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        yield  # closing the connection gives the lock back


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError(
            "database_url: expected a URL such as sqlite:////srv/pedro/pedro.db or postgresql://user@host/pedro",
            param="database_url",
        ) from None
    if url.get_backend_name() == "postgres" or url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"database_url: expected sqlite or postgresql, got {url.get_backend_name()}", param="database_url"
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError("database_url: expected a file, got sqlite in memory, which no two processes share")
    return url


def _open(url: URL) -> Engine:
    try:
        if url.get_backend_name() != "sqlite":
            return sa.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"database_url: needs the module {error.name}; pip install 'psycopg[binary]'", param="database_url"
        ) from error
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    return engine
