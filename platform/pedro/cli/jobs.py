"""`pedro submit` and `pedro jobs`: fine-tuning jobs, from a spec file to a registered adapter."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pedro.cli import standing_jobs
from pedro.cli.output import AsJson, accuracy, emit, log, percent, printable, table
from pedro.cli.standing_jobs import JobId

if TYPE_CHECKING:
    from pedro.cluster import Cluster
    from pedro.config import Settings

app = typer.Typer(
    help="Fine-tuning jobs and sweeps: list, show, logs, stop, pause, resume, retry.", no_args_is_help=True
)


def submit(
    spec: Annotated[Path, typer.Argument(help="A YAML file: tenant, adapter, data, method, training, gate.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, for instance training.lr=1e-3")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end; exit 1 if it fails.")] = False,
    together: Annotated[
        list[Path] | None,
        typer.Option(help="Another spec, queued at the same moment; a tenant's share one worker (resources.share)."),
    ] = None,
    priority: Annotated[
        int, typer.Option(help="Waiting jobs with a higher priority start first.", min=-100, max=100)
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; show parameters, memory, steps and time.")
    ] = False,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="In a dry run: load the backbone and time a few steps (about a minute), or assume a speed.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Queue a job: train an adapter, evaluate it, register it, and make it champion if it passes its gate.

    It starts once the cluster has the resources its workers need, and is restarted if its driver is lost.

    Examples: `pedro submit jobs/configs/finetune.yaml --dry-run`,
    `pedro submit jobs/configs/finetune.yaml training.max_steps=300 --wait`,
    `pedro submit voice.yaml --together triage.yaml --together titles.yaml`
    """
    from pedro.config import Settings
    from pedro.errors import ConfigError
    from pedro.training.spec import load_finetune_spec

    overrides = [*(overrides or []), *(["resources.share=true"] if together else [])]
    wanted, *others = [load_finetune_spec(path, overrides) for path in (spec, *(together or []))]
    settings = Settings.from_env()
    if dry_run:
        if others:
            raise ConfigError("--together: a dry run is of one spec; leave it out", param="--together")
        from pedro.backbone import quiet
        from pedro.training.estimate import dry_run as estimate
        from pedro.training.parent import with_pinned_parent
        from pedro.training.uploaded_files import with_uploaded_files

        quiet()
        report = estimate(with_uploaded_files(with_pinned_parent(wanted, settings), settings), calibrated)
        emit(report.to_dict(), as_json, lambda: typer.echo(str(report)))
        return
    from pedro.cluster import connect
    from pedro.store import Store
    from pedro.training import submit as training
    from pedro.training.queue.launcher import check_fits

    store = Store(settings.database_url)
    if settings.launcher == "ray" and connect(settings, log).local:
        check_fits(wanted, settings)
    if others:
        _follow_all(training.submit_all([wanted, *others], settings, store, priority=priority), wait, as_json)
        return
    job_id = training.submit(wanted, settings, store, priority=priority)
    if not wait:
        emit(
            {"job_id": job_id, "model": wanted.name},
            as_json,
            lambda: typer.echo(f"{job_id}\nfollow it:  pedro jobs logs {job_id} --follow"),
        )
        return
    log(f"job {job_id} trains {wanted.name}")
    try:
        result = training.wait(job_id, settings, store, log)
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
                    accuracy(metrics),
                    accuracy(metrics, "backbone_"),
                    percent(metrics.get("majority_accuracy")),
                    f"{result.trainable_parameters:,}",
                    result.steps,
                    result.seconds,
                ]
            ],
        )
        typer.echo(f"gate: {result.gate}")

    emit(result.to_dict(), as_json, show)


def _follow_all(job_ids: list[str], wait: bool, as_json: bool) -> None:
    """Tell the ids of jobs that were queued together; with `wait`, follow them to their ends, one after the other."""
    from pedro.config import Settings
    from pedro.errors import PedroError
    from pedro.store import Store
    from pedro.training import submit as training

    settings = Settings.from_env()
    store = Store(settings.database_url)
    names = {job_id: store.get_job(job_id).name for job_id in job_ids}
    if not wait:
        rows = [{"job_id": job_id, "model": name} for job_id, name in names.items()]
        emit(rows, as_json, lambda: typer.echo("\n".join(job_ids)))
        return
    results, failed = [], False
    for job_id, name in names.items():
        log(f"job {job_id} trains {name}")
        try:
            results.append(training.wait(job_id, settings, store, log))
        except PedroError as error:
            log(f"{name}: {error.message}")
            failed = True
    told = [[result.model, result.alias, result.gate] for result in results]
    emit([result.to_dict() for result in results], as_json, lambda: table(["model", "alias", "gate"], told))
    if failed:
        raise typer.Exit(1)


app.command("list")(standing_jobs.list_jobs)
app.command()(standing_jobs.show)


@app.command()
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Include Ray's own lines.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a job's log: progress, loss, speed, time left, errors; also after its cluster is gone."""
    from pedro.cluster import connect, find_head
    from pedro.config import Settings
    from pedro.errors import NotFoundError
    from pedro.store import Store
    from pedro.training import ray_jobs
    from pedro.training import submit as training
    from pedro.training.job_log import kept_log

    settings = Settings.from_env()
    there = settings.ray_address is not None or find_head(settings) is not None
    kept, known = kept_log(settings.storage, job), None
    with suppress(NotFoundError):  # a sweep of an earlier release
        known = Store(settings.database_url).get_job(job)
    if follow and not as_json and (known or there):
        with suppress(NotFoundError):  # one of an earlier cluster has ended
            coming = (
                training.follow(job, settings, Store(settings.database_url))
                if known
                else ray_jobs.follow(job, connect(settings).dashboard_url)
            )
            for line in ray_jobs.for_people(coming):
                typer.echo(printable(line))
            return
    if kept is None or (raw and there):
        driver = (known and known.submission_id) or job
        try:
            kept = ray_jobs.logs(driver, _cluster().dashboard_url)
        except NotFoundError:
            if kept is None and known is None:
                raise
            kept = kept or (known.message if known else "")
    lines = kept.splitlines() if raw else list(ray_jobs.readable(kept.splitlines()))
    shown = lines if raw else list(ray_jobs.for_people(lines))
    emit({"job_id": job, "lines": lines}, as_json, lambda: typer.echo(printable("\n".join(shown))))


@app.command()
def stop(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job; checkpoints stay, nothing is registered. For one that has already ended, say how it ended."""
    status = stop_job(job)
    ended = f"stopped {job}" if status == "cancelled" else f"{job} was not stopped, it has {status}"
    emit({"job_id": job, "status": status}, as_json, lambda: typer.echo(ended))


app.command("cancel", help="The same as stop.")(stop)


@app.command()
def pause(job: JobId, as_json: AsJson = False) -> None:
    """Stop a job's workers until `pedro jobs resume`, which continues from the last checkpoint to the same adapter."""
    from pedro.config import Settings
    from pedro.store import JobStatus, Store
    from pedro.training import submit as training

    settings = Settings.from_env()
    status = training.stop(job, settings, Store(settings.database_url), JobStatus.PAUSED).status
    said = (
        f"paused {job}; resume with:  pedro jobs resume {job}" if status == "paused" else f"{job} has {status} already"
    )
    emit({"job_id": job, "status": status}, as_json, lambda: typer.echo(said))


@app.command()
def resume(job: JobId, as_json: AsJson = False) -> None:
    """Queue a paused job again; it resumes from its last checkpoint."""
    _go_on(job, as_json, after_failure=False)


@app.command()
def retry(job: JobId, as_json: AsJson = False) -> None:
    """Retry a job that failed or was stopped, from its last checkpoint if it has one."""
    _go_on(job, as_json, after_failure=True)


def _go_on(job: str, as_json: bool, *, after_failure: bool) -> None:
    from pedro.cluster import connect
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training import submit as training

    settings = Settings.from_env()
    connect(settings, log)
    queued = training.resume(job, settings, Store(settings.database_url), after_failure=after_failure)
    said = f"{job} is queued, attempt {queued.attempt}\nfollow it:  pedro jobs logs {job} --follow"
    emit({"job_id": job, "status": queued.status, "attempt": queued.attempt}, as_json, lambda: typer.echo(said))


def stop_job(job: str) -> str:
    """End a job or a sweep; how it ended, which may be otherwise than by this."""
    from pedro.config import Settings
    from pedro.errors import NotFoundError
    from pedro.store import Store
    from pedro.training import ray_jobs
    from pedro.training import submit as training

    settings = Settings.from_env()
    store = Store(settings.database_url)
    try:
        known = store.get_job(job)
    except NotFoundError:  # a sweep of an earlier release
        return ray_jobs.stop(job, _cluster().dashboard_url)
    return known.status if known.status.final else training.stop(job, settings, store).status


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


def running_jobs(settings: Settings) -> list[tuple[str, str]]:
    """(id, model) of every job and sweep that would end with this home's own cluster."""
    from pedro.cluster import connect, find_head, within
    from pedro.errors import UnavailableError
    from pedro.training import ray_jobs
    from pedro.training.job_status import RAY_OPEN

    if settings.ray_address is not None or find_head(settings) is None:
        return []
    try:
        jobs = within(20, lambda: ray_jobs.jobs(connect(settings).dashboard_url))
    except (UnavailableError, OSError, RuntimeError) as error:  # a broken head must be ended all the same
        log(f"which jobs run cannot be told: {error}")
        return []
    running = [job for job in jobs if job["status"] in RAY_OPEN]
    alone = [
        (job["metadata"].get("job") or job["id"], job["metadata"].get("model") or _model(job["metadata"]))
        for job in running
        if "jobs" not in job["metadata"]
    ]
    together = [job_id for job in running for job_id in job["metadata"].get("jobs", "").split()]
    return [*alone, *((job_id, "beside others") for job_id in together)]


def stop_jobs(job_ids: list[str]) -> None:
    """Stop jobs one by one, so that each enters how it ended; a driver that does not answer is told of and left."""
    from pedro.cluster import within
    from pedro.errors import PedroError

    for job_id in job_ids:
        try:
            within(30, partial(stop_job, job_id))
        except (PedroError, OSError, RuntimeError) as error:
            log(f"{job_id} could not be stopped first: {error}")


def end_driver(settings: Settings, ray_id: str) -> None:
    """Stop the driver of a job or a sweep and return once it has ended. Raises UnavailableError where it has not."""
    from pedro.cluster import connect
    from pedro.errors import UnavailableError
    from pedro.training import ray_jobs
    from pedro.training.job_status import RAY_OPEN

    url = connect(settings).dashboard_url
    ray_jobs.stop(ray_id, url)
    if ray_jobs.status(ray_id, url) in RAY_OPEN:
        raise UnavailableError(f"{ray_id} has not ended; run the same command again")


def _model(metadata: dict[str, str]) -> str:
    return f"{metadata.get('tenant', '?')}.{metadata.get('adapter', '?')}"
