"""Which runs of a comparison its tables show, and in which order: that of the spec, as comparison.json holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedro.comparison.result_model import FINAL, Comparison, RunResult, TableKey


@dataclass(frozen=True)
class Selection:
    """The final runs that tables show, and the orders of methods, tables and columns."""

    comparison: Comparison
    runs: tuple[RunResult, ...]
    left_out: int
    """Final runs that are not shown: see `select`."""
    labels: tuple[str, ...]
    table_keys: tuple[TableKey, ...]
    columns: Mapping[str, Sequence[str]]
    """Which columns the training on a task leads to: itself, or the tasks that its model is scored on."""
    tasks: tuple[str, ...]
    """Every column once, in order."""


def select(comparison: Comparison) -> Selection:
    """The runs to show, in the order of the spec.

    Left out are those whose label, task, backbone, budget or seed the spec no longer names, and of several runs
    in one place (the spec was changed in between) all but the newest.
    """
    spec = comparison.metadata.get("spec") or {}
    tasks = [task.get("task") for task in spec.get("tasks") or ()]
    labels = comparison.metadata.get("labels")
    allowed = ((tasks, "task"), (spec.get("backbones"), "backbone"), (spec.get("seeds"), "seed"), (labels, "label"))
    finals = [run for run in comparison.runs if run.stage == FINAL]
    newest: dict[tuple[Any, ...], RunResult] = {}
    for run in sorted(finals, key=lambda run: (str(run.provenance.get("created")), run.id)):
        named = all(getattr(run, name) in names for names, name in allowed if names)
        if named and (not spec or (run.budget in (spec.get("budgets") or [None]))):
            newest[run.label, run.task, run.backbone, run.budget, run.seed] = run
    ordered_labels, table_keys, columns = _labels(comparison), _table_keys(comparison), _columns(comparison)

    def order(run: RunResult) -> tuple[int, ...]:
        table = position((run.backbone, run.budget), table_keys)
        return (table, position(run.label, ordered_labels), position(run.task, list(columns)), run.seed)

    runs = tuple(sorted(newest.values(), key=order))
    return Selection(
        comparison=comparison,
        runs=runs,
        left_out=len(finals) - len(newest),
        labels=tuple(ordered_labels),
        table_keys=tuple(table_keys),
        columns=columns,
        tasks=tuple(dict.fromkeys(task for names in columns.values() for task in names)),
    )


def position(item: Any, order: Sequence[Any]) -> int:
    """Where an item stands; behind all others if it is not there."""
    return order.index(item) if item in order else len(order)


def _labels(comparison: Comparison) -> list[str]:
    """The labels in the order of the spec, as far as comparison.json knows it; then as runs name them."""
    methods = [method.get("name") for method in _listed(comparison, "methods")]
    seen = sorted({(position(run.method, methods), run.label) for run in comparison.runs})
    return list(dict.fromkeys([*comparison.metadata.get("labels", []), *(label for _, label in seen)]))


def _table_keys(comparison: Comparison) -> list[TableKey]:
    """Backbones in the order of the spec, and the budgets of each from the least to the largest."""
    backbones = list((comparison.metadata.get("spec") or {}).get("backbones") or [])
    seen = {(run.backbone, run.budget) for run in comparison.runs}
    return sorted(seen, key=lambda key: (position(key[0], backbones), key[0], key[1] or 0))


def _columns(comparison: Comparison) -> dict[str, list[str]]:
    """The columns of each task that was trained on, in the order of the spec."""
    columns = {
        choice["task"]: [other["task"] for other in choice.get("evaluate") or ()] or [choice["task"]]
        for choice in _listed(comparison, "tasks")
        if "task" in choice
    }
    for run in sorted(comparison.runs, key=lambda run: not run.scores):
        scored = [score.task for score in run.scores]
        if run.task not in columns and (scored or not run.finished):
            columns[run.task] = scored or [run.task]
    return columns


def _listed(comparison: Comparison, key: str) -> list[dict[str, Any]]:
    items = (comparison.metadata.get("spec") or {}).get(key) or []
    return [item for item in items if isinstance(item, dict)]
