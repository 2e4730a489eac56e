"""What methods cost beside what they score, and which of them are on the Pareto front of any of these metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pedro.comparison.result_model import AVERAGE, JUDGE, Cost, RunResult, Table
from pedro.errors import ConfigError

SCORE = "score"
FORGETTING, GENERAL, SAVED, SERVED = "forgetting", "general_task", "saved_bytes", "served_tokens_per_second"
MEASURED = (SAVED, SERVED, FORGETTING, GENERAL)
"""What only runs have that were asked for it; columns of a table where any has it."""
MOST_NATS = 700.0  # of a token; the perplexity of more is no float


@dataclass(frozen=True)
class CostMetric:
    """Something that a method is good or bad at. `unit` is what a value is divided by before it is shown."""

    title: str
    more_is_better: bool = False
    unit: float = 1.0
    format: str = ",.0f"
    log: bool = False


METRICS = {
    SCORE: CostMetric("Score (%)", more_is_better=True, unit=0.01, format=".1f"),
    "parameters": CostMetric("Trained parameters", log=True),
    "tokens_per_second": CostMetric("Tokens per second in training", more_is_better=True),
    "answer_tokens_per_second": CostMetric("Answer tokens per second in training", more_is_better=True),
    "peak_memory": CostMetric("Peak memory (MiB)", unit=2**20),
    "seconds": CostMetric("Training time (s)", format=",.1f"),
    "adapter_bytes": CostMetric("Adapter (kB)", unit=1000.0, format=",.1f", log=True),
    SAVED: CostMetric("Saved adapter (kB)", unit=1000.0, format=",.1f", log=True),
    SERVED: CostMetric("Served tokens per second", more_is_better=True),
    FORGETTING: CostMetric("Perplexity of general text, change", format="+,.2f"),
    GENERAL: CostMetric("General task, change in points", more_is_better=True, unit=0.01, format="+.1f"),
}

_VALUES: dict[str, Callable[[RunResult], float | None]] = {
    "parameters": lambda run: run.trainable_parameters or None,
    "tokens_per_second": lambda run: run.tokens_per_second or None,
    "answer_tokens_per_second": lambda run: run.answer_tokens_per_second or None,
    "peak_memory": lambda run: run.peak_memory_bytes or None,
    "seconds": lambda run: run.seconds or None,
    "adapter_bytes": lambda run: run.adapter_bytes or None,
    SAVED: lambda run: run.saved_bytes or None,
    SERVED: lambda run: run.served_tokens_per_second or None,
    FORGETTING: lambda run: _perplexity_change(run),
    GENERAL: lambda run: _gain(run.forgetting.get("score_before"), run.forgetting.get("score")),
}


@dataclass(frozen=True)
class Point:
    """A method on a backbone at a budget; a value that was not measured is not there."""

    label: str
    backbone: str
    budget: int | None
    values: dict[str, float]

    @property
    def name(self) -> str:
        """What a figure calls it."""
        return self.label if self.budget is None else f"{self.label} at {self.budget:,}"


def measured_costs(runs: Iterable[RunResult]) -> dict[tuple[str, str], Cost]:
    """What runs of one table were asked to measure, by label and name of the metric."""
    by_label: dict[str, list[RunResult]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    found = {}
    for label, mine in by_label.items():
        for name in MEASURED:
            values = [value for run in mine if (value := _VALUES[name](run)) is not None]
            reason = next((run.not_served for run in mine if run.not_served), "") if name == SERVED else ""
            if values:
                found[label, name] = Cost(median(values), min(values), max(values))
            elif reason:
                found[label, name] = Cost(None, reason=reason)
    return found


def points_of(tables: Iterable[Table], runs: Sequence[RunResult]) -> list[Point]:
    """Every method of the tables: its score (over the tasks, and by the task's name), the medians of what it cost."""
    points = []
    for table in tables:
        for label in table.rows:
            mine = [run for run in runs if run.finished and _is_of(run, table, label)]
            values = {name: value for name, of in _VALUES.items() if (value := _median(map(of, mine))) is not None}
            scores = {at: entry.value for at in table.columns if (entry := table.entries.get((label, at)))}
            values |= {task: value for task, value in scores.items() if value is not None and task != AVERAGE}
            score = _score(table, label)
            values |= {} if score is None else {SCORE: score}
            points.append(Point(label, table.backbone, table.budget, values))
    return points


def metric(name: str, tables: Iterable[Table] = ()) -> CostMetric:
    """What a column is: one of METRICS, or a task of the tables. Raises ConfigError that lists them."""
    metrics = {entry.task: entry.metric for table in tables for entry in table.entries.values()}
    if name in METRICS:
        return METRICS[name]
    if name not in metrics or name == AVERAGE:
        known = ", ".join([*METRICS, *(task for task in metrics if task != AVERAGE)])
        raise ConfigError(f"--pareto: there is no column {name!r}; choose two of {known}", param="--pareto")
    if metrics[name] == JUDGE:
        return CostMetric(f"{name} (marks)", more_is_better=True, format=".2f")
    return CostMetric(f"{name} (%)", more_is_better=True, unit=0.01, format=".1f")


def undominated(points: Sequence[Point], names: Sequence[str]) -> list[bool]:
    """For each point whether none other is at least as good in all metrics and better in one.

    A point that lacks one of the metrics is out: nobody knows how it compares.
    """
    goods = [_goods(point, names) for point in points]
    return [
        mine is not None and not any(other is not None and _dominates(other, mine) for other in goods) for mine in goods
    ]


def front(points: Sequence[Point], x: str, y: str) -> list[Point]:
    """The points that no other beats in both, in the order of x: the line that is drawn."""
    best = [point for point, good in zip(points, undominated(points, (x, y)), strict=True) if good]
    return sorted(best, key=lambda point: (point.values[x], point.values[y]))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _goods(point: Point, names: Sequence[str]) -> list[float] | None:
    """The values turned so that more is better, as every task's is."""
    if any(name not in point.values for name in names):
        return None
    return [point.values[name] * (-1 if name in METRICS and not METRICS[name].more_is_better else 1) for name in names]


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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _gain(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _perplexity_change(run: RunResult) -> float | None:
    """Perplexity of general text after tuning minus that of the backbone; None where a loss is NaN."""
    before, after = run.forgetting.get("loss_before"), run.forgetting.get("loss")
    return None if before is None or after is None else math.exp(min(after, MOST_NATS)) - math.exp(before)
