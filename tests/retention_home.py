"""A home with everything in it that grows, of several tenants, for tests of the collector and of erasure."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving_adapters import settings_at, stub_adapter

from pedro.registry import Registry, Version
from pedro.store import Store, schema
from pedro.training.job_status import ClusterJobs
from pedro.training.storage import put_dataset

if TYPE_CHECKING:
    from pedro.config import Settings

DAY = 86400.0
GONE = ClusterJobs({}, gone=True)


def open_home(folder: Path) -> tuple[Settings, Registry]:
    """An empty home whose MLflow store is there."""
    settings = settings_at(folder)
    return settings, Registry.open(settings)


def aged(path: Path | str, days: float) -> Path:
    """As if nothing in it had been written for so long."""
    moment = time.time() - days * DAY
    path = Path(path)
    for place, names, files in os.walk(path):
        for name in (*names, *files):
            os.utime(Path(place) / name, (moment, moment))
    os.utime(path, (moment, moment))
    return path


def written(path: Path | str, text: str = "x" * 1000, days: float = 0.0) -> Path:
    """A file, that old."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if days:
        aged(path, days)
    return path


def dataset(settings: Settings, folder: Path, text: str, days: float = 0.0) -> Path:
    """A data set in the storage."""
    source = written(folder / "rows.jsonl", json.dumps({"prompt": text, "completion": "b"}) + "\n")
    return aged(put_dataset(str(source), settings.storage), days)


def job(
    settings: Settings, store: Store, tenant: str, data: Path | str, status: str = "succeeded", days: float = 0.0
) -> str:
    """A job with its row, spec, log and checkpoint; `days` ago, if it has ended."""
    spec = {"tenant": tenant, "adapter": "support", "data": {"train": str(data)}}
    job_id = store.create_job(tenant, "support", spec).id
    store.update_job(job_id, status="running", submission_id=job_id)
    if status != "running":
        store.update_job(job_id, status=status, message=f"of {tenant}")
        execute(settings, "UPDATE pedro_jobs SET finished = ? WHERE id = ?", time.time() - days * DAY, job_id)
    storage = Path(settings.storage)
    written(storage / "jobs" / job_id / "spec.json", json.dumps(spec))
    written(storage / "jobs" / job_id / "log.txt", f"step 1 of {tenant}\n")
    written(storage / "jobs" / job_id / "rows.jsonl.gz", f"the rows of {tenant}")
    written(storage / "runs" / job_id / "checkpoint_1" / "parameters.safetensors", f"weights of {tenant}")
    for place in ("jobs", "runs"):
        aged(storage / place / job_id, days)
    return job_id


def version(
    registry: Registry, folder: Path, name: str, mark: str, tags: dict[str, str] | None = None, **manifest: Any
) -> Version:
    """The next version of an adapter, with a finished run."""
    tenant, _, adapter = name.partition(".")
    run = registry.start_run(experiment=name, name=f"run of {mark}", params={"mark": mark}, tags=tags or {})
    registry.log_metrics(run, 1, {"loss": 1.0})
    found = registry.register(run, stub_adapter(folder / mark, mark, "sha256:bb", **manifest), tenant, adapter)
    registry.finish_run(run)
    return found


def execute(settings: Settings, statement: str, *values: object) -> None:
    """A statement on the platform's database, past the store."""
    with closing(sqlite3.connect(settings.database_url.removeprefix("sqlite:///"), timeout=20)) as link, link:
        link.execute(statement, values)


def age_runs(settings: Settings, days: float) -> None:
    """As if every MLflow run had ended so long ago."""
    with closing(sqlite3.connect(settings.home / "mlflow.db", timeout=20)) as link, link:
        link.execute("UPDATE runs SET end_time = end_time - ?", (int(days * DAY * 1000),))


def rows_of(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with store._database.reading() as connection:
        return {
            name: [tuple(row) for row in connection.execute(table.select())]
            for name, table in schema.metadata.tables.items()
        }


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
