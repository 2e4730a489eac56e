"""From runs to tables: a number with its interval for each method and task, what is best, and what of that is proven.

Knows nothing of files, text or drawing: `report.py` and the dashboard show what stands here, so their numbers agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pedro.comparison.layout import Group, columns_of, current, group_order, position, row_order
from pedro.comparison.notes import notes_of
from pedro.comparison.results import FAILED, Cell, Comparison, TaskResult
from pedro.comparison.statistics import FEWEST, Draws, bootstrap, interval, median

AVERAGE = "Avg."
BEST, SECOND = "best", "second"
JUDGE = "judge"  # the metric whose values are marks from 1 to 10 and not fractions


@dataclass(frozen=True)
class Difference:
    """A method's value minus the baseline's, on the same rows. `proven`: its interval excludes zero."""

    value: float
    low: float
    high: float
    proven: bool


@dataclass(frozen=True)
class Entry:
    """A method on a task: the median over seeds, as a fraction (a judge's mark 1 to 10), and its 95 % interval.

    `value`, `low` and `high` are None where every run failed. `proven` belongs to the best alone: the interval of its
    difference to every other method of the column excludes zero, none of its runs failed, and it is not at chance.
    `at_chance`: the interval holds the majority rate, or lies below it. `gain` is the difference to the baseline.
    """

    label: str
    method: str
    task: str
    backbone: str
    budget: int | None
    parameters: int
    metric: str
    value: float | None
    low: float | None
    high: float | None
    seeds: int
    mark: str = ""
    proven: bool = False
    at_chance: bool = False
    failed: int = 0
    reason: str = ""
    majority: float | None = None
    rows: int = 0
    left_out: int = 0
    values: tuple[tuple[int, float], ...] = ()
    """(seed, value) of each finished run."""
    lrs: tuple[tuple[int, float], ...] = ()
    """(seed, learning rate) of each run."""
    gain: Difference | None = None
    draws: Draws | None = field(default=None, repr=False, compare=False)
    """What the bootstrap drew; the differences to other entries are taken from it."""

    @property
    def group(self) -> Group:
        return (self.backbone, self.budget)


@dataclass(frozen=True)
class Table:
    """Methods × tasks on one backbone at one budget. A method that did not run on a task has no cell there."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Entry]
    notes: tuple[str, ...]
    baseline: str
    backbone: str
    budget: int | None
    parameters: Mapping[str, tuple[int, int]]
    """Least and most trained parameters of a method over the tasks; mostly the same."""


def entries(
    comparison: Comparison,
    *,
    tasks: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
) -> list[Entry]:
    """An entry for each method, task, backbone and budget that ran, marked among those asked for.

    In the order of the comparison's backbones, budgets, methods and tasks.
    """
    places = columns_of(comparison)
    found: list[Entry] = []
    for (group, task), runs in _columns(current(comparison)[0], places).items():
        if (tasks is None or task in tasks) and (backbones is None or group[0] in backbones):
            wanted = {label: cells for label, cells in runs.items() if labels is None or label in labels}
            found += _marked(_column(task, wanted), comparison.baseline)
    order = row_order(comparison)
    columns = [task for names in places.values() for task in names]
    groups = group_order(comparison)
    return sorted(found, key=lambda e: (position(e.group, groups), position(e.label, order), position(e.task, columns)))


def make_table(found: Sequence[Entry], comparison: Comparison) -> Table:
    """The table of entries of one backbone and budget, with the average over tasks and the notes that belong to it.

    Raises ValueError for no entries, or for those of several tables (`tables` makes them all).
    """
    groups = {entry.group for entry in found}
    if len(groups) != 1:
        raise ValueError(f"a table is of one backbone and budget, got entries of {len(groups)}")
    ((backbone, budget),) = groups
    rows = tuple(dict.fromkeys(entry.label for entry in found))
    columns = [task for names in columns_of(comparison).values() for task in names]
    present = {entry.task for entry in found}
    tasks = tuple(task for task in dict.fromkeys(columns) if task in present)
    cells = {(entry.label, entry.task): entry for entry in found}
    averages = _marked(_averages(cells, rows, tasks), comparison.baseline)
    cells |= {(entry.label, AVERAGE): entry for entry in averages}
    sizes = {label: [e.parameters for e in found if e.label == label and e.parameters] or [0] for label in rows}
    titles = [comparison.title]
    if len({cell.backbone for cell in comparison.cells}) > 1:
        titles.append(backbone)
    if budget is not None:
        titles.append(f"budget {budget:,} parameters")
    return Table(
        title=" · ".join(titles),
        rows=rows,
        columns=(*tasks, AVERAGE) if averages else tasks,
        cells=cells,
        notes=notes_of(comparison, list(cells.values()), AVERAGE),
        baseline=comparison.baseline,
        backbone=backbone,
        budget=budget,
        parameters={label: (min(counts), max(counts)) for label, counts in sizes.items()},
    )


def tables(comparison: Comparison, **only: Sequence[str] | None) -> list[Table]:
    """A table for each backbone and budget; `only` as for `entries`."""
    groups: dict[Group, list[Entry]] = defaultdict(list)
    for entry in entries(comparison, **only):
        groups[entry.group].append(entry)
    return [make_table(found, comparison) for found in groups.values()]


Runs = dict[str, list[tuple[Cell, TaskResult | None]]]
"""By label; a failed run has no score."""


def _columns(cells: Iterable[Cell], places: Mapping[str, Sequence[str]]) -> dict[tuple[Group, str], Runs]:
    """The runs of each column of each table."""
    columns: dict[tuple[Group, str], Runs] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        group = (cell.backbone, cell.budget)
        for score in cell.scores:
            columns[group, score.task][cell.label].append((cell, score))
        if cell.state == FAILED:
            for task in places[cell.task]:
                columns[group, task][cell.label].append((cell, None))
    return columns


def _column(task: str, runs: Runs) -> list[Entry]:
    """The entries of one column, not marked yet."""
    scored = {label: [score for _, score in found if score is not None] for label, found in runs.items()}
    runs_of = {label: [_rows(score) for score in scores] for label, scores in scored.items()}
    several = {label: rows for label, rows in runs_of.items() if sum(map(len, rows)) > 1}  # one value has no spread
    draws = bootstrap(several, task)
    return [_entry(task, found, draws.get(label)) for label, found in runs.items()]


def _rows(score: TaskResult) -> np.ndarray:
    """The rows' values, moved so that their mean is the score: where it is a mean over groups, that is another."""
    rows = np.array(score.per_row or (score.value,), dtype=np.float64)
    return rows + (score.value - rows.mean())


def _entry(task: str, found: Sequence[tuple[Cell, TaskResult | None]], draws: Draws | None) -> Entry:
    found = sorted(found, key=lambda run: run[0].seed)
    cells = [cell for cell, _ in found]
    scores = [score for _, score in found if score is not None]
    values = tuple((cell.seed, score.value) for cell, score in found if score is not None)
    low, high = interval(draws) if draws is not None else (None, None)
    majorities = [score.majority for score in scores if score.majority is not None]
    majority = median(majorities) if majorities else None
    broken = [cell for cell, score in found if score is None]
    return Entry(
        label=cells[0].label,
        method=cells[0].method,
        task=task,
        backbone=cells[0].backbone,
        budget=cells[0].budget,
        parameters=round(median([cell.trainable_parameters for cell, score in found if score] or [0])),
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
        lrs=tuple((cell.seed, cell.lr) for cell in cells),
        draws=draws,
    )


def _averages(cells: Mapping[tuple[str, str], Entry], rows: Sequence[str], tasks: Sequence[str]) -> list[Entry]:
    """The mean over the tasks of the medians, for methods that have them all; marks of a judge are left out of it."""
    tasks = [task for task in tasks if all(cells[at].metric != JUDGE for at in cells if at[1] == task)]
    if len(tasks) < 2:
        return []
    averages = []
    for label in rows:
        found = [cells[label, task] for task in tasks if (label, task) in cells]
        values = [entry.value for entry in found if entry.value is not None]
        if len(values) < len(tasks):
            continue
        drawn = [entry.draws for entry in found if entry.draws is not None and entry.rows]
        draws = np.mean(drawn, axis=0) if len(drawn) == len(found) else None
        low, high = interval(draws) if draws is not None else (None, None)
        averages.append(
            Entry(
                label=label,
                method=found[0].method,
                task=AVERAGE,
                backbone=found[0].backbone,
                budget=found[0].budget,
                parameters=round(median([entry.parameters for entry in found])),
                metric="mean",
                value=float(np.mean(values)),
                low=low,
                high=high,
                seeds=min(entry.seeds for entry in found),
                failed=sum(entry.failed for entry in found),
                draws=draws,
            )
        )
    return averages


def _marked(column: list[Entry], baseline: str) -> list[Entry]:
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


def _proven(best: Entry, column: Sequence[Entry]) -> bool:
    """Whether the best is better than every other with a value. Nothing is proven at chance or by those that failed."""
    if best.at_chance or best.failed:
        return False
    gains = [difference(best, other) for other in column if other is not best and other.value is not None]
    return all(gain is not None and gain.proven and gain.value > 0 for gain in gains)


def difference(entry: Entry, other: Entry) -> Difference | None:
    """`entry` minus `other` with the paired interval; None where one has no value.

    One seed proves nothing, nor do scores on different rows (of one method, longer prompts were left out).
    """
    if entry.value is None or other.value is None or entry.draws is None or other.draws is None:
        return None
    low, high = interval(entry.draws - other.draws)
    enough = min(entry.seeds, other.seeds) >= FEWEST and entry.rows == other.rows
    enough = enough and (entry.rows > 0 or entry.task == AVERAGE)  # rows that nobody counted are not the same rows
    return Difference(entry.value - other.value, low, high, enough and (low > 0 or high < 0))
