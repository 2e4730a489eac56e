"""`pedro jobs list` and `show`: the state of jobs, from their records and their cluster. Changes nothing."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, table
from pedro.cli.times import shown
from pedro.refs import ModelRef

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.job_status import ClusterJobs, ReconciledJob

EVENTS = ("message", "metrics", "checkpoint")
JobId = Annotated[str, typer.Argument(help="The job's id, from `pedro jobs list`.")]


def list_jobs(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List jobs and sweeps, newest first. A job is `lost` if its cluster is gone. Changes nothing."""
    from pedro.config import Settings

    rows = _as_they_stand(Settings.from_env(), tenant)

    def show() -> None:
        table(
            ["job", "model", "status", "created", "seconds", "message"],
            [
                [
                    row["id"],
                    ModelRef(row["tenant"], row["adapter"]).name,
                    row["status"],
                    time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"])),
                    round(row["finished"] - row["created"]) if row["finished"] else "",
                    row["message"] or (row["result"] or {}).get("gate", ""),
                ]
                for row in rows
            ],
            empty="no jobs yet; `pedro submit SPEC.yaml` starts one",
        )

    emit(rows, as_json, show)


def show(
    job: JobId,
    events: Annotated[int, typer.Option(help="How many of its latest events to show.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Show one job or sweep: its state, what it trains, its result and its latest events. Changes nothing."""
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training.job_status import reconcile_record

    settings = Settings.from_env()
    store = Store(settings.database_url)
    cluster = _asked_if(settings, not store.get_job(job).status.final)
    row = _row(reconcile_record(store.get_job(job), cluster))
    told = store.list_job_events(job, EVENTS, limit=events)[::-1]
    spec, result = row["spec"], row["result"] or {}
    facts = (
        ("id", row["id"]),
        ("kind", row["kind"]),
        ("model", ModelRef(row["tenant"], row["adapter"]).name),
        ("goes on from", spec.get("parent", "-")),
        ("method", (spec.get("method") or {}).get("name", "-")),
        ("status", row["status"]),
        ("message", row["message"] or "-"),
        ("attempt", row["attempt"]),
        ("priority", row["priority"]),
        ("created", shown(row["created"])),
        ("started", shown(row["started"])),
        ("ends about", shown(row["estimated_finish"] if row["status"] == "running" else None)),
        ("finished", shown(row["finished"])),
        ("result", result.get("model", "-")),
        ("gate", result.get("gate", "-")),
    )

    def print_job() -> None:
        table(["", "(times are UTC)"], facts, whole=1)
        table(["when", "told"], [[shown(event.at), event.message] for event in told], empty="it told nothing", whole=1)

    emit({**row, "events": [asdict(event) for event in told]}, as_json, print_job)


def _as_they_stand(settings: Settings, tenant: str | None) -> list[dict[str, Any]]:
    """The jobs of the records; of those that have not ended, what the cluster says, or that it is gone."""
    from pedro.store import Store
    from pedro.training.job_status import reconcile

    store = Store(settings.database_url)
    cluster = _asked_if(settings, any(not record.status.final for record in store.list_jobs(tenant)))
    return [_row(job) for job in reconcile(store, cluster, tenant)]


def _asked_if(settings: Settings, is_open: bool) -> ClusterJobs:
    """What the cluster says, if some job has not ended; why it cannot be asked is told."""
    from pedro.training.job_status import ClusterJobs

    cluster = ask_cluster(settings) if is_open else ClusterJobs({}, gone=True)
    if cluster.problem:
        log(f"what runs is as the records have it: {cluster.problem}")
    return cluster


def _row(job: ReconciledJob) -> dict[str, Any]:
    return {**asdict(job.record), "kind": job.record.kind, "status": job.status, "message": job.message}


def ask_cluster(settings: Settings) -> ClusterJobs:
    """What the cluster says of its jobs; none is started to be asked."""
    from pedro.cluster import connect, find_head
    from pedro.errors import UnavailableError
    from pedro.training import ray_jobs
    from pedro.training.job_status import ClusterJobs

    if settings.launcher != "ray":
        return ClusterJobs({})  # each job has a cluster of its own: the records are what is known
    if settings.ray_address is None and find_head(settings) is None:
        return ClusterJobs({}, gone=True)
    try:
        url = connect(settings).dashboard_url
        return ClusterJobs({job["id"]: job for job in ray_jobs.jobs(url)}, url)
    except UnavailableError as error:
        return ClusterJobs({}, problem=error.message)
