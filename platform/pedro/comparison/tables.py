"""From runs to tables: which runs they show, a number with its interval for each method and task, what is best, and
what of that is proven. The order is that of the spec, as comparison.json holds it.

The command, the report's files and the dashboard all show what stands here, so their numbers agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pedro.comparison.captions import captions
from pedro.comparison.costs import measured_costs
from pedro.comparison.result_model import (
    AVERAGE,
    BACKBONE,
    BEST,
    FAILED,
    FINAL,
    JUDGE,
    SECOND,
    Comparison,
    Difference,
    RunResult,
    Selection,
    Table,
    TableEntry,
    TableKey,
    TaskResult,
    position,
)
from pedro.comparison.statistics import FEWEST, BootstrapSamples, bootstrap, interval, median


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
    ordered_labels, table_keys, columns = _labels(comparison), _table_keys(comparison), _trained_columns(comparison)

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


def build_tables(
    selection: Selection,
    *,
    tasks: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
) -> list[Table]:
    """A table for each backbone and budget, of the tasks, methods and backbones asked for; None means all.

    In the order of the comparison's backbones, budgets, methods and tasks. Marks, differences and averages are among
    what is shown.
    """
    by_table: dict[TableKey, list[TableEntry]] = defaultdict(list)
    for (table_key, task), runs in _columns(selection).items():
        if (tasks is None or task in tasks) and (backbones is None or table_key[0] in backbones):
            wanted = {label: label_runs for label, label_runs in runs.items() if labels is None or label in labels}
            by_table[table_key] += _marked(_column(task, wanted), selection.comparison.baseline)
    order, columns = selection.labels, selection.tasks

    def sort_key(entry: TableEntry) -> tuple[int, int]:
        return (position(entry.label, order), position(entry.task, columns))

    return [
        _table(sorted(by_table[key], key=sort_key), selection)
        for key in sorted(by_table, key=lambda key: position(key, selection.table_keys))
        if by_table[key]
    ]


def _table(entries: Sequence[TableEntry], selection: Selection) -> Table:
    """The table of entries of one backbone and budget, with the average over tasks and the notes that belong to it."""
    comparison = selection.comparison
    backbone, budget = entries[0].backbone, entries[0].budget
    rows = tuple(dict.fromkeys(entry.label for entry in entries))
    present = {entry.task for entry in entries}
    tasks = tuple(task for task in selection.tasks if task in present)
    by_cell = {(entry.label, entry.task): entry for entry in entries}
    averages = _marked(_averages(by_cell, rows, tasks), comparison.baseline)
    by_cell |= {(entry.label, AVERAGE): entry for entry in averages}
    measured = [run for run in selection.runs if (run.saved_bytes or run.forgetting) and run.label in rows]
    measured = [run for run in measured if (run.backbone, run.budget) == (backbone, budget)]
    measured = [run for run in measured if present.intersection(selection.columns.get(run.task, ()))]
    sizes = {label: [e.parameters for e in entries if e.label == label and e.parameters] or [0] for label in rows}
    titles = [comparison.title]
    if len({run.backbone for run in comparison.runs}) > 1:
        titles.append(backbone)
    if budget is not None:
        titles.append(f"budget {budget:,} parameters")
    return Table(
        title=" · ".join(titles),
        rows=rows,
        columns=(*tasks, AVERAGE) if averages else tasks,
        entries=by_cell,
        notes=captions(selection, list(by_cell.values())),
        baseline=comparison.baseline,
        backbone=backbone,
        budget=budget,
        parameters={label: (min(counts), max(counts)) for label, counts in sizes.items()},
        costs=measured_costs(measured) if measured else {},
    )


Runs = dict[str, list[tuple[RunResult, TaskResult | None]]]
"""By label; a failed run has no score."""


def _columns(selection: Selection) -> dict[tuple[TableKey, str], Runs]:
    """The runs of each column of each table."""
    columns: dict[tuple[TableKey, str], Runs] = defaultdict(lambda: defaultdict(list))
    for run in selection.runs:
        table_key = (run.backbone, run.budget)
        for score in run.scores:
            columns[table_key, score.task][run.label].append((run, score))
        if run.state == FAILED:
            for task in selection.columns[run.task]:
                columns[table_key, task][run.label].append((run, None))
    return columns


def _column(task: str, runs: Runs) -> list[TableEntry]:
    """The entries of one column, not marked yet."""
    scored = {label: [score for _, score in label_runs if score is not None] for label, label_runs in runs.items()}
    runs_of = {label: [_rows(score) for score in scores] for label, scores in scored.items()}
    several = {label: rows for label, rows in runs_of.items() if sum(map(len, rows)) > 1}  # one value has no spread
    samples = bootstrap(several, task)
    return [_entry(task, label_runs, samples.get(label)) for label, label_runs in runs.items()]


def _rows(score: TaskResult) -> np.ndarray:
    """The rows' values, moved so that their mean is the score: where it is a mean over groups, that is another."""
    rows = np.array(score.per_row or (score.value,), dtype=np.float64)
    moved: np.ndarray = rows + (score.value - rows.mean())
    return moved


def _entry(
    task: str, scored_runs: Sequence[tuple[RunResult, TaskResult | None]], samples: BootstrapSamples | None
) -> TableEntry:
    scored_runs = sorted(scored_runs, key=lambda run: run[0].seed)
    runs = [run for run, _ in scored_runs]
    scores = [score for _, score in scored_runs if score is not None]
    values = tuple((run.seed, score.value) for run, score in scored_runs if score is not None)
    low, high = interval(samples) if samples is not None else (None, None)
    majorities = [score.majority for score in scores if score.majority is not None]
    majority = median(majorities) if majorities else None
    broken = [run for run, score in scored_runs if score is None]
    return TableEntry(
        label=runs[0].label,
        method=runs[0].method,
        task=task,
        backbone=runs[0].backbone,
        budget=runs[0].budget,
        parameters=round(median([run.trainable_parameters for run, score in scored_runs if score] or [0])),
        metric=scores[0].metric if scores else "",
        value=median([value for _, value in values]) if values else None,
        low=low,
        high=high,
        seeds=len(values),
        at_chance=low is not None and majority is not None and low <= majority,
        failed=len(broken),
        reason=broken[0].message if broken else "",
        majority=majority,
        rows=max((score.rows for score in scores), default=0),
        left_out=max((score.left_out for score in scores), default=0),
        values=values,
        lrs=tuple((run.seed, run.lr) for run in runs if run.method != BACKBONE),
        samples=samples,
    )


def _averages(
    entries: Mapping[tuple[str, str], TableEntry], rows: Sequence[str], tasks: Sequence[str]
) -> list[TableEntry]:
    """The mean over the tasks of the medians, for methods that have them all; marks of a judge are left out of it."""
    tasks = [task for task in tasks if all(entries[at].metric != JUDGE for at in entries if at[1] == task)]
    if len(tasks) < 2:
        return []
    averages = []
    for label in rows:
        scored = [entries[label, task] for task in tasks if (label, task) in entries]
        values = [entry.value for entry in scored if entry.value is not None]
        if len(values) < len(tasks):
            continue
        row_samples = [entry.samples for entry in scored if entry.samples is not None and entry.rows]
        samples = np.mean(row_samples, axis=0) if len(row_samples) == len(scored) else None
        low, high = interval(samples) if samples is not None else (None, None)
        averages.append(
            TableEntry(
                label=label,
                method=scored[0].method,
                task=AVERAGE,
                backbone=scored[0].backbone,
                budget=scored[0].budget,
                parameters=round(median([entry.parameters for entry in scored])),
                metric="mean",
                value=float(np.mean(values)),
                low=low,
                high=high,
                seeds=min(entry.seeds for entry in scored),
                failed=sum(entry.failed for entry in scored),
                samples=samples,
            )
        )
    return averages


def _marked(column: list[TableEntry], baseline: str) -> list[TableEntry]:
    """The column with its best and second, whether the best is proven, and the differences to the baseline."""
    values = sorted({entry.value for entry in column if entry.value is not None}, reverse=True)
    ties = sum(entry.value == values[0] for entry in column) if values else 0
    base = next((entry for entry in column if entry.label == baseline), None)
    second = values[1] if len(values) > 1 and ties == 1 else None
    best = values[0] if len(values) > 1 else None
    marked = []
    for entry in column:
        mark = "" if entry.value is None else BEST if entry.value == best else SECOND if entry.value == second else ""
        gain = difference(entry, base) if base is not None and base is not entry else None
        marked.append(replace(entry, mark=mark, gain=gain, proven=mark == BEST and _proven(entry, column)))
    return marked


def _proven(best: TableEntry, column: Sequence[TableEntry]) -> bool:
    """Whether the best is better than every other with a value. Nothing is proven at chance or by those that failed."""
    if best.at_chance or best.failed:
        return False
    gains = [difference(best, other) for other in column if other is not best and other.value is not None]
    return all(gain is not None and gain.proven and gain.value > 0 for gain in gains)


def difference(entry: TableEntry, other: TableEntry) -> Difference | None:
    """`entry` minus `other` with the paired interval; None where one has no value.

    One seed proves nothing, nor do scores on different rows (of one method, longer prompts were left out).
    """
    if entry.value is None or other.value is None or entry.samples is None or other.samples is None:
        return None
    low, high = interval(entry.samples - other.samples)
    enough = min(entry.seeds, other.seeds) >= FEWEST and entry.rows == other.rows
    enough = enough and (entry.rows > 0 or entry.task == AVERAGE)  # rows that nobody counted are not the same rows
    return Difference(entry.value - other.value, low, high, enough and (low > 0 or high < 0))


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


def _trained_columns(comparison: Comparison) -> dict[str, list[str]]:
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
