"""Adapter versions and their learning curves, read from the registry. Knows nothing of Streamlit.

A registry that does not answer comes back as a reason in words. Looking never creates a store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedro.config import Settings
from pedro.errors import PedroError
from pedro.registry import CHAMPION, Registry, Version

CURVES = {
    "dev/loss": "Validation loss",
    "train/loss": "Training loss",
    "train/theta_loss": "Loss of the Θ steps",
    "train/tokens_per_second": "Tokens per second",
}
"""The curves that training logs, in the order in which they tell most."""


@dataclass(frozen=True)
class Adapters:
    """Every version in the registry, or the reason why the registry cannot be read."""

    source: str
    versions: tuple[Version, ...] = ()
    problem: str | None = None


def read_adapters(settings: Settings) -> Adapters:
    """All versions of all adapters, newest first within each. Looking never creates a store."""
    source = settings.tracking_uri
    if source.startswith("sqlite:///") and not Path(source.removeprefix("sqlite:///")).is_file():
        return Adapters(source)
    registry = Registry.open(settings)
    try:
        found = [version for name in registry.models() for version in reversed(registry.versions(name))]
    except PedroError as error:
        return Adapters(source, problem=error.message)
    return Adapters(source, versions=tuple(found))


def adapter_rows(versions: Iterable[Version]) -> list[dict[str, Any]]:
    """The adapters table: one row a version, with what identifies it and what its job measured."""
    return [
        {
            "tenant": version.tenant,
            "adapter": version.adapter,
            "version": version.version,
            "aliases": list(version.aliases),
            "method": version.method,
            "digest": version.digest.removeprefix("sha256:")[:12],
            "parameters": version.trainable_parameters,
            "accuracy": _number(version.metrics.get("accuracy")),
            "backbone": version.backbone_id,
            "created": version.created,
        }
        for version in versions
    ]


def curves_of(settings: Settings, versions: Iterable[Version]) -> list[dict[str, Any]]:
    """The learning curves of the versions' runs, as one row a point; a run that is gone has no points."""
    registry = Registry.open(settings)
    return [
        {"adapter": version.ref, "metric": metric, "step": step, "value": value}
        for version in versions
        for metric in CURVES
        for step, value in registry.history(version.run_id, metric)
    ]


def newest_and_champions(versions: Iterable[Version]) -> list[Version]:
    """What is worth a curve by default: of each adapter its champion and its newest version."""
    kept, seen = [], set()
    for version in versions:
        if version.name not in seen or CHAMPION in version.aliases:
            kept.append(version)
        seen.add(version.name)
    return kept


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
