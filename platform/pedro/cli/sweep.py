"""`pedro sweep`: many fine-tuning jobs over a space of settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, percent, table

if TYPE_CHECKING:
    from pedro.training.sweep.spec import SweepSpec


def sweep(
    spec: Annotated[Path, typer.Argument(help="A YAML file: name, base (a spec as for `pedro submit`), space.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, for instance base.training.max_steps=100")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the sweep to its end; exit 1 if it fails.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; check everything and show the trials and their cost.")
    ] = False,
    priority: Annotated[
        int, typer.Option(help="Waiting jobs with a higher priority start first.", min=-100, max=100)
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the last sweep of this spec; finished trials are not run again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Queue a sweep: try a space of settings with Ray Tune and register the best trial as a new version.

    It starts once the cluster has room for at least one trial; `pedro jobs` lists, pauses and stops it. Trials are
    compared by validation loss, and ASHA stops the worse ones early.

    Examples: `pedro sweep jobs/configs/nano_sweep_r.yaml --wait`,
    `pedro sweep jobs/configs/nano_sweep_r.yaml base.training.max_steps=100 --dry-run`
    """
    from pedro.config import Settings
    from pedro.training.sweep.spec import load_sweep_spec
    from pedro.training.sweep.variants import check_sweep

    if resume and dry_run:
        raise typer.BadParameter("--dry-run starts nothing, so there is nothing to --resume; give one of them")
    wanted = load_sweep_spec(spec, overrides or [])
    check_sweep(wanted)
    if dry_run:
        _dry_run(wanted, as_json)
        return
    from pedro.cluster import connect
    from pedro.store import Store
    from pedro.training.queue.launcher import check_fits
    from pedro.training.submit import until_end
    from pedro.training.sweep import launch

    settings = Settings.from_env()
    store = Store(settings.database_url)
    if settings.launcher == "ray" and connect(settings, log).local:
        check_fits(wanted.base, settings)
    queue = launch.resume if resume else launch.submit
    sweep_id = queue(wanted, settings, store, priority=priority)
    if not wait:
        follow = f"follow it:  pedro jobs logs {sweep_id} --follow"
        emit(
            {"sweep": sweep_id, "job_id": sweep_id, "model": wanted.base.name},
            as_json,
            lambda: typer.echo(f"{sweep_id}\n{follow}"),
        )
        return
    log(f"{sweep_id} {'resumes' if resume else 'sweeps'} {wanted.base.name}")
    try:
        result = launch.result_of(until_end(sweep_id, settings, store, log), settings)
    except KeyboardInterrupt:
        log(f"the sweep keeps running; `pedro jobs stop {sweep_id}` ends it")
        raise
    emit(result, as_json, lambda: _show(result, list(wanted.space)))


def _show(result: dict[str, Any], keys: list[str]) -> None:
    table(
        ["trial", "state", *keys, "parameters", "dev loss", "accuracy", "steps", "seconds", "message"],
        [
            [
                f"{row['trial']} *" if row["trial"] == result["best"]["trial"] else row["trial"],
                row["state"],
                *(row[key] for key in keys),
                f"{row['trainable_parameters']:,}" if row["trainable_parameters"] else "-",
                "-" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
                percent(row["accuracy"]),
                row["steps"],
                row["seconds"],
                row["message"],
            ]
            for row in result["trials"]
        ],
    )
    typer.echo(f"best: trial {result['best']['trial']} is {result['model']}, {result['alias']}")
    typer.echo(f"gate: {result['gate']}")
    typer.echo(f"table and figure: {result['directory']}")


def _dry_run(wanted: SweepSpec, as_json: bool) -> None:
    """Show what would be tried, and what the first trial costs."""
    from pedro.backbone import quiet
    from pedro.config import Settings
    from pedro.training.estimate import dry_run
    from pedro.training.parent import with_pinned_parent
    from pedro.training.sweep.planner import make_planner
    from pedro.training.sweep.variants import planned_trials, variant

    quiet()
    planned = planned_trials(wanted)
    planner = make_planner(wanted, [])
    first = planned[0] if planned else planner.propose(0)
    report = dry_run(with_pinned_parent(variant(wanted, first), Settings.from_env()))
    seconds = report.seconds * planner.total
    shown: dict[str, Any] = {
        "spec": wanted.to_dict(),
        "trials": planned,
        "count": planner.total,
        "first": report.to_dict(),
        "seconds": seconds,
    }

    def show() -> None:
        typer.echo(f"sweep {wanted.name}: {planner.total} trials by {wanted.search.algorithm}, {wanted.scheduler.name}")
        if planned:
            table(["trial", *wanted.space], [[n, *each.values()] for n, each in enumerate(planned)])
        else:
            table(["key", "kind", "values"], [[k, d.kind, list(d.values)] for k, d in wanted.space.items()])
        typer.echo(f"the first trial:\n{report}")
        typer.echo(f"all of them: at most {seconds / 60:,.1f} min of training, one after the other; less where stopped")

    emit(shown, as_json, show)
