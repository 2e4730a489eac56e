"""The adapters in the registry: a searchable catalog, one adapter's versions, one version's lineage.

Read-only: aliases move through the gateway. What cannot be read is returned as a message, and reading never creates a
store.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pedro.config import without_password
from pedro.refs import ModelRef, tenant_of
from pedro.registry import CANDIDATE, CHAMPION, MANIFEST, PREVIOUS, Registry, Version
from sources.stores import ask_registry
from sources.view import seen, sees, tenant_seen, without_places

if TYPE_CHECKING:
    from pedro.config import Settings

PAGE = 25
STATES = ("All", "In service", "With a candidate", "Without a champion")


@dataclass(frozen=True)
class CatalogRow:
    """One adapter in the catalog: the version numbers of its aliases, None where it has none."""

    name: str
    champion: int | None
    candidate: int | None
    previous: int | None
    created: str

    @property
    def tenant(self) -> str:
        return tenant_of(self.name)


@dataclass(frozen=True)
class Catalog:
    """Every adapter by name, or the reason why the registry cannot be read."""

    source: str
    rows: tuple[CatalogRow, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Versions:
    """The versions of one adapter, newest first."""

    versions: tuple[Version, ...] = ()
    problem: str = ""

    def holding(self, alias: str) -> Version | None:
        """The version that has the alias."""
        return next((version for version in self.versions if alias in version.aliases), None)


@dataclass(frozen=True)
class Stored:
    """A version's files on this host and its manifest."""

    directory: Path | None = None
    manifest: Mapping[str, Any] | None = None
    problem: str = ""


def read_catalog(settings: Settings) -> Catalog:
    """One query, however many adapters there are."""

    def read(registry: Registry) -> tuple[CatalogRow, ...]:
        return tuple(
            CatalogRow(
                name=name,
                champion=entry.aliases.get(CHAMPION),
                candidate=entry.aliases.get(CANDIDATE),
                previous=entry.aliases.get(PREVIOUS),
                created=datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="seconds"),
            )
            for name, entry in sorted(seen(settings, registry.catalog()).items())
        )

    rows, problem = ask_registry(settings, read, ())
    tenant = tenant_seen(settings)
    return Catalog(f"of {tenant}" if tenant else without_password(settings.tracking_uri), rows, problem)


def read_versions(settings: Settings, name: str) -> Versions:
    if not sees(settings, name):
        return Versions()
    versions, problem = ask_registry(settings, lambda registry: tuple(reversed(registry.versions(name))), ())
    return Versions(tuple(_shown(settings, version) for version in versions), problem)


def read_stored(settings: Settings, version: Version) -> Stored:
    """The version's files, fetched into the cache if they are not there, and what its manifest says."""
    if not sees(settings, version.name):
        return Stored(problem="there is no such version")

    def read(registry: Registry) -> Stored:
        directory = registry.download(version)
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"{MANIFEST} holds no object")
        return Stored(directory, without_places(settings, manifest))

    stored, problem = ask_registry(settings, read, None)
    return stored or Stored(problem=problem or "there is no registry")


def search(
    rows: Iterable[CatalogRow], text: str = "", tenants: Sequence[str] = (), state: str = STATES[0]
) -> list[CatalogRow]:
    """Those whose name holds every term of `text`, of these tenants (all, if none is named), in this state."""
    terms = text.lower().split()
    kept: dict[str, Callable[[CatalogRow], bool]] = {
        "In service": lambda row: row.champion is not None,
        "With a candidate": lambda row: row.candidate is not None,
        "Without a champion": lambda row: row.champion is None,
    }
    fits = kept.get(state)
    return [
        row
        for row in rows
        if all(term in row.name for term in terms)
        and (not tenants or row.tenant in tenants)
        and (fits is None or fits(row))
    ]


def pages_of(rows: Sequence[CatalogRow], size: int = PAGE) -> int:
    return max(1, math.ceil(len(rows) / size))


def page_rows(rows: Sequence[CatalogRow], number: int, size: int = PAGE) -> list[dict[str, Any]]:
    """The table's rows of one page, counted from 1; a page that is not there is the last one."""
    number = min(max(1, number), pages_of(rows, size))
    return [
        {
            "tenant": row.tenant,
            "adapter": ModelRef.parse(row.name).adapter,
            "champion": row.champion,
            "candidate": row.candidate,
            "previous": row.previous,
            "created": row.created,
        }
        for row in rows[(number - 1) * size : number * size]
    ]


def version_rows(versions: Iterable[Version]) -> list[dict[str, Any]]:
    """The table of one adapter's versions."""
    return [
        {
            "version": version.version,
            "aliases": list(version.aliases),
            "gate": gate_of(version)[0],
            "method": version.method,
            "accuracy": number_of(version.metrics, "accuracy"),
            "backbone_accuracy": number_of(version.metrics, "backbone_accuracy"),
            "preference_accuracy": number_of(version.metrics, "preference_accuracy"),
            "loss": number_of(version.metrics, "loss"),
            "parameters": version.trainable_parameters,
            "digest": short(version.digest),
            "created": version.created,
        }
        for version in versions
    ]


def gate_of(version: Version) -> tuple[str, str]:
    """What the gate decided, in a word, and why."""
    verdict, colon, reason = version.gate.partition(":")
    if not colon or verdict not in ("passed", "refused", "imported"):
        return "not gated", version.gate or "no gate judged this version"
    return verdict, reason.strip()


def lineage(version: Version, manifest: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Where a version comes from, as label and value; what is not recorded is left out."""
    recorded = manifest or {}
    backbone, sweep, format_ = (_dict(recorded.get(key)) for key in ("backbone", "sweep", "prompt_format"))
    data = _dict(_dict(recorded.get("spec") or version.spec).get("data"))
    facts = [
        ("Weights", version.digest),
        ("Method", " ".join([version.method, _options(_dict(_dict(recorded.get("method")).get("options")))]).strip()),
        ("Run", version.run_id),
        ("Sweep", " · ".join(str(sweep[key]) for key in ("name", "id") if sweep.get(key))),
        ("Trial", _trial(sweep)),
        ("Data", str(recorded.get("data_digest") or "")),
        ("Training file", str(data.get("train") or "").rpartition("/")[2]),
        ("Backbone", version.backbone_id),
        ("Backbone digest", version.backbone_digest),
        ("Tokenizer digest", str(backbone.get("tokenizer_digest") or "")),
        ("Prompt format", str(format_.get("id") or "")),
        ("Made", str(recorded.get("created") or version.created)),
        ("Champion since", version.promoted if CHAMPION in version.aliases else ""),
        ("With", ", ".join(f"{name} {made}" for name, made in sorted(_dict(recorded.get("versions")).items()))),
    ]
    return [(label, value) for label, value in facts if value]


def spec_text(version: Version, manifest: Mapping[str, Any] | None) -> str:
    """The specification that made the version, as YAML; empty where none is recorded."""
    spec = _dict(_dict(manifest).get("spec")) or _dict(version.spec)
    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True) if spec else ""


def metric_rows(version: Version) -> list[dict[str, Any]]:
    """What the job measured on the rows that it names."""
    return [
        {"metric": name, "value": value if isinstance(value, str) else f"{value:,.4g}"}
        for name, value in sorted(_dict(version.metrics).items())
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    ]


def number_of(metrics: Any, name: str) -> float | None:
    """A metric that is a number."""
    value = _dict(metrics).get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def short(digest: str) -> str:
    """Enough of a digest to tell it from others."""
    return digest.removeprefix("sha256:")[:12]


def _shown(settings: Settings, version: Version) -> Version:
    backbone, gate = (without_places(settings, text) for text in (version.backbone_id, version.gate))
    return replace(version, backbone_id=backbone, gate=gate, spec=without_places(settings, version.spec))


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def _trial(sweep: Mapping[str, Any]) -> str:
    if "trial" not in sweep:
        return ""
    chosen = ", ".join(f"{key} = {value}" for key, value in _dict(sweep.get("parameters")).items())
    return f"{sweep['trial']}: {chosen}" if chosen else str(sweep["trial"])


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
