"""`pedro gc`: removes what a home no longer needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pedro.cli.output import AsJson, emit, log, table

if TYPE_CHECKING:
    from pedro.retention.collector import Collected


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")] = False,
    older_than: Annotated[
        str | None,
        typer.Option(help="30d, 12h or 90m: applies to caches, checkpoints, data sets and unregistered adapters."),
    ] = None,
    keep_versions: Annotated[
        int | None,
        typer.Option(help="Keep only the newest N versions of each adapter, and those with an alias [all].", min=1),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List everything that is removed or kept, and why.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is no longer needed: old caches, checkpoints of ended jobs, unreferenced data, expired files.

    How long things are kept is set by PEDRO_KEEP_… (docs/operations.md). A version behind an alias, one that was
    champion within 90 days, the files of a job that runs, data that a kept job or version names, and whatever was
    written within the last hour always stay. May run beside servers and jobs; killed, the next one goes on.

    Examples: `pedro gc --dry-run`; `pedro gc --older-than 7d --keep-versions 5`; `pedro gc --dry-run --verbose`
    """
    from dataclasses import replace

    from pedro.cli.standing_jobs import ask_cluster
    from pedro.config import Settings
    from pedro.registry import Registry
    from pedro.retention.collector import collect
    from pedro.retention.policy import Retention, parse_age

    settings, policy = Settings.from_env(), Retention.from_env()
    if older_than is not None:
        policy = policy.older_than(parse_age(older_than))
    if keep_versions is not None:
        policy = replace(policy, versions=keep_versions)
    cluster = ask_cluster(settings)
    if cluster.problem:
        log(f"what belongs to jobs that may run stays: {cluster.problem}")
    done = collect(settings, Registry.open(settings), policy, cluster, dry_run=dry_run, log=log)
    emit(done.to_dict(verbose), as_json, lambda: _show(done, verbose))
    for problem in done.problems:
        log(f"left as it is: {problem}")
    if done.problems:
        raise typer.Exit(1)


def size(count: int) -> str:
    """`12.3 MB`."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:.1f} {unit}"
    return f"{count} bytes"


def _show(done: Collected, verbose: bool) -> None:
    if verbose:
        table(
            ["kind", "what", "size", "", "why"],
            [
                [one.kind, one.name, size(one.bytes), "goes" if went else "stays", one.reason]
                for one, went in done.findings
            ],
            whole=1,
        )
    rows = [
        [kind, total.removed, size(total.bytes), total.kept]
        for kind, total in done.kinds.items()
        if total.removed or total.kept
    ]
    table(["kind", "would go" if done.dry_run else "removed", "size", "kept"], rows, empty="nothing is kept here yet")
    total = sum(one.bytes for one in done.kinds.values())
    typer.echo(f"{'would free' if done.dry_run else 'freed'} {size(total)}")
