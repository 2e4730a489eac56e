"""Finds the methods that no other beats, over any number of metrics at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from pedro.comparison.result_model import AVERAGE, RunResult, Table

if TYPE_CHECKING:
    from sources.compare import FilteredComparison


@dataclass(frozen=True)
class CostMetric:
    """Something that a method is good or bad at. `unit` is what a value is divided by before it is shown."""

    title: str
    more_is_better: bool = False
    unit: float = 1.0
    format: str = ",.0f"
    log: bool = False


METRICS = {
    "score": CostMetric("Score (%)", more_is_better=True, unit=0.01, format=".1f"),
    "parameters": CostMetric("Trained parameters", log=True),
    "tokens_per_second": CostMetric("Tokens per second in training", more_is_better=True),
    "answer_tokens_per_second": CostMetric("Answer tokens per second in training", more_is_better=True),
    "peak_memory": CostMetric("Peak memory (MiB)", unit=2**20),
    "seconds": CostMetric("Training time (s)", format=",.1f"),
    "adapter_bytes": CostMetric("Adapter (kB)", unit=1000.0, format=",.1f", log=True),
}


@dataclass(frozen=True)
class Point:
    """A method on a backbone at a budget; a value that was not measured is not there."""

    label: str
    backbone: str
    budget: int | None
    values: dict[str, float]


def points_of(selection: FilteredComparison) -> list[Point]:
    """Every method of the selection: its score over the chosen tasks, the medians of what its runs took."""
    points = []
    for table in selection.tables:
        for label in table.rows:
            mine = [c for c in selection.runs if c.finished and _is_of(c, table, label)]
            values = {name: value for name, value in _costs(mine).items() if value}
            score = _score(table, label)
            points.append(
                Point(label, table.backbone, table.budget, values | ({} if score is None else {"score": score}))
            )
    return points


def undominated(points: Sequence[Point], metrics: Sequence[str]) -> list[bool]:
    """For each point whether none other is at least as good in all metrics and better in one.

    A point that lacks one of the metrics is out: nobody knows how it compares.
    """
    goods = [_goods(point, metrics) for point in points]
    return [
        mine is not None and not any(other is not None and _dominates(other, mine) for other in goods) for mine in goods
    ]


def front(points: Sequence[Point], x: str, y: str) -> list[Point]:
    """The points that no other beats in both, in the order of x: the line that is drawn."""
    best = [point for point, good in zip(points, undominated(points, (x, y)), strict=True) if good]
    return sorted(best, key=lambda point: (point.values[x], point.values[y]))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _goods(point: Point, metrics: Sequence[str]) -> list[float] | None:
    """The values turned so that more is better."""
    if any(name not in point.values for name in metrics):
        return None
    return [point.values[name] * (1 if METRICS[name].more_is_better else -1) for name in metrics]


def _is_of(run: RunResult, table: Table, label: str) -> bool:
    return (run.label, run.backbone, run.budget) == (label, table.backbone, table.budget)


def _score(table: Table, label: str) -> float | None:
    """The average over tasks; where there is one task only, its value. None for a method that lacks some."""
    if AVERAGE in table.columns:
        entry = table.entries.get((label, AVERAGE))
        return None if entry is None else entry.value
    values = [entry.value for task in table.columns if (entry := table.entries.get((label, task))) is not None]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(table.columns) else None


def _costs(runs: Sequence[RunResult]) -> dict[str, float]:
    if not runs:
        return {}
    return {
        "parameters": median(run.trainable_parameters for run in runs),
        "tokens_per_second": median(run.tokens_per_second for run in runs),
        "answer_tokens_per_second": median(run.answer_tokens_per_second for run in runs),
        "peak_memory": median(run.peak_memory_bytes for run in runs),
        "seconds": median(run.seconds for run in runs),
        "adapter_bytes": median(run.adapter_bytes for run in runs),
    }
