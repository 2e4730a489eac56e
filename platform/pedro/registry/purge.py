"""Removes runs, versions and experiments from MLflow for good, their artifacts first: MLflow's own deletion hides them.

Only a store that MLflow reads itself (sqlite, PostgreSQL, …) can be made to forget a run. A tracking server takes it as
deleted, without its artifacts, until `mlflow gc` is run beside that server, or at once where the database behind it is
named, too (`MLFLOW_BACKEND_STORE_URI`). An experiment that a server hides has lost its name, which is free again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pedro.errors import UnavailableError
from pedro.refs import tenant_of
from pedro.registry.connection import SQLITE
from pedro.registry.tags import ours
from pedro.store.database import vacuum_file
from pedro.stored_files import remove, total_bytes

if TYPE_CHECKING:
    from mlflow.entities import Run

    from pedro.registry.connection import Connection

ALIVE, DELETED, ALL = 1, 2, 3  # MLflow's ViewType
OPEN = ("RUNNING", "SCHEDULED")
ADAPTER = "adapter"
NAMELESS = "~erased-"  # begins the name of an experiment that a server hides


@dataclass(frozen=True)
class KeptRun:
    """A run as far as its end is concerned."""

    id: str
    experiment: str
    ended: float
    """When it ended; one that never said so, when it began."""
    is_open: bool
    job: str
    """The job or sweep that it belongs to; empty for an import."""
    location: str
    """Its artifacts."""


def kept_runs(connection: Connection, experiments: set[str] | None = None) -> list[KeptRun]:
    """The runs of these experiments, or of all, deleted ones included. Raises UnavailableError."""
    with connection.answering():
        found = _experiments(connection)
        names = {one.experiment_id: one.name for one in found if experiments is None or one.name in experiments}
        return [_kept(run, names) for ids in _batches(list(names)) for run in _runs(connection, ids)]


def experiments_of(connection: Connection, tenant: str) -> set[str]:
    """Names of the experiments of a tenant: its own, for imports, and those of its adapters."""
    with connection.answering():
        names = {one.name for one in _experiments(connection)}
    return {name for name in names if tenant in (name, tenant_of(name))}


def models_of(connection: Connection, tenant: str) -> set[str]:
    """Names of the registered models of a tenant."""
    if not _exists(connection):
        return set()
    with connection.answering():
        found = connection.pages(connection.client.search_registered_models, filter_string=None)
        return {model.name for model in found if tenant_of(model.name) == tenant}


def adapter_bytes(connection: Connection, run: KeptRun) -> int:
    """Of the adapter among a run's files; 0 where there is none. Raises UnavailableError."""
    path = _local(run.location)
    if path is not None:
        return total_bytes(str(path / ADAPTER))
    with connection.answering():
        return sum(file.file_size or 0 for file in connection.client.list_artifacts(run.id, ADAPTER))


def purge_adapter(connection: Connection, run: KeptRun) -> None:
    """Remove the adapter among a run's files; its reports and what it measured stay. Raises UnavailableError."""
    _purge_files(connection, run.location, ADAPTER)


def _purge_files(connection: Connection, location: str, below: str | None) -> None:
    path = _local(location)
    if path is not None:
        remove(str(path / below) if below else str(path))
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with connection.answering(), suppress(FileNotFoundError):
        there: Any = get_artifact_repository(location, tracking_uri=connection.client.tracking_uri)
        there.delete_artifacts(below)


def purge_run(connection: Connection, run: KeptRun) -> bool:
    """Remove a run, files first; False where a tracking server has it hidden only. Raises UnavailableError."""
    path = _local(run.location)
    if path is not None and path.name == "artifacts" and path.parent.name == run.id:
        remove(str(path.parent))
    else:
        _purge_files(connection, run.location, None)
    with connection.answering():
        _unless_missing(connection, connection.client.delete_run, run.id)
        if connection.forgetting_store is None:
            return False
        _forget(connection, connection.forgetting_store._hard_delete_run, run.id)
    return True


def purge_model(connection: Connection, name: str) -> None:
    """Remove a registered model with all its versions and their tags. Raises UnavailableError."""
    with connection.answering():
        _unless_missing(connection, connection.client.delete_registered_model, name)


def purge_experiment(connection: Connection, name: str) -> bool:
    """Remove an experiment without runs and its folder; False where a tracking server has it hidden only."""
    with connection.answering():
        found = next((one for one in _experiments(connection) if one.name == name), None)
        if found is None:
            return True
        path = _local(found.artifact_location)
        if path is not None and path.name == name:
            remove(str(path))
        store, hidden = connection.forgetting_store, found.lifecycle_stage == "deleted"
        if store is None:
            if hidden:  # by somebody else: only one that is there takes another name
                connection.client.restore_experiment(found.experiment_id)
            connection.client.rename_experiment(found.experiment_id, f"{NAMELESS}{secrets.token_hex(6)}")
        if store is None or not hidden:
            connection.client.delete_experiment(found.experiment_id)
        if store is None:
            return False
        _forget(connection, store._hard_delete_experiment, found.experiment_id)
    return True


def hidden_experiments(connection: Connection) -> list[str]:
    """Ids of the experiments of erased tenants that a server hides until `mlflow gc`. Raises UnavailableError."""
    if connection.sqlite_file is not None:
        return []
    with connection.answering():
        return [one.experiment_id for one in _experiments(connection) if one.name.startswith(NAMELESS)]


def overwrite_free_pages(connection: Connection) -> None:
    """Have an sqlite store hold what there is and nothing else, and that behind a server where it is named. Does
    nothing for other servers. Raises UnavailableError."""
    database = connection.server_database or ""
    of_server = Path(database.removeprefix(SQLITE)) if database.startswith(SQLITE) else None
    for file in (connection.sqlite_file, of_server):
        if file is not None and file.is_file():
            vacuum_file(file)


def run_bytes(run: KeptRun) -> int:
    """Of a run's files on this host."""
    path = _local(run.location)
    return 0 if path is None else total_bytes(str(path))


def _experiments(connection: Connection) -> list[Any]:
    if not _exists(connection):
        return []
    return list(connection.pages(connection.client.search_experiments, view_type=ALL))


def _exists(connection: Connection) -> bool:
    """False for an sqlite store that was not made yet, which looking does not make."""
    return connection.sqlite_file is None or connection.sqlite_file.is_file()


def _batches(ids: list[str], size: int = 100) -> Iterator[list[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _runs(connection: Connection, experiment_ids: list[str]) -> Iterator[Run]:
    def search(**options: Any) -> Any:
        return connection.client.search_runs(experiment_ids, run_view_type=ALL, **options)

    return connection.pages(search)


def _kept(run: Run, names: dict[str, str]) -> KeptRun:
    info, tags = run.info, ours(run.data.tags)
    moment = info.end_time or info.start_time or 0
    return KeptRun(
        info.run_id,
        names[info.experiment_id],
        moment / 1000,
        info.status in OPEN,
        tags.get("job") or tags.get("sweep") or "",
        info.artifact_uri or "",
    )


def _local(location: str) -> Path | None:
    """The folder of artifacts on this host."""
    if "://" in location and not location.startswith("file://"):
        return None
    if location.startswith("file:"):
        return Path(unquote(urlsplit(location).path))
    return Path(location) if location.startswith("/") else None


def _forget(connection: Connection, remove: Any, entity: str) -> None:
    """Remove what MLflow has from its database. Raises UnavailableError where the one that was named for a server does
    not have it."""
    try:
        remove(entity)
    except connection.error as error:
        if not connection.is_missing(error):
            raise
        own: Any = connection.client._tracking_client.store
        if connection.forgetting_store is not own:
            raise UnavailableError(
                "MLFLOW_BACKEND_STORE_URI: names another database than MLflow's server has: what the server has is "
                "not in it; name the one that `mlflow server` has",
                param="MLFLOW_BACKEND_STORE_URI",
            ) from error


def _unless_missing(connection: Connection, ask: Any, *arguments: str) -> None:
    try:
        ask(*arguments)
    except connection.error as error:
        if not connection.is_missing(error):
            raise
