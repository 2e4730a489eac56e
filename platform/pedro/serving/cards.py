"""An adapter as operators see it: versions with faults, aliases, canary and shadow. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pedro.gateway.backend import AdapterCard, VersionCard
from pedro.store import ShadowCounts

if TYPE_CHECKING:
    from pedro.refs import ModelRef
    from pedro.registry import Version
    from pedro.store import RegisteredAdapter


def adapter_card(
    name: str,
    versions: Sequence[Version],
    adapter: RegisteredAdapter | None,
    reason: Callable[[ModelRef], str | None],
    counted: ShadowCounts | None,
) -> AdapterCard:
    """Versions newest first; `reason` says why one cannot be served, `counted` are the shadow's counts."""
    splits: dict[str, Any] = {} if adapter is None else adapter.standing.to_dict()
    shadow = splits.get("shadow")
    return AdapterCard(
        name=name,
        canary=splits.get("canary"),
        shadow=shadow and {**shadow, **(counted or ShadowCounts()).to_dict()},
        aliases={alias: version.version for version in versions for alias in version.aliases},
        versions=tuple(
            VersionCard(
                *(v.version, v.digest, v.created, v.method, v.gate, v.aliases),
                *(reason(v.model_ref), _numbers(v.metrics), (v.spec or {}).get("parent")),
            )
            for v in reversed(versions)
        ),
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The numeric metrics; a version's record also has the name of their split."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
