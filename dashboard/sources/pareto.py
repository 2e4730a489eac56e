"""What methods cost, for the page: the points and fronts of `pedro.comparison.costs`, of what is filtered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.comparison import costs
from pedro.comparison.costs import METRICS, Point, front, undominated

if TYPE_CHECKING:
    from sources.compare import FilteredComparison

__all__ = ["METRICS", "Point", "front", "points_of", "undominated"]


def points_of(selection: FilteredComparison) -> list[Point]:
    """Every method of the selection."""
    return costs.points_of(selection.tables, selection.runs)
