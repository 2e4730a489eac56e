"""`pedro backbones`: the language models that specs and the server can name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, table

app = typer.Typer(
    help="Backbones, the language models that adapters are trained on: list, show, pull, add, remove.",
    no_args_is_help=True,
)
NewName = Annotated[str | None, typer.Option("--name", help="What to call it: a-z, 0-9, '_' and '-'.")]


@app.command("list")
def list_backbones(as_json: AsJson = False) -> None:
    """List the backbones that are packaged or in PEDRO_HOME, and those that can be pulled by name."""
    from pedro.backbone import EMBEDDED, embedded_backbones, kept_backbones
    from pedro.backbones.recipes import RECIPES
    from pedro.config import Settings, backbones_folder

    kept = backbones_folder(Settings.from_env().home)
    rows = [_row(name, "packaged", EMBEDDED / name) for name in embedded_backbones()]
    rows += [_row(name, "here", kept / name) for name in kept_backbones()]
    there = {row["name"] for row in rows}
    rows += [
        {
            "name": recipe.name,
            "state": "can be pulled",
            "architecture": recipe.architecture,
            "parameters": recipe.parameters,
            "bytes": 2 * recipe.parameters,
            "context": None,
            "licence": recipe.licence,
            "source": recipe.title,
        }
        for recipe in RECIPES.values()
        if recipe.name not in there
    ]

    def show() -> None:
        table(
            ["name", "state", "architecture", "parameters", "MB", "context", "licence", "source"],
            [
                [
                    row["name"],
                    row["state"],
                    row["architecture"],
                    f"{row['parameters']:,}",
                    f"{row['bytes'] / 1e6:,.1f}",
                    f"{row['context']:,}" if row["context"] else "-",
                    row["licence"] or "-",
                    row["source"],
                ]
                for row in rows
            ],
            whole=2,
        )

    emit(rows, as_json, show)


@app.command("show")
def show_backbone(
    name: Annotated[str, typer.Argument(help="A name of `pedro backbones list`, a directory, or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Show a backbone: sizes, context, memory to train and serve, chat template, kernel, the adapters made for it."""
    from pedro.backbone import quiet
    from pedro.cli.backbone_report import make_report
    from pedro.config import Settings

    quiet()
    report = make_report(name, Settings.from_env())
    emit(report.to_dict(), as_json, lambda: typer.echo(str(report)))


@app.command()
def pull(
    what: Annotated[str, typer.Argument(help="smollm2-135m, or a hub id (owner/name).", metavar="NAME")],
    name: NewName = None,
    revision: Annotated[str | None, typer.Option(help="For a hub id: a branch, tag or commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a backbone into PEDRO_HOME, if it is not there yet; resumes an interrupted download.

    Example: `pedro backbones pull smollm2-135m`, then `pedro serve --backbone smollm2-135m`
    """
    from pedro.backbone import quiet
    from pedro.backbones.pull import pull as pull_backbone
    from pedro.config import Settings

    quiet()
    _told(pull_backbone(Settings.from_env().home, what, log, name, revision), as_json)


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="A transformers directory, or a GGUF file.")],
    name: NewName = None,
    licence: Annotated[str | None, typer.Option(help="Its licence, shown with it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a model into PEDRO_HOME: a directory as it is, a GGUF file as bfloat16 weights."""
    from pedro.backbone import quiet
    from pedro.backbones.pull import add as add_backbone
    from pedro.config import Settings

    quiet()
    _told(add_backbone(Settings.from_env().home, path, log, name, licence), as_json)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="A backbone that PEDRO_HOME keeps.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a backbone from PEDRO_HOME, after naming the server and adapters that need it, and asking."""
    from pedro.backbones.kept import check_removable, remove_kept
    from pedro.backbones.sharing import withdraw_backbone
    from pedro.cli.output import confirm
    from pedro.config import Settings

    settings = Settings.from_env()
    directory = check_removable(settings.home, name)
    for line in _needed_by(settings, name):
        log(line)
    size = sum(path.stat().st_size for path in directory.iterdir())
    confirm(f"Remove {name} ({size / 1e6:,.1f} MB)?", yes, as_json)
    remove_kept(settings.home, name, log)
    withdraw_backbone(settings, name)
    emit({"removed": name}, as_json, lambda: typer.echo(f"removed {name}"))


def _needed_by(settings: Any, name: str) -> list[str]:
    """Who would miss the backbone, a line each."""
    from pedro.backbone import resolve_backbone
    from pedro.cli.backbone_report import adapters_of
    from pedro.errors import PedroError
    from pedro.serving.deploy import find

    lines = []
    served = find(settings)
    if served is not None and served.backbone == name:
        lines.append(
            f"{name} is served at {served.url}; a replica that restarts would not find it (`pedro down` ends it)"
        )
    try:
        adapters = adapters_of(settings, resolve_backbone(name).digest)
    except PedroError as error:
        lines.append(f"which adapters were made for it cannot be said: {error.message}")
        adapters = []
    if adapters:
        lines.append(f"{len(adapters)} registered adapters were made for it and need it: {', '.join(adapters)}")
    return lines


def _row(name: str, state: str, directory: Path) -> dict[str, Any]:
    from pedro.backbones.facts import read_facts
    from pedro.backbones.kept import read_origin
    from pedro.errors import BackboneError

    origin = read_origin(directory)
    row: dict[str, Any] = {"name": name, "state": state, "architecture": "?", "parameters": 0, "bytes": 0}
    row |= {"context": None, "licence": origin.licence if origin else None, "source": "with pedro"}
    if origin is not None:
        row["source"] = f"{origin.kind} {origin.source}"
    try:
        facts = asdict(read_facts(directory))
    except (BackboneError, OSError) as error:
        return {**row, "state": "damaged", "source": str(error)}
    return {**row, **{key: facts[key] for key in ("architecture", "parameters", "bytes", "context")}}


def _told(kept: Any, as_json: bool) -> None:
    from pedro.backbone import resolve_backbone
    from pedro.backbones.kept import read_origin

    found = resolve_backbone(kept.name)
    origin = read_origin(kept.directory)
    result = {
        "name": kept.name,
        "made": kept.made,
        "directory": str(kept.directory),
        "digest": found.digest,
        "origin": asdict(origin) if origin else None,
    }
    text = f"{kept.name} is in {kept.directory}" if kept.made else f"{kept.name} is here already; nothing to do"
    emit(result, as_json, lambda: typer.echo(text))
