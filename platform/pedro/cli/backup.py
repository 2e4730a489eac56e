"""`pedro backup` and `pedro restore`: a whole home as one file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log

SHOWN = 10  # of what is missing


def backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, a new file (.tar.gz).")],
    without_backbones: Annotated[
        bool, typer.Option("--without-backbones", help="Leave out language models that can be downloaded again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Back up keys, jobs, adapters with their aliases and history, MLflow's runs, data files and backbones as one file.

    Servers and jobs may run meanwhile: the file holds the database as of one moment, and every file that it names.
    What lies in MLflow's server or in a bucket is not in it, and is told; back those up afterwards by their own tools.
    No secret of a key is in it, only digests, and only its owner may read it. Nothing is left of one that fails.
    `pedro restore FILE --dry-run` says whether a file is whole.

    Example: `pedro backup /backups/pedro-$(date +%F).tar.gz`
    """
    from pedro.backup import make_backup
    from pedro.config import Settings

    made = make_backup(Settings.from_env(), file, log, with_backbones=not without_backbones)

    def show() -> None:
        typer.echo(f"{made.file}: {made.bytes / 1e6:,.1f} MB, sha256:{made.sha256}")
        typer.echo(_held(sum(made.rows.values()), made.files))
        if made.registry != "sqlite":
            typer.echo(
                f"not in it: runs and artifacts of MLflow at {made.registry}; back up its database and artifacts"
            )
        if made.storage != "folder":
            typer.echo(f"not in it: {made.storage}; have it keep versions, or copy it")
        _warn("versions whose files are not what was registered, or are gone", made.missing)
        _warn("files left out, links or of a name that no archive may have", made.left_out)

    emit(asdict(made), as_json, show)


def restore(
    file: Annotated[Path, typer.Argument(help="An archive that `pedro backup` wrote.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only read it through and say whether it is complete; write nothing.")
    ] = False,
    sha256: Annotated[
        str | None, typer.Option(help="The digest that `pedro backup` printed; any other file is refused.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into an empty PEDRO_HOME (and PEDRO_DATABASE_URL): all of it, or nothing.

    Everything is verified before anything can be seen. An older release's backup is upgraded, a newer one's refused.
    Keys are valid again as they were; jobs that had not ended start again with a controller, so end the home of before.
    A backup of sqlite may go to PostgreSQL.

    Example: `PEDRO_HOME=/srv/pedro pedro restore /backups/pedro-2026-11-29.tar.gz`
    """
    from pedro.backup import restore_backup
    from pedro.config import Settings
    from pedro.errors import ConflictError
    from pedro.serving.deploy import find

    settings = Settings.from_env()
    if not dry_run and (served := find(settings)):
        raise ConflictError(f"PEDRO_HOME: its server runs at {served.url}; `pedro down` ends it", param="PEDRO_HOME")
    restored = restore_backup(settings, file, log, dry_run=dry_run, sha256=sha256)

    def show() -> None:
        where = "is whole" if dry_run else f"restored to {settings.home}"
        typer.echo(f"{restored.file}, made {restored.created} by pedro {restored.release}: {where}")
        typer.echo(_held(sum(restored.rows.values()), restored.files))
        for name, origin in restored.lacking.items():
            typer.echo(f"not in it: the backbone {name}; {_again(name, origin)}")
        for place in restored.unseen:
            typer.echo(f"not in it: what {place} holds")

    emit(asdict(restored), as_json, show)


def _held(rows: int, files: dict[str, int]) -> str:
    parts = [f"{count:,} files of {part}" for part, count in files.items()]
    return ", ".join([*([f"{rows:,} rows of the database"] if rows else []), *parts])


def _again(name: str, origin: dict[str, Any] | None) -> str:
    """How a backbone comes back."""
    if origin is None:
        return "add it again with `pedro backbones add`"
    if origin["kind"] in ("recipe", "hub"):
        return f"`pedro backbones pull {origin['source']} --name {name}`"
    return f"`pedro backbones add {origin['source']} --name {name}`"


def _warn(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        log(f"warning: {what}: {', '.join(names[:SHOWN])}{more}")
