"""`pedro adapters` and `pedro eval`: adapter versions in the registry, and their scores."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli import splits
from pedro.cli.output import AsJson, accuracy, emit, log, percent, table
from pedro.cli.splits import Name, check_servable_here, open_registry, shadow_line, told_shadow
from pedro.refs import ModelRef, tenant_of

if TYPE_CHECKING:
    from pedro.registry import Version

app = typer.Typer(
    help="Adapter versions: list, promote, roll back, split, delete, export, import.", no_args_is_help=True
)
Moved = Annotated[
    str | None, typer.Option("--backbone", help="Where the adapter's backbone is now, if it was renamed or moved.")
]


@app.command("list")
def list_adapters(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List the registered adapters with their champion."""
    registry = open_registry()
    rows: list[dict[str, Any]] = []
    for name, entry in sorted(registry.catalog().items()):
        if tenant is None or tenant_of(name) == tenant:
            champion = asdict(registry.get(name)) if "champion" in entry.aliases else None
            rows.append({"model": name, **entry.standing.to_dict(), "champion": champion})

    def show() -> None:
        table(
            ["model", "champion", "method", "accuracy", "aliases"],
            [
                [
                    row["model"],
                    f"v{row['champion']['version']}" if row["champion"] else "-",
                    row["champion"]["method"] if row["champion"] else "-",
                    accuracy(row["champion"]["metrics"]) if row["champion"] else "-",
                    " ".join(f"{alias}=v{version}" for alias, version in sorted(row["aliases"].items())),
                ]
                for row in rows
            ],
            empty="no adapters yet; `pedro submit SPEC.yaml` trains one",
        )

    emit(rows, as_json, show)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show every version of an adapter: digest, method, metrics, gate."""
    registry = open_registry()
    ref = ModelRef.parse(name)
    versions = registry.versions(ref.name) if ref.which is None else [registry.find(ref)]
    if not versions:
        from pedro.errors import model_not_found

        raise model_not_found(name)

    def print_versions() -> None:
        if told:
            typer.echo(shadow_line(told))
        table(
            ["version", "aliases", "method", "parameters", "accuracy", "backbone", "digest", "created", "gate"],
            [
                [
                    f"v{version.version}",
                    " ".join(version.aliases),
                    version.method,
                    f"{version.trainable_parameters:,}",
                    accuracy(version.metrics),
                    version.backbone_id,
                    version.digest[:19],
                    version.created,
                    version.gate,
                ]
                for version in versions
            ],
        )

    told = told_shadow(registry, ref.name)
    rows = [asdict(version) for version in versions]
    if told:
        rows = [{**row, **({"shadow": told} if row["version"] == told["version"] else {})} for row in rows]
    emit(rows, as_json, print_versions)


@app.command()
def promote(
    name: Name, version: Annotated[int, typer.Argument(help="The version number.")], as_json: AsJson = False
) -> None:
    """Make a version the champion; servers pick it up within 2 s. The old champion becomes `previous`.

    A version that the engine could not serve is refused.
    """
    registry = open_registry()
    check_servable_here(registry, registry.get(name, version))
    _changed(registry.promote(name, version), as_json)


@app.command()
def rollback(name: Name, as_json: AsJson = False) -> None:
    """Swap champion and previous; refused if the engine cannot serve the previous one."""
    from pedro.errors import NotFoundError

    registry = open_registry()
    expected = None
    with suppress(NotFoundError):  # the registry says what is missing
        wanted = registry.get(name, "previous")
        expected = wanted.version
        check_servable_here(registry, wanted)
    _changed(registry.rollback(name, expected=expected), as_json)


app.command("canary")(splits.canary)
app.command("shadow")(splits.shadow)


@app.command()
def history(
    name: Name,
    limit: Annotated[int, typer.Option(help="How many of the latest moves to show.", min=1)] = 100,
    as_json: AsJson = False,
) -> None:
    """Show how an adapter's aliases were moved: when, by whom, from where to where."""
    from pedro.registry import utc

    moves = open_registry().store.alias_history(name, limit)

    def show() -> None:
        table(
            ["when", "by", "move", "before", "after", "reason"],
            [[utc(m.at), m.actor, m.action, standing(m.before), standing(m.after), m.reason] for m in moves],
            empty="its aliases were never moved",
        )

    def standing(state: dict[str, Any] | None) -> str:
        if state is None:
            return "-"
        parts = [f"{alias}=v{version}" for alias, version in sorted(state["aliases"].items())]
        splits = [(what, state[what]) for what in ("canary", "shadow") if state.get(what)]
        return " ".join([*parts, *(f"{what}=v{split['version']} ({split['weight']:.1%})" for what, split in splits)])

    emit([asdict(move) for move in moves], as_json, show)


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete one version (`tenant.adapter:7`) or a whole adapter (`tenant.adapter`); first says what is served."""
    from pedro.cli.output import confirm
    from pedro.errors import model_not_found

    ref = ModelRef.parse(name)
    plain = ref.name
    registry = open_registry()
    number = None if ref.which is None else registry.find(ref).version
    what = str(ModelRef(ref.tenant, ref.adapter, version=number))
    if number is None:
        entry = registry.store.get_adapter(plain)
        if entry is None:
            raise model_not_found(plain)
        count = len(registry.versions(plain))
        what = f"{plain} with {'its only version' if count == 1 else f'all its {count} versions'}"
        if champion := entry.aliases.get("champion"):
            log(f"{plain}: version {champion} is its champion and is served; requests for it will find no model")
    confirm(f"Delete {what}?", yes, as_json)
    registry.delete(plain, number)
    emit({"deleted": name}, as_json, lambda: typer.echo(f"deleted {what}"))


@app.command("export")
def export_adapter(
    name: Name,
    directory: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    as_json: AsJson = False,
) -> None:
    """Copy a version's files out of the registry: a plain PEFT checkpoint, loadable by `PeftModel.from_pretrained`."""
    import shutil

    from pedro.errors import ConfigError

    if directory.exists():
        raise ConfigError(f"{directory} exists already; name a new directory", param="directory")
    registry = open_registry()
    version = registry.find(ModelRef.parse(name))
    shutil.copytree(registry.download(version), directory)
    emit(
        {"model": version.ref, "digest": version.digest, "directory": str(directory)},
        as_json,
        lambda: typer.echo(f"{version.ref} is in {directory}"),
    )


@app.command("import")
def import_adapter(
    name: Annotated[str, typer.Argument(help="tenant.adapter to register it as.", metavar="MODEL")],
    directory: Annotated[
        str, typer.Argument(help="An adapter directory: exported, or written by PEFT. A path, hf://owner/name, s3://…")
    ],
    backbone: Moved = None,
    form: Annotated[
        str, typer.Option("--format", help="Prompt format of one written by PEFT: raw, alpaca or chat.")
    ] = "raw",
    as_json: AsJson = False,
) -> None:
    """Register an adapter directory as a new version, a candidate until `pedro adapters promote`.

    One that PEFT wrote by itself needs --backbone; it is registered if the engine serves it on that backbone.

    Examples: `pedro adapters import acme.faq ./from-peft --backbone stories260K --format chat`;
    `pedro adapters import acme.faq hf://owner/name@revision --backbone smollm2-135m`
    """
    from contextlib import nullcontext

    from pedro.adapter_check import check_adapter
    from pedro.adapter_directory import CONFIG
    from pedro.adapter_fetch import fetched
    from pedro.errors import ConfigError
    from pedro.evaluation.saved import open_saved
    from pedro.methods.servable import check_tensor_names
    from pedro.methods.stock import is_stock, refuse_pyreft

    ref = ModelRef.parse(name)
    if str(ref) != ref.name:
        raise ConfigError(
            f"name: {name!r} names a version, and an import makes a new one; give {ref.name}", param="name"
        )
    with fetched(directory) as here:
        refuse_pyreft(here)
        with _adopted(here, backbone, form) if is_stock(here) else nullcontext(here) as whole:
            check_adapter(whole)
            open_saved(whole, backbone)
            if (whole / CONFIG).is_file():
                check_tensor_names(whole)
            registry = open_registry()
            run = registry.start_run(experiment=ref.tenant, name=f"import {name}", params={}, tags={"kind": "import"})
            version = registry.register(run, whole, ref.tenant, ref.adapter, gate="imported: not gated")
            registry.finish_run(run)
    _changed(registry.set_alias(version.name, "candidate", version.version), as_json)


def _adopted(directory: Path, name: str | None, form: str) -> AbstractContextManager[Path]:
    """A stock PEFT adapter with a manifest of this backbone and format."""
    from pedro.backbone import load_tokenizer, resolve_backbone
    from pedro.data.prompt_format import FORMAT_OF_SHAPE, format_for_shape
    from pedro.errors import ConfigError
    from pedro.methods.stock import adopted

    if name is None:
        raise ConfigError("backbone: PEFT wrote this adapter; say with --backbone what it was trained on")
    shapes = {given: shape for shape, given in reversed(FORMAT_OF_SHAPE.items())}
    if form not in shapes:
        raise ConfigError(f"format: {form!r} is none; give {', '.join(shapes)}", param="format")
    backbone = resolve_backbone(name)
    prompt_format = format_for_shape(shapes[form], load_tokenizer(backbone))
    return adopted(directory, backbone, prompt_format.to_dict(), log)


def evaluate(
    name: Annotated[str, typer.Argument(help="tenant.adapter[@alias|:version]", metavar="MODEL")],
    file: Annotated[
        Path | None, typer.Option("--data", help="A file of rows to answer, as for `pedro data check`.")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(help="Map the file's columns: prompt=question,completion=answer.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    harness: Annotated[str | None, typer.Option(help="lm-eval: run its --tasks instead of --data.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of the harness, comma-separated.")] = "",
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before each of the harness's prompts.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of further task files for the harness.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the harness's prompts into the adapter's prompt format.")
    ] = False,
    backbone: Moved = None,
    as_json: AsJson = False,
) -> None:
    """Score an adapter and its bare backbone on a file: exact-match accuracy, answers generated from the prompts alone.

    Of a file of preferences, the share of pairs whose better answer the adapter favours more than the backbone does.
    With --harness lm-eval, score any of lm-eval's tasks; then MODEL may be an adapter's directory or a backbone too.

    Examples: `pedro eval acme.support --data test.jsonl`;
    `pedro eval acme.support --harness lm-eval --tasks pedro_snips,arc_easy --rows 200`
    """
    if file is not None and harness is None:
        if tasks or shots is not None or include_path or chat:
            raise typer.BadParameter("--tasks, --shots, --include-path and --chat go with --harness lm-eval")
        _evaluate_file(name, file, fields, rows, backbone, as_json)
        return
    if backbone is not None or fields is not None:
        raise typer.BadParameter("--backbone and --fields go with --data")
    if harness is None or file is not None:
        raise typer.BadParameter("give either --data FILE or --harness lm-eval --tasks NAMES")
    from pedro.cli.harness import evaluate_by_harness

    evaluate_by_harness(name, harness, tasks, rows, shots, include_path, chat, as_json)


def _evaluate_file(
    name: str, file: Path, fields: str | None, rows: int | None, backbone: str | None, as_json: bool
) -> None:
    from pedro.data.lines import parse_fields

    named = parse_fields(fields) if fields else None
    registry = open_registry()
    version = registry.find(ModelRef.parse(name))
    log(f"scoring {version.ref} on {file}")
    from pedro.backbone import quiet
    from pedro.config import Settings
    from pedro.evaluation.saved import score_file

    quiet()
    report = score_file(registry.download(version), file, Settings.from_env().cache, rows, backbone, named)
    result = {"model": version.ref, "digest": version.digest, **report}

    def print_report() -> None:
        table(
            ["model", "rows", "accuracy", "backbone", "majority"],
            [
                [
                    version.ref,
                    result["rows"],
                    accuracy(result),
                    accuracy(result, "backbone_"),
                    percent(result.get("majority_accuracy")),
                ]
            ],
        )

    emit(result, as_json, print_report)


def _changed(version: Version, as_json: bool) -> None:
    emit(
        asdict(version),
        as_json,
        lambda: typer.echo(f"{version.ref} is now {' and '.join(version.aliases) or 'unaliased'}"),
    )
