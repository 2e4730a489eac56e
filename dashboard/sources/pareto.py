"""What methods cost, for the page: the points and fronts of `pedro.comparison.costs`, of what is filtered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.comparison import costs
from pedro.comparison.costs import METRICS, Point, front, undominated
from pedro.comparison.result_model import AVERAGE

if TYPE_CHECKING:
    from sources.compare import FilteredComparison

__all__ = ["METRICS", "Place", "Point", "front", "place", "points_of", "score_spans", "undominated"]

Place = tuple[str, str, int | None]
"""A method, its backbone and budget."""


def points_of(selection: FilteredComparison) -> list[Point]:
    """Every method of the selection."""
    return costs.points_of(selection.tables, selection.runs)


def place(point: Point) -> Place:
    """Which method it is of."""
    return point.label, point.backbone, point.budget


def score_spans(selection: FilteredComparison) -> dict[Place, tuple[float, float]]:
    """The intervals of the scores that points have: the average over tasks, or the only task's."""
    spans = {}
    for table in selection.tables:
        column = AVERAGE if AVERAGE in table.columns else table.columns[0]
        for label in table.rows:
            entry = table.entries.get((label, column))
            whole = column == AVERAGE or len(table.columns) == 1
            if whole and entry is not None and entry.low is not None and entry.high is not None:
                spans[label, table.backbone, table.budget] = (entry.low, entry.high)
    return spans
