"""`pedro submit` and `pedro jobs`: fine-tuning jobs, from a spec file to a registered adapter."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pedro.cli.output import AsJson, emit, percent, printable, say, table

if TYPE_CHECKING:
    from pedro.cluster import Cluster
    from pedro.store import JobRecord

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
        report = estimate(wanted)
        emit(report.to_dict(), as_json, lambda: typer.echo(str(report)))
        return
    from pedro.cluster import connect
    from pedro.store import Store
    from pedro.training import submit as training

    store = Store(settings.database_url)
    cluster = connect(settings, say)
    job_id = training.submit(wanted, settings, cluster.dashboard_url, store)
    if not wait:
        emit(
            {"job_id": job_id, "model": wanted.name},
            as_json,
            lambda: typer.echo(f"{job_id}\nfollow it:  pedro jobs logs {job_id} --follow"),
        )
        return
    say(f"job {job_id} trains {wanted.name}")
    try:
        result = training.wait(job_id, cluster.dashboard_url, say, store)
    except KeyboardInterrupt:
        say(f"the job goes on; `pedro jobs stop {job_id}` ends it")
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
    """List fine-tuning jobs, newest first."""
    from pedro.config import Settings
    from pedro.store import Store

    records = _settled(Store(Settings.from_env().database_url), tenant)

    def show() -> None:
        table(
            ["job", "model", "status", "created", "seconds", "message"],
            [
                [
                    record.id,
                    f"{record.tenant}.{record.adapter}",
                    record.status,
                    time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)),
                    round(record.finished - record.created) if record.finished else "",
                    record.message or (record.result or {}).get("gate", ""),
                ]
                for record in records
            ],
            empty="no jobs yet; `pedro submit SPEC.yaml` starts one",
        )

    emit([asdict(record) for record in records], as_json, show)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="With every line of Ray.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a job wrote: progress, loss, speed, time left, errors."""
    from pedro.training import submit as training

    url = _cluster().dashboard_url
    if follow and not as_json:
        for line in training.follow(job, url):
            typer.echo(printable(line))
        return
    text = training.logs(job, url)
    lines = text.splitlines() if raw else list(training.readable(text.splitlines()))
    emit({"job_id": job, "lines": lines}, as_json, lambda: typer.echo(printable("\n".join(lines))))


@app.command()
def stop(job: JobId, as_json: AsJson = False) -> None:
    """End a job; its checkpoints stay, nothing is registered."""
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training import submit as training

    training.stop(job, _cluster().dashboard_url, Store(Settings.from_env().database_url))
    emit({"job_id": job, "status": "cancelled"}, as_json, lambda: typer.echo(f"stopped {job}"))


def _cluster() -> Cluster:
    """The cluster, which must be there already: nothing is started to look at a job."""
    from pedro.cluster import connect, find_head
    from pedro.config import Settings
    from pedro.errors import NotFoundError

    settings = Settings.from_env()
    if settings.ray_address is None and find_head(settings) is None:
        raise NotFoundError(
            "no local Ray head runs for this PEDRO_HOME, and its jobs' logs ended with it; `pedro jobs list` shows how "
            "they ended, MLflow their curves"
        )
    return connect(settings)


def _settled(store, tenant: str | None) -> list[JobRecord]:
    """The jobs; what the cluster knows of the unfinished ones is entered first, or that it is gone."""
    from pedro.cluster import connect, find_head
    from pedro.config import Settings
    from pedro.errors import NotFoundError
    from pedro.training import submit as training

    open_jobs = [record for record in store.list_jobs(tenant) if not record.status.final]
    settings = Settings.from_env()
    if open_jobs:
        there = settings.ray_address is not None or find_head(settings) is not None
        url = connect(settings).dashboard_url if there else None
        for record in open_jobs:
            try:
                state = training.status(record.id, url) if url else "LOST"
            except NotFoundError:
                state = "LOST"
            if url and state == "SUCCEEDED":
                training.wait(record.id, url, store=store)
            elif state == "RUNNING" and record.status == "queued":
                store.update_job(record.id, status="running")
            elif state in ("FAILED", "STOPPED", "LOST"):
                message = {"LOST": "its cluster was ended", "STOPPED": "stopped"}.get(state, "its driver died")
                store.update_job(record.id, status="cancelled" if state == "STOPPED" else "failed", message=message)
    return store.list_jobs(tenant)
