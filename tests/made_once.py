"""What many tests would make again is made once a process: the schema of a new store, and what never changes."""

from __future__ import annotations

import asyncio
import atexit
import functools
import gc
import os
import secrets
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_done: set[str] = set()


def make_once() -> None:
    """See to what is imported by now."""
    for name, see_to in PATCHES.items():
        if name in sys.modules and name not in _done:
            _done.add(name)
            see_to(sys.modules[name])


def set_aside() -> None:
    """What is there now stays: a look for garbage, as Streamlit has after each run of a page, passes it over."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _migrations(migrate: Any) -> None:
    """An empty sqlite file gets what the migrations left in the first one, under an epoch of its own."""
    import sqlalchemy as sa

    from pedro.store import schema
    from pedro.store.changes import EPOCH

    @functools.cache
    def left() -> list[str]:
        engine = sa.create_engine("sqlite://", connect_args={"isolation_level": None})
        with engine.connect() as connection:
            whole(connection)
            link: Any = connection.connection.driver_connection
            return list(link.iterdump())[1:-1]  # between BEGIN and COMMIT

    def apply(connection: sa.Connection, to: str = schema.REVISION) -> None:
        if to != schema.REVISION or connection.dialect.name != "sqlite" or sa.inspect(connection).get_table_names():
            whole(connection, to)
            return
        link: Any = connection.connection.driver_connection
        for statement in left():
            link.execute(statement)
        of_epoch = schema.counters.c.name == EPOCH
        connection.execute(sa.update(schema.counters).where(of_epoch).values(value=secrets.randbits(62)))

    whole, migrate.apply = migrate.apply, apply


def _mlflow_store(connection: Any) -> None:
    """A new MLflow store is a copy of the first one, which takes seconds."""
    first: list[Path] = []

    def make(database: Path) -> None:
        if first:
            shutil.copy(first[0], database)
            return
        whole(database)
        folder = Path(tempfile.mkdtemp(prefix="pedro-mlflow-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        first.append(folder / "mlflow.db")
        shutil.copy(database, first[0])

    whole, connection._make_schema = connection._make_schema, make


def _mlflow_revision(utils: Any) -> None:
    """Which schema this MLflow has is read from its seventy migrations once."""
    utils._get_latest_schema_revision = functools.cache(utils._get_latest_schema_revision)


def _files(system: Any) -> None:
    """What is written waits for no disk, as it must where the power may fail: twenty milliseconds each, on some."""
    system.fsync = lambda _: None


def _sqlite(sqlalchemy: Any) -> None:
    """Nor does what is committed, nor a file that is made."""

    def let_go(link: Any, _record: Any) -> None:
        if isinstance(link, sqlite3.Connection):
            link.execute("PRAGMA synchronous=OFF")

    def again(link: Any, record: Any, _proxy: Any) -> None:
        """A store has set it meanwhile."""
        if not record.info.get("let_go"):
            let_go(link, record)
            record.info["let_go"] = True

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", let_go)
    sqlalchemy.event.listen(sqlalchemy.Engine, "checkout", again)


def _statements(base: Any) -> None:
    """A statement is turned into SQL once for all databases of a kind. Each test has a database of its own."""
    from sqlalchemy.engine.default import DefaultDialect
    from sqlalchemy.util import LRUCache

    kept: Any = LRUCache(5000)
    made = base.Engine.__init__

    def make(engine: Any, *args: Any, **options: Any) -> None:
        made(engine, *args, **options)
        engine._compiled_cache = kept

    dialect: Any = DefaultDialect
    dialect.__hash__ = lambda self: hash(type(self))  # a part of what SQL is kept by
    dialect.__eq__ = lambda self, other: type(self) is type(other)
    base.Engine.__init__ = make


def _certificates(transport: Any) -> None:
    """The machine's certificates are read once. Each HTTP client does so, also one that needs none, in 10 to 20 ms."""
    whole = transport.create_ssl_context

    @functools.cache
    def made(_named: Any, **options: Any) -> Any:
        return whole(**options)

    def make(**options: Any) -> Any:
        return made((os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")), **options)

    transport.create_ssl_context = make


def _ends(server: Any) -> None:
    """A server ends at once. uvicorn looks ten times a second whether it should, and what it still waits for."""

    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0.01)

    server.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})


def _simple_ends(socketserver: Any) -> None:
    """As do the servers of Python's library, which look twice a second."""
    socketserver.BaseServer.serve_forever.__defaults__ = (0.01,)


def _commands(typer: Any) -> None:
    """The tree of `pedro`'s commands is built once."""
    typer.get_command = functools.cache(typer.get_command)


def _command_runner(testing: Any) -> None:
    from typer import main

    testing._get_command = main.get_command


def _provenance(provenance: Any) -> None:
    """The state of this checkout does not change under its tests."""

    def once(look: Callable[..., Any]) -> Callable[..., Any]:
        kept = functools.cache(look)
        return lambda root, *rest: (kept if root == provenance.CHECKOUT else look)(root, *rest)

    provenance._hash, provenance._commit = once(provenance._hash), once(provenance._commit)


def _pages(_: Any) -> None:
    """Streamlit's AppTest looks through every installed package for components, reads the scripts and looks for
    garbage, anew for each page that is opened."""
    from streamlit import config
    from streamlit.components.v2 import manifest_scanner
    from streamlit.runtime.scriptrunner.script_cache import ScriptCache
    from streamlit.testing.v1 import app_test, local_script_runner

    @functools.cache
    def scripts() -> ScriptCache:
        return ScriptCache()

    config.set_option("runner.postScriptGC", False)
    scanner: Any = manifest_scanner
    scanner.scan_component_manifests = functools.cache(scanner.scan_component_manifests)
    runners: tuple[Any, ...] = (app_test, local_script_runner)
    for runner in runners:
        runner.ScriptCache = scripts


PATCHES: dict[str, Callable[[Any], None]] = {
    "os": _files,
    "sqlalchemy": _sqlite,
    "sqlalchemy.engine.base": _statements,
    "httpx._transports.default": _certificates,
    "httpx2._transports.default": _certificates,  # of which openai's clients are
    "uvicorn.server": _ends,
    "socketserver": _simple_ends,
    "typer.main": _commands,
    "typer.testing": _command_runner,
    "pedro.store.migrate": _migrations,
    "pedro.registry.connection": _mlflow_store,
    "mlflow.store.db.utils": _mlflow_revision,
    "pedro.provenance": _provenance,
    "streamlit.testing.v1": _pages,
}
