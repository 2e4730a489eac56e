"""What a table says: who leads on a task and by how much, what nothing separates, differences to a chosen baseline.

A difference separates two methods only if both hold: its 95 % interval on the same rows excludes zero
(`Difference.proven`), and its p-value is below 5 % after Holm's correction (Scandinavian Journal of Statistics 6, 1979)
for all differences that could have been looked at: of a task every pair of methods, since the leader is chosen by its
score; to a baseline every method on every task shown. p is that of a normal distribution with the bootstrap's standard
error: 2,000 draws alone resolve none below 0.001.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pedro.comparison.result_model import AVERAGE, JUDGE, Difference, Table, TableEntry, format_score
from pedro.comparison.statistics import FEWEST, LEVEL
from pedro.comparison.tables import difference

FEW = 4  # names that are listed; more are counted


@dataclass(frozen=True)
class Contrast:
    """`label` minus `other` on a task, with its p-value after the correction. `separates`: the two differ."""

    task: str
    label: str
    other: str
    difference: Difference
    p: float
    separates: bool


@dataclass(frozen=True)
class Verdict:
    """What a task says of its methods. `tied`: those, best first, that nothing separates from the leader.

    `next`: the leader against the best of those that it beats. `doubt`: why no difference can be shown, if so.
    """

    task: str
    metric: str
    leader: str
    value: float
    tied: tuple[str, ...] = ()
    beaten: tuple[str, ...] = ()
    next: Contrast | None = None
    comparisons: int = 0
    at_chance: bool = False
    doubt: str = ""

    def sentence(self, title: str) -> str:
        """It in words; `title` is the task's name for people."""
        on = "On average" if self.task == AVERAGE else f"On {title}"
        unit = "marks" if self.metric == JUDGE else "points"
        top = f"{self.leader} ({format_score(self.value, self.metric)})"
        if not self.tied and not self.beaten:
            return f"{on} there is one method, {top}."
        if self.doubt:
            return f"{on} {top} is highest, and no difference can be shown: {self.doubt}."
        if self.at_chance:
            return f"{on} no method is shown to beat always giving the most frequent answer."
        lead = ""
        if self.next is not None:
            gap = self.next.difference
            size, low, high = (format_score(value, self.metric) for value in (gap.value, gap.low, gap.high))
            lead = f"leads {self.next.other} by {size} {unit} [{low}, {high}]"
        if not self.tied:
            others = ", and every other method" if len(self.beaten) > 1 else ""
            return f"{on} {self.leader} {lead}{others}."
        if not self.beaten:
            return f"{on} nothing separates the {len(self.tied) + 1} methods; {top} is highest."
        if len(self.tied) < FEW:
            return f"{on} nothing separates {_listed((self.leader, *self.tied))}; {self.leader} {lead}."
        return f"{on} nothing separates {top}, the highest, from {len(self.tied)} others; it {lead}."


def verdicts(table: Table) -> list[Verdict]:
    """One for each column, the most informative first."""
    found = {task: verdict(table, task) for task in table.columns}
    return [each for task in by_information(table) if (each := found[task]) is not None]


def verdict(table: Table, task: str) -> Verdict | None:
    """What a column says; None where no method has a score."""
    column = _scored(table, task)
    if not column:
        return None
    leader = column[0]
    said = Verdict(task, leader.metric, leader.label, leader.value or 0.0, at_chance=leader.at_chance)
    others = tuple(entry.label for entry in column[1:])
    if others and (doubt := _doubt(column)):
        return replace(said, tied=others, doubt=doubt)
    pairs = contrasts([(a, b) for a, b in itertools.combinations(column, 2)])
    mine = {contrast.other: contrast for contrast in pairs if contrast.label == leader.label}
    beaten = tuple(label for label in others if label in mine and mine[label].separates and not leader.failed)
    tied = tuple(label for label in others if label not in beaten)
    following = mine[beaten[0]] if beaten else None
    return replace(said, tied=tied, beaten=beaten, next=following, comparisons=len(pairs))


def against(table: Table, baseline: str, tasks: Sequence[str] | None = None) -> list[Contrast]:
    """Every other method minus the baseline on each of the tasks (all), corrected for the number of all of these."""
    tasks = table.columns if tasks is None else tasks
    entries = table.entries
    pairs = [
        (entries[label, task], entries[baseline, task])
        for task in tasks
        for label in table.rows
        if label != baseline and (label, task) in entries and (baseline, task) in entries
    ]
    return contrasts(pairs)


def contrasts(pairs: Sequence[tuple[TableEntry, TableEntry]]) -> list[Contrast]:
    """The differences of pairs that have one, as one family."""
    known = [(a, b, gain) for a, b in pairs if (gain := difference(a, b)) is not None]
    corrected = holm([_p_value(a, b) for a, b, _ in known])
    return [
        Contrast(a.task, a.label, b.label, gain, p, gain.proven and p < 1 - LEVEL)
        for (a, b, gain), p in zip(known, corrected, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def by_information(table: Table) -> list[str]:
    """The table's tasks: the average, then those on which methods differ most for their noise, those at chance last."""

    def order(task: str) -> tuple[bool, float, float]:
        column = _scored(table, task)
        chance = sum(entry.at_chance for entry in column) / max(len(column), 1)
        values = [entry.value for entry in column if entry.value is not None]
        spans = [e.high - e.low for e in column if e.low is not None and e.high is not None]
        spread = (max(values) - min(values)) / max(float(np.median(spans)) if spans else 1.0, 1e-9) if values else 0.0
        return task != AVERAGE, round(chance, 3), -spread

    return sorted(table.columns, key=order)


def task_titles(table: Table, titles: Mapping[str, str]) -> dict[str, str]:
    """A short name for people of each column, the full title where two would be the same."""
    short = {task: (titles.get(task) or task).partition(":")[0].strip() for task in table.columns}
    return {
        task: name if list(short.values()).count(name) == 1 else titles.get(task) or task
        for task, name in short.items()
    }


def _scored(table: Table, task: str) -> list[TableEntry]:
    """The column's entries with a value, best first."""
    found = [entry for label in table.rows if (entry := table.entries.get((label, task))) is not None]
    return sorted((entry for entry in found if entry.value is not None), key=lambda e: -(e.value or 0.0))


def _doubt(column: Sequence[TableEntry]) -> str:
    if all(entry.samples is None for entry in column):
        return "each method has one value"
    if max(entry.seeds for entry in column) < FEWEST:
        return "each method has one seed"
    if not any(entry.rows for entry in column) and column[0].task != AVERAGE:
        return "their rows are not known"
    return ""


def _p_value(a: TableEntry, b: TableEntry) -> float:
    assert a.samples is not None, "a difference has samples"
    assert b.samples is not None, "a difference has samples"
    error = float(np.std(a.samples - b.samples, ddof=1))
    size = abs((a.value or 0.0) - (b.value or 0.0))
    if error == 0:
        return 0.0 if size else 1.0
    return math.erfc(size / error / math.sqrt(2))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
