"""`pedro submit` and `pedro jobs`: fine-tuning jobs, from a spec file to a registered adapter."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, percent, printable, table

if TYPE_CHECKING:
    from pedro.cluster import Cluster
    from pedro.config import Settings
    from pedro.training.job_status import ClusterJobs

app = typer.Typer(help="Fine-tuning jobs: list, logs, stop.", no_args_is_help=True)
JobId = Annotated[str, typer.Argument(help="The job's id, from `pedro jobs list`.")]


def submit(
    spec: Annotated[Path, typer.Argument(help="A YAML file: tenant, adapter, data, method, training, gate.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, for instance training.lr=1e-3")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end; exit 1 if it fails.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; show parameters, memory, steps and time.")
    ] = False,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="In a dry run, load the backbone and time steps (about a minute), or assume a speed.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train an adapter as a Ray job, evaluate it, register it, and make it champion if its gate says so.

    Examples: `pedro submit jobs/configs/finetune.yaml --dry-run`,
    `pedro submit jobs/configs/finetune.yaml training.max_steps=300 --wait`
    """
    from pedro.config import Settings
    from pedro.training.spec import load_finetune_spec

    wanted = load_finetune_spec(spec, overrides or [])
    settings = Settings.from_env()
    if dry_run:
        from pedro.backbone import quiet
        from pedro.training.estimate import dry_run as estimate

        quiet()
        report = estimate(wanted, calibrated)
        emit(report.to_dict(), as_json, lambda: typer.echo(str(report)))
        return
    from pedro.cluster import connect
    from pedro.store import Store
    from pedro.training import submit as training

    store = Store(settings.database_url)
    cluster = connect(settings, log)
    job_id = training.submit(wanted, settings, cluster.dashboard_url, store)
    if not wait:
        emit(
            {"job_id": job_id, "model": wanted.name},
            as_json,
            lambda: typer.echo(f"{job_id}\nfollow it:  pedro jobs logs {job_id} --follow"),
        )
        return
    log(f"job {job_id} trains {wanted.name}")
    try:
        result = training.wait(job_id, cluster.dashboard_url, log, store)
    except KeyboardInterrupt:
        log(f"the job keeps running; `pedro jobs stop {job_id}` ends it")
        raise

    def show() -> None:
        metrics = result.metrics
        table(
            ["model", "alias", "accuracy", "backbone", "majority", "parameters", "steps", "seconds"],
            [
                [
                    result.model,
                    result.alias,
                    percent(metrics.get("accuracy")),
                    percent(metrics.get("backbone_accuracy")),
                    percent(metrics.get("majority_accuracy")),
                    f"{result.trainable_parameters:,}",
                    result.steps,
                    result.seconds,
                ]
            ],
        )
        typer.echo(f"gate: {result.gate}")

    emit(result.to_dict(), as_json, show)


@app.command("list")
def list_jobs(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List fine-tuning jobs, newest first. Looking changes nothing: `lost` is a job whose cluster is gone."""
    from pedro.config import Settings

    rows = _as_they_stand(Settings.from_env(), tenant)

    def show() -> None:
        table(
            ["job", "model", "status", "created", "seconds", "message"],
            [
                [
                    row["id"],
                    f"{row['tenant']}.{row['adapter']}",
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


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="With every line of Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a job wrote: progress, loss, speed, time left, errors; also when its cluster is gone."""
    from pedro.cluster import connect, find_head
    from pedro.config import Settings
    from pedro.errors import NotFoundError
    from pedro.training import submit as training
    from pedro.training.job_log import kept_log

    settings = Settings.from_env()
    kept = kept_log(settings.storage, job)
    there = settings.ray_address is not None or find_head(settings) is not None
    if follow and not as_json and there:
        with suppress(NotFoundError):  # a job of an earlier cluster has ended
            for line in training.for_people(training.follow(job, connect(settings).dashboard_url)):
                typer.echo(printable(line))
            return
    if kept is None or (raw and there):
        try:
            kept = training.logs(job, _cluster().dashboard_url)
        except NotFoundError:
            if kept is None:
                raise
    lines = kept.splitlines() if raw else list(training.readable(kept.splitlines()))
    shown = lines if raw else list(training.for_people(lines))
    emit({"job_id": job, "lines": lines}, as_json, lambda: typer.echo(printable("\n".join(shown))))


@app.command()
def stop(job: JobId, as_json: AsJson = False) -> None:
    """End a job; its checkpoints stay, nothing is registered. One that has ended stays as it is, and this says how."""
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training import submit as training

    status = training.stop(job, _cluster().dashboard_url, Store(Settings.from_env().database_url))
    ended = f"stopped {job}" if status == "cancelled" else f"{job} was not stopped, it has {status}"
    emit({"job_id": job, "status": status}, as_json, lambda: typer.echo(ended))


def _cluster() -> Cluster:
    """The cluster, which must be there already: nothing is started to look at a job."""
    from pedro.cluster import connect, find_head
    from pedro.config import Settings
    from pedro.errors import NotFoundError

    settings = Settings.from_env()
    if settings.ray_address is None and find_head(settings) is None:
        raise NotFoundError(
            "no local Ray head runs for this PEDRO_HOME, and no log of this job was kept; `pedro jobs list` shows the "
            "jobs and how they ended"
        )
    return connect(settings)


def _as_they_stand(settings: Settings, tenant: str | None) -> list[dict[str, Any]]:
    """The jobs of the records; of those that have not ended, what the cluster says, or that it is gone."""
    from pedro.store import Store
    from pedro.training.job_status import ClusterJobs, reconcile

    store = Store(settings.database_url)
    is_open = any(not record.status.final for record in store.list_jobs(tenant))
    cluster = _ask_cluster(settings) if is_open else ClusterJobs({}, gone=True)
    if cluster.problem:
        log(f"what runs is as the records have it: {cluster.problem}")
    return [
        {**asdict(job.record), "status": job.status, "message": job.message}
        for job in reconcile(store, cluster, tenant)
    ]


def _ask_cluster(settings: Settings) -> ClusterJobs:
    """What the cluster says of its jobs; none is started to be asked."""
    from pedro.cluster import connect, find_head
    from pedro.errors import UnavailableError
    from pedro.training import submit as training
    from pedro.training.job_status import ClusterJobs

    if settings.ray_address is None and find_head(settings) is None:
        return ClusterJobs({}, gone=True)
    try:
        url = connect(settings).dashboard_url
        return ClusterJobs({job["id"]: job for job in training.jobs(url)}, url)
    except UnavailableError as error:
        return ClusterJobs({}, problem=error.message)


def running_jobs(settings: Settings) -> list[tuple[str, str]]:
    """(id, model) of every job and sweep that would end with this home's own cluster."""
    from pedro.cluster import connect, find_head, within
    from pedro.errors import UnavailableError
    from pedro.training import submit as training
    from pedro.training.job_status import RAY_OPEN

    if settings.ray_address is not None or find_head(settings) is None:
        return []
    try:
        jobs = within(20, lambda: training.jobs(connect(settings).dashboard_url))
    except (UnavailableError, OSError, RuntimeError) as error:  # a broken head must be ended all the same
        log(f"which jobs run cannot be told: {error}")
        return []
    open_jobs = [job for job in jobs if job["status"] in RAY_OPEN]
    return [(job["id"], job["metadata"].get("model") or _model(job["metadata"])) for job in open_jobs]


def stop_jobs(settings: Settings, job_ids: list[str]) -> None:
    """Stop jobs one by one, so that each enters how it ended; a driver that does not answer is told of and left."""
    from pedro.cluster import connect, within
    from pedro.errors import PedroError
    from pedro.store import Store
    from pedro.training import submit as training

    store = Store(settings.database_url)
    for job_id in job_ids:
        try:
            within(30, partial(training.stop, job_id, connect(settings).dashboard_url, store))
        except (PedroError, OSError, RuntimeError) as error:
            log(f"{job_id} could not be stopped first: {error}")


def _model(metadata: dict[str, str]) -> str:
    return f"{metadata.get('tenant', '?')}.{metadata.get('adapter', '?')}"
