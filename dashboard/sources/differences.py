"""What differs between two jobs, or two versions of an adapter: what was asked for, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pedro.training.job import flat
from sources.adapters import lineage
from sources.jobs import Job, result_of

if TYPE_CHECKING:
    from pedro.registry import Version
    from pedro.registry.queries import TrackedRun

OF_ONE = ("Run", "Made", "Champion since")  # of a version's lineage: never equal, and no reason for anything
NONE = "–"


@dataclass(frozen=True)
class Side:
    """One of the two: its name, what was asked for, what was measured, and its runs' ids with the names of curves."""

    name: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)


def of_job(job: Job, runs: Sequence[TrackedRun]) -> Side:
    """A job by its specification."""
    spec = flat(job.record.spec) if job.record else {}
    return Side(job.id, spec, _numbers(result_of(job).get("metrics")), {run.id: job.id for run in runs})


def of_version(version: Version, manifest: Mapping[str, Any] | None) -> Side:
    """A version by its specification and where it comes from."""
    facts = {label: value for label, value in lineage(version, manifest) if label not in OF_ONE}
    spec = (manifest or {}).get("spec") or version.spec or {}
    asked = {**facts, "Trained parameters": version.trainable_parameters, **flat(spec)}
    return Side(version.ref, asked, _numbers(version.metrics), {version.run_id: version.ref})


def parameters(one: Side, other: Side) -> list[dict[str, str]]:
    """A row for each that is not equal."""
    keys = dict.fromkeys([*one.asked, *other.asked])
    rows = [(key, _word(one.asked.get(key)), _word(other.asked.get(key))) for key in keys]
    return [{"what": key, "one": mine, "other": theirs} for key, mine, theirs in rows if mine != theirs]


def metrics(one: Side, other: Side) -> list[dict[str, Any]]:
    """A row for each that was measured of either, and how much more the first one has."""
    rows = []
    for name in dict.fromkeys([*one.measured, *other.measured]):
        mine, theirs = one.measured.get(name), other.measured.get(name)
        more = None if mine is None or theirs is None else mine - theirs
        rows.append({"metric": name.replace("_", " "), "one": mine, "other": theirs, "more": more})
    return rows


def _numbers(values: Any) -> dict[str, float]:
    held = values if isinstance(values, dict) else {}
    return {
        name: float(value)
        for name, value in held.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _word(value: Any) -> str:
    return NONE if value is None else str(value)
