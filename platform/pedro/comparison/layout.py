"""Which runs of a comparison its tables show, and in which order: that of the spec, as comparison.json holds it.

Knows nothing of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pedro.comparison.results import FINAL, Cell, Comparison

Group = tuple[str, int | None]
"""Backbone and budget: what one table is of."""


def current(comparison: Comparison) -> tuple[list[Cell], int]:
    """The final runs that tables show, in the order of the spec, and how many others were left out.

    Left out are those whose label, task, backbone, budget or seed the spec does not name any more, and of several runs
    in one place (the spec was changed in between) all but the newest.
    """
    spec = comparison.head.get("spec") or {}
    labels = comparison.head.get("labels")
    tasks = [task.get("task") for task in spec.get("tasks") or ()]
    allowed = ((tasks, "task"), (spec.get("backbones"), "backbone"), (spec.get("seeds"), "seed"), (labels, "label"))
    finals = [cell for cell in comparison.cells if cell.stage == FINAL]
    newest: dict[tuple[Any, ...], Cell] = {}
    for cell in sorted(finals, key=lambda cell: (str(cell.provenance.get("created")), cell.id)):
        named = all(getattr(cell, name) in names for names, name in allowed if names)
        if named and (not spec or (cell.budget in (spec.get("budgets") or [None]))):
            newest[cell.label, cell.task, cell.backbone, cell.budget, cell.seed] = cell
    groups, rows, columns = group_order(comparison), row_order(comparison), list(columns_of(comparison))

    def place(cell: Cell) -> tuple[int, ...]:
        group = position((cell.backbone, cell.budget), groups)
        return (group, position(cell.label, rows), position(cell.task, columns), cell.seed)

    return sorted(newest.values(), key=place), len(finals) - len(newest)


def row_order(comparison: Comparison) -> list[str]:
    """The labels in the order of the spec, as far as comparison.json knows it; then as runs name them."""
    methods = [method.get("name") for method in _listed(comparison, "methods")]
    seen = sorted({(position(cell.method, methods), cell.label) for cell in comparison.cells})
    return list(dict.fromkeys([*comparison.head.get("labels", []), *(label for _, label in seen)]))


def group_order(comparison: Comparison) -> list[Group]:
    """Backbones in the order of the spec, and the budgets of each from the least to the largest."""
    backbones = list((comparison.head.get("spec") or {}).get("backbones") or [])
    seen = {(cell.backbone, cell.budget) for cell in comparison.cells}
    return sorted(seen, key=lambda group: (position(group[0], backbones), group[0], group[1] or 0))


def columns_of(comparison: Comparison) -> dict[str, list[str]]:
    """Which columns the training on a task leads to: itself, or the tasks that its model is scored on."""
    found = {
        choice["task"]: [other["task"] for other in choice.get("evaluate") or ()] or [choice["task"]]
        for choice in _listed(comparison, "tasks")
        if "task" in choice
    }
    for cell in sorted(comparison.cells, key=lambda cell: not cell.scores):
        scored = [score.task for score in cell.scores]
        if cell.task not in found and (scored or not cell.finished):
            found[cell.task] = scored or [cell.task]
    return found


def position(item: Any, order: Sequence[Any]) -> int:
    """Where an item stands; behind all others if it is not there."""
    return order.index(item) if item in order else len(order)


def _listed(comparison: Comparison, key: str) -> list[dict[str, Any]]:
    items = (comparison.head.get("spec") or {}).get(key) or []
    return [item for item in items if isinstance(item, dict)]
