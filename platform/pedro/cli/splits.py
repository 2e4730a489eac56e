"""`pedro adapters canary` and `shadow`: versions that run beside the champion; what `pedro adapters` shares."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log

if TYPE_CHECKING:
    from pedro.registry import Registry, Version

Name = Annotated[str, typer.Argument(help="tenant.adapter, also with @alias or :version", metavar="MODEL")]


def canary(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version number.")],
    weight: Annotated[float, typer.Option(help="Its share of the champion's requests; 0 ends it.")],
    as_json: AsJson = False,
) -> None:
    """Have a version answer a share of the champion's requests, until a promotion or rollback.

    Example: `pedro adapters canary acme.support 8 --weight 0.1`
    """
    registry = open_registry()
    if weight:
        check_servable_here(registry, registry.get(name, version))
    after = registry.canary(name, version, weight)
    now = f"answers {weight:.1%} of {name}" if weight else "is no longer a canary"
    emit({**asdict(after), "weight": weight}, as_json, lambda: typer.echo(f"{after.ref} {now}"))


def shadow(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version number.")],
    weight: Annotated[float, typer.Option(help="The share of the champion's requests it gets a copy of; 0 ends it.")],
    as_json: AsJson = False,
) -> None:
    """Send a version a copy of a share of the champion's requests; its answers are only compared, nobody sees them.

    `pedro adapters show` tells the counts; a promotion or a rollback ends it. It is asked after the champion has
    answered, one request at a time, and counts against no quota.

    Example: `pedro adapters shadow acme.support 7 --weight 0.1`
    """
    registry = open_registry()
    if weight:
        check_servable_here(registry, registry.get(name, version))
    after = registry.shadow(name, version, weight)
    now = f"is asked {weight:.1%} of what {name} answers" if weight else "is no longer a shadow"
    emit({**asdict(after), "weight": weight}, as_json, lambda: typer.echo(f"{after.ref} {now}"))


def told_shadow(registry: Registry, name: str) -> dict[str, Any] | None:
    """The shadow of an adapter with what was counted; None where there is none."""
    adapter = registry.store.get_adapter(name)
    split = None if adapter is None else adapter.standing.shadow
    counts = registry.store.shadow_answers(name)
    return None if split is None or counts is None else {**asdict(split), **counts.to_dict()}


def shadow_line(told: dict[str, Any]) -> str:
    """The same for people."""
    means = told["mean_seconds"], told["champion_mean_seconds"]
    times = "; {:.2f} s each, the champion {:.2f} s".format(*means) if None not in means else ""
    return (
        f"shadow: v{told['version']} ({told['weight']:.1%}): {told['same']:,} answers as the champion's, "
        f"{told['different']:,} different, {told['errors']:,} failed, {told['skipped']:,} not asked{times}"
    )


def check_servable_here(registry: Registry, wanted: Version) -> None:
    """Raise AdapterError for a version that the engine could not serve; logs where that cannot be checked here."""
    from pedro.backbone import resolve_backbone
    from pedro.errors import BackboneError
    from pedro.methods.servable import check_servable

    try:
        backbone = resolve_backbone(wanted.backbone_id)
    except BackboneError as error:
        log(f"whether {wanted.ref} can be served was not checked: {error.message}")
    else:
        check_servable(registry.download(wanted), backbone)


def open_registry() -> Registry:
    from pedro.config import Settings
    from pedro.registry import Registry

    return Registry.open(Settings.from_env())
