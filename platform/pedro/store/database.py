"""Opens sqlite or PostgreSQL and runs transactions; what the tables mean is for others to know.

sqlite begins a transaction when it is told to, so that a migration is whole or not there, and one that will write
begins as a writer: it waits for its turn instead of failing where it first writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url

from pedro.errors import ConfigError, PedroError, UnavailableError

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry

BUSY_TIMEOUT_S = 20
LOCK, LOCK_TIMEOUT_S = "moves", 60
SERVER: dict[str, Any] = {  # of libpq: a link that drops what is sent over it counts as gone after ten seconds
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
SECRETS = ("password", "sslpassword")  # in a URL's query
log = logging.getLogger("pedro.store")
WRITES = "pedro_writes"  # an option of a connection


class Database:
    """One URL. Opens nothing before the first transaction.

    Raises ConfigError for a URL that cannot be used, UnavailableError when the database does not answer.
    """

    def __init__(self, url: str) -> None:
        self._engine = _open(parse_url(url))
        one_moment = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reader = self._engine.execution_options(**one_moment)
        self.url = url

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @property
    def exists(self) -> bool:
        """False for an sqlite file that was not made yet."""
        return self.file is None or self.file.is_file()

    @property
    def file(self) -> Path | None:
        """That of sqlite; None for a server."""
        return Path(str(self._engine.url.database)) if self.is_sqlite else None

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return shown(self._engine.url)

    def close(self) -> None:
        self._engine.dispose()

    def rewrite(self) -> None:
        """Have an sqlite file hold its rows alone: what was deleted is in no free page and in no log. A server is told
        that the space is free. Raises UnavailableError where others are at it for too long."""
        if self.is_sqlite:
            with contextlib.closing(self._engine.raw_connection()) as pooled:
                vacuum(pooled.driver_connection, self.shown)
            return
        with self._answering(), self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM")

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction that only reads, all of it as of one moment. Raises UnavailableError."""
        with self._answering(), self._reader.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: committed at the end of the block, undone by an exception. Raises UnavailableError."""
        with self._answering(), self._engine.connect() as connection:
            connection = connection.execution_options(**{WRITES: True})
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
            raise UnavailableError("The platform's database does not answer; try again.", code="database") from error
        except sa.exc.DataError as error:
            raise PedroError("A text holds a null character; leave it out.", code="invalid_value") from error
        except sa.exc.DatabaseError as error:
            if type(error) is not sa.exc.DatabaseError:  # what is more than that is a mistake of ours
                raise
            log.error("database %s is damaged (%s); restore a backup", self.shown, error.orig)
            raise UnavailableError("The platform's database does not answer; try again.", code="database") from error

    def insert_missing(self, table: sa.Table) -> sa.Insert:
        """The statement that inserts rows where there is none of the same key yet."""
        dialect: Any = sqlite if self.is_sqlite else postgresql
        insert: sa.Insert = dialect.insert(table).on_conflict_do_nothing()
        return insert

    def upsert(self, table: sa.Table, key: dict[str, Any], values: dict[str, Any]) -> sa.Insert:
        """The statement that writes `values` into the row of `key`, new or not."""
        dialect: Any = sqlite if self.is_sqlite else postgresql
        insert = dialect.insert(table).values(**key, **values)
        upsert: sa.Insert = insert.on_conflict_do_update(index_elements=list(key), set_=values)
        return upsert


def vacuum(link: Any, what: str) -> None:
    """Have an sqlite file, and its log, hold nothing but its rows. Raises UnavailableError while others hold it."""
    until, busy = time.monotonic() + BUSY_TIMEOUT_S, True
    try:
        link.execute("VACUUM")
        while busy and time.monotonic() < until:  # while others read what it would overwrite
            busy = link.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 1
            time.sleep(0.1 if busy else 0)
    except sqlite3.OperationalError as error:
        raise UnavailableError(f"{what} cannot be rewritten ({error}); try again", code="database") from error
    if busy:
        raise UnavailableError(f"{what} is in use all the time; try again", code="database")


def vacuum_file(path: Path) -> None:
    """The same of an sqlite file that is not ours."""
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as link:
        vacuum(link, str(path))


class Notifications:
    """Hears what is notified on a channel of PostgreSQL, over a connection of its own. For one thread at a time."""

    def __init__(self, url: str, channel: str) -> None:
        self._engine = _alone(parse_url(url))
        self._channel = channel
        self._connection: Connection | None = None

    def wait(self, timeout_s: float) -> None:
        """Return when something was notified since the last time, after `timeout_s`, or when it cannot be known."""
        driver: Any = self._engine.dialect.loaded_dbapi
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
                self._connection.exec_driver_sql(f"LISTEN {self._channel}")
            link: Any = self._connection.connection.driver_connection
            for _ in link.notifies(timeout=timeout_s, stop_after=1):
                pass
        except (sa.exc.DBAPIError, driver.Error):
            self.close()
            time.sleep(timeout_s)  # it is away; the next time it is tried again

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sa.exc.DBAPIError):
                self._connection.close()
            self._connection = None


@contextlib.contextmanager
def exclusive(url: str, name: str) -> Iterator[None]:
    """Hold a lock that every process with this database shares, whatever host it is on; it ends with its process.

    Beside an sqlite file it is a file's lock, one for all names; in PostgreSQL an advisory one. Raises
    UnavailableError if somebody else holds it for too long.
    """
    parsed = parse_url(url)
    with contextlib.ExitStack() as held:
        try:
            if parsed.get_backend_name() == "sqlite":
                Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{parsed.database}.{LOCK}.lock", timeout=LOCK_TIMEOUT_S))
            else:
                held.enter_context(_advisory_lock(parsed, name))
        except (sa.exc.OperationalError, Timeout) as error:
            raise UnavailableError(
                f"{name}: somebody else is changing it, or the lock of {shown(parsed)} cannot be had; try again",
                code="database",
            ) from error
        except OSError as error:
            raise ConfigError(
                f"database_url: the folder of {shown(parsed)} cannot be written ({error.strerror}); set PEDRO_HOME or "
                "PEDRO_DATABASE_URL to where it can",
                param="database_url",
            ) from error
        yield


@contextlib.contextmanager
def _advisory_lock(url: URL, name: str) -> Iterator[None]:
    engine = _alone(url)
    key = int.from_bytes(hashlib.sha256(f"{LOCK}:{name}".encode()).digest()[:8], signed=True)
    with engine.connect() as connection:
        connection.execute(sa.text(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'"))
        connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        yield  # closing the connection gives the lock back


def _alone(url: URL) -> Engine:
    """Of a server: each connection is new, and without transactions."""
    return sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args=SERVER)


def shown(url: URL) -> str:
    """A URL without what is secret in it."""
    hidden = {name: "***" for name in SECRETS if name in url.query}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def parse_url(text: str) -> URL:
    """The URL with the driver that we use. Raises ConfigError for one of another kind of database."""
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
    return _open_file(url) if url.get_backend_name() == "sqlite" else _open_server(url)


def _open_server(url: URL) -> Engine:
    try:
        engine = sa.create_engine(url, pool_pre_ping=True, connect_args=SERVER)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"database_url: needs the module {error.name}; pip install 'psycopg[binary]'", param="database_url"
        ) from error

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):  # who hangs does not hold others up
            connection.execute(f"SET {limit} = '{BUSY_TIMEOUT_S}s'")
        connection.commit()

    return engine


def _open_file(url: URL) -> Engine:
    path = Path(str(url.database))
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None})
    opened: list[tuple[int, int] | None] = []  # the file that the last connection was made to

    @sa.event.listens_for(engine, "do_connect")
    def _connect(*_: object) -> None:
        if opened and not path.exists():
            raise sqlite3.OperationalError("its file is gone")  # rather than make an empty one in its place
        with contextlib.suppress(OSError):  # sqlite says what it cannot open
            path.parent.mkdir(parents=True, exist_ok=True)

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            with contextlib.suppress(sqlite3.OperationalError):  # another process is at it: it stays so for all
                connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
        connection.execute("PRAGMA synchronous=NORMAL")
        record.info["file"] = _identity(path)
        opened[:] = [record.info["file"]]

    @sa.event.listens_for(engine, "checkout")
    def _still_there(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if _identity(path) != record.info["file"]:  # a backup was put in its place
            raise sa.exc.DisconnectionError

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        file = path.stat()
    except OSError:
        return None
    return file.st_dev, file.st_ino
