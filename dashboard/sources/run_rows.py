"""The rows that a comparison's runs kept, in the form in which those of jobs are browsed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.comparison.kept_rows import kept_runs, read_rows
from pedro.training.scored_rows import ScoredRow

if TYPE_CHECKING:
    from pedro.comparison.result_model import RunResult
    from sources.compare import FilteredComparison


def runs_with_rows(selection: FilteredComparison) -> dict[str, dict[str, str]]:
    """Of each task that is shown, the runs whose rows are kept: what they are called, and their ids."""
    kept = kept_runs(selection.comparison.folder)
    runs = [run for run in selection.runs if run.finished and run.id in kept]
    named = {run.id: _name(run, selection) for run in runs}
    found: dict[str, dict[str, str]] = {}
    for label in selection.labels:
        for run in sorted((run for run in runs if run.label == label), key=lambda run: run.seed):
            for score in run.scores:
                found.setdefault(score.task, {})[named[run.id]] = run.id
    return {task: found[task] for task in selection.tasks if task in found}


def rows_of_run(folder: Path, run: str, task: str) -> tuple[list[ScoredRow], str]:
    """A run's rows, or why they cannot be read. What was lost on a row is not known of a run."""
    try:
        rows = read_rows(folder, run, task)
    except ValueError as error:
        return [], str(error)
    return [ScoredRow(row.prompt, row.wanted, row.answer, row.score >= 1, math.nan) for row in rows], ""


def _name(run: RunResult, selection: FilteredComparison) -> str:
    """The method and the seed, with whatever else tells it from other runs that are shown."""
    parts = [run.label]
    shown = selection.runs
    if len({other.backbone for other in shown}) > 1:
        parts.append(run.backbone)
    if run.budget is not None:
        parts.append(f"{run.budget:,} parameters")
    if len({other.task for other in shown}) > len(selection.tasks) or any(
        score.task != run.task for score in run.scores
    ):
        parts.append(f"trained on {selection.titles.get(run.task, run.task)}")
    return " · ".join([*parts, f"seed {run.seed}"])
