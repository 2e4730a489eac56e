"""What the dashboard shows, read from the registry and from the demo's result. Knows nothing of Streamlit.

Nothing here raises for what a person may find on disk: what cannot be read comes back as a reason in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Read(BaseModel):
    """A part of the result file; keys that a later release adds are none of our business."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class TenantResult(_Read):
    """One tenant's adapter as the demo measured it over HTTP; accuracies are shares of `test_rows` answered exactly."""

    tenant: str
    adapter: str
    title: str
    version: Count
    accuracy: Share
    backbone_accuracy: Share
    majority_accuracy: Share
    test_rows: Count
    trainable_parameters: Count
    rows: Count | None = None
    steps: Count | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """`tenant.adapter`."""
        return f"{self.tenant}.{self.adapter}"


class SwapResult(_Read):
    """What requests saw while an alias moved under load."""

    model: str
    old_version: Count
    new_version: Count
    requests: Count
    failed: Count
    mixed: Count
    answered_by_old: Count
    answered_by_new: Count
    in_flight: Count = 0
    seconds_to_first_new: float | None = None
    old_accuracy: Share | None = None
    new_accuracy: Share | None = None


@dataclass(frozen=True)
class Demo:
    """The demo's result. `problems` says what of the file could not be read; empty parts are simply not there."""

    path: Path
    exists: bool
    tenants: tuple[TenantResult, ...] = ()
    swap: SwapResult | None = None
    created: str = ""
    seconds: float | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapters:
    """Every version in the registry, or the reason why the registry cannot be read."""

    source: str
    versions: tuple[Version, ...] = ()
    problem: str | None = None


def read_demo(home: Path) -> Demo:
    """`<home>/demo/result.json`; a part that is broken is left out and named in `problems`."""
    path = home / "demo" / "result.json"
    if not path.is_file():
        return Demo(path, exists=False)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Demo(path, exists=True, problems=(f"not readable as JSON: {error}",))
    if not isinstance(tree, dict):
        return Demo(path, exists=True, problems=(f"expected an object, got {type(tree).__name__}",))
    problems: list[str] = []
    listed = tree.get("tenants", [])
    if not isinstance(listed, list):
        problems.append(f"tenants: expected a list, got {type(listed).__name__}")
        listed = []
    tenants = [_parse(TenantResult, item, f"tenants[{index}]", problems) for index, item in enumerate(listed)]
    swap = _parse(SwapResult, tree["swap"], "swap", problems) if tree.get("swap") else None
    seconds = tree.get("seconds")
    return Demo(
        path,
        exists=True,
        tenants=tuple(tenant for tenant in tenants if tenant is not None),
        swap=swap,
        created=str(tree.get("created") or ""),
        seconds=float(seconds) if isinstance(seconds, int | float) else None,
        problems=tuple(problems),
    )


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


def accuracy_rows(tenants: Iterable[TenantResult]) -> list[dict[str, Any]]:
    """The accuracy chart: three bars a tenant, on the same held-out rows."""
    return [
        {"adapter": tenant.name, "title": tenant.title, "rows": tenant.test_rows, "answers": answers, "accuracy": value}
        for tenant in tenants
        for answers, value in (
            ("Backbone alone", tenant.backbone_accuracy),
            ("Majority class", tenant.majority_accuracy),
            ("With adapter", tenant.accuracy),
        )
    ]


def mean_accuracy(tenants: Sequence[TenantResult]) -> tuple[float, float]:
    """Mean accuracy of the bare backbone and with the adapters, over one or more tenants."""
    backbone = sum(tenant.backbone_accuracy for tenant in tenants) / len(tenants)
    return backbone, sum(tenant.accuracy for tenant in tenants) / len(tenants)


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


Part = TypeVar("Part", bound=_Read)


def _parse(kind: type[Part], value: Any, where: str, problems: list[str]) -> Part | None:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=True):
            place = ".".join([where, *(str(part) for part in item["loc"])])
            problems.append(f"{place}: {item['msg'].replace('Input should be', 'expected')}, got {item['input']!r:.80}")
        return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
