"""The connection to one MLflow store: when it is made, what it raises, how its answers are paged."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pedro.config import without_password
from pedro.errors import UnavailableError
from pedro.registry.relocation import relocate

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_PAGE = 1000


class Connection:
    """MLflow's client, connected when it is first needed. A new sqlite store gets its schema then (seconds, once)."""

    def __init__(self, tracking_uri: str, artifact_root: str, server_database: str | None = None) -> None:
        self.tracking_uri = tracking_uri
        self.artifact_root = artifact_root
        self.server_database = server_database

    def connect(self) -> None:
        """Connect now rather than at the first question. Raises UnavailableError."""
        _ = self.client

    @cached_property
    def client(self) -> MlflowClient:
        """Of this package alone. Raises UnavailableError."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from filelock import FileLock

        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            if self.sqlite_file is None:
                return _connect(_signed_in(self.tracking_uri))
            database = self.sqlite_file
            database.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{database}.lock"):  # two processes must not both make the schema
                if not database.exists() or not database.stat().st_size:
                    _make_schema(database)
                else:
                    _upgrade_schema(database)
                relocate(database, Path(self.artifact_root))
                return _connect(self.tracking_uri)
        except Exception as error:
            remedy = "start it, or unset the variable to use the sqlite store in PEDRO_HOME"
            if self.tracking_uri.startswith("sqlite:"):
                remedy = "is its disk full, or its directory not writable? See PEDRO_HOME and MLFLOW_TRACKING_URI"
            raise UnavailableError(
                f"MLFLOW_TRACKING_URI: no registry answers at {without_password(self.tracking_uri)} "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); {remedy}",
                param="MLFLOW_TRACKING_URI",
            ) from error

    @cached_property
    def forgetting_store(self) -> Any:
        """MLflow's access to its database, which can remove for good what a server only hides: that of an sqlite
        store, or of the database behind a server where it is named; None elsewhere. Raises UnavailableError."""
        own: Any = self.client._tracking_client.store  # the client has no method for it
        if hasattr(own, "_hard_delete_run") or not self.server_database:
            return own if hasattr(own, "_hard_delete_run") else None
        try:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            kind: Any = SqlAlchemyStore
            return kind(self.server_database, self.artifact_root)
        except Exception as error:
            raise UnavailableError(
                f"MLFLOW_BACKEND_STORE_URI: the database of MLflow's server cannot be opened ({type(error).__name__}); "
                "name the one that `mlflow server` has, with its driver installed, or leave it out and run `mlflow gc` "
                "beside the server",
                param="MLFLOW_BACKEND_STORE_URI",
            ) from error

    @property
    def sqlite_file(self) -> Path | None:
        """The file of an sqlite store; None for a tracking server."""
        if not self.tracking_uri.startswith(SQLITE):
            return None
        return Path(self.tracking_uri.removeprefix(SQLITE))

    @property
    def error(self) -> type[Exception]:
        """What MLflow raises."""
        from mlflow.exceptions import MlflowException

        return MlflowException

    @staticmethod
    def is_missing(error: Any) -> bool:
        """Whether one of MLflow's errors says that there is no such thing."""
        return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What MLflow raises inside becomes UnavailableError, with the address to check."""
        try:
            yield
        except self.error as error:
            raise UnavailableError(
                f"the registry at {without_password(self.tracking_uri)} does not answer "
                f"({str(error).partition(chr(10))[0]:.200}); check MLFLOW_TRACKING_URI",
                param="MLFLOW_TRACKING_URI",
            ) from error

    @staticmethod
    def pages(search: Any, **arguments: Any) -> Iterator[Any]:
        """Everything that one of the client's searches finds, page by page."""
        token = None
        while True:
            page = search(max_results=_PAGE, page_token=token, **arguments)
            yield from page
            token = page.token
            if not token:
                return


def _signed_in(uri: str) -> str:
    """The address of a server without user and password, which MLflow's client takes by variables of its own: what it
    says of a request that failed repeats the address."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.username is None:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _connect(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _make_schema(database: Path) -> None:
    """Make an sqlite store whole or not at all: MLflow cannot resume a migration that was broken off."""
    scratch = database.with_name(f"{database.name}.new")
    for left in (scratch, scratch.with_name(f"{scratch.name}-journal")):
        left.unlink(missing_ok=True)
    _connect(f"{SQLITE}{scratch}")
    _mark(scratch)
    scratch.rename(database)


def _upgrade_schema(database: Path) -> None:
    """Bring an sqlite store of an earlier MLflow to this one's schema, in a copy of it, for the same reason."""
    import mlflow.store.db_migrations
    from alembic.script import ScriptDirectory

    with closing(sqlite3.connect(database, timeout=20)) as link:
        if link.execute("PRAGMA user_version").fetchone()[0] == _release():  # which nobody else uses: it was looked at
            return
        found = link.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    if found != ScriptDirectory(str(Path(mlflow.store.db_migrations.__file__).parent)).get_current_head():
        scratch = database.with_name(f"{database.name}.upgraded")
        scratch.unlink(missing_ok=True)
        with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(scratch)) as copy:
            old.backup(copy)
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"{SQLITE}{scratch}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"its schema, {found}, is not this MLflow's, and cannot become it: {why}")
        scratch.rename(database)
    _mark(database)


def _mark(database: Path) -> None:
    """Its schema is this MLflow's: who opens it next need not look."""
    with closing(sqlite3.connect(database, timeout=20)) as link:
        link.execute(f"PRAGMA user_version = {_release()}")


def _release() -> int:
    import mlflow

    return zlib.crc32(mlflow.__version__.encode()) >> 1
