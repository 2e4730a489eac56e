"""Sweeps as their drivers recorded them: trials, the best one, parameter importance, rows for charts.

A broken file is named with its reason; the rest is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.refs import ModelRef
from pedro.training.sweep.records import Records, Trial, TrialState, sweep_ids
from pedro.training.sweep.report import axis, metric, rows_of
from sources.view import sees, tenant_seen, without_places

if TYPE_CHECKING:
    from pedro.config import Settings

LOSS, ACCURACY = "validation loss", "accuracy"
ORDERS = "method.orders"
LEVELS = 6  # distinct values up to which a parameter counts as a list; others fall into quarters
BROKEN = (ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Sweep:
    """One sweep with the trials that were ever begun. `problems` names the files that cannot be read."""

    id: str
    name: str
    model: str
    keys: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def best(self) -> Trial | None:
        """The finished trial of least validation loss."""
        return min(self.ended, key=lambda trial: (trial.loss, trial.number), default=None)

    @property
    def ended(self) -> list[Trial]:
        """The trials that can be compared: finished, with a loss."""
        return [trial for trial in self.trials if trial.state is TrialState.FINISHED and trial.loss is not None]

    def counts(self) -> dict[str, int]:
        """How many trials are in each state that any is in."""
        numbers = {state.value: sum(trial.state is state for trial in self.trials) for state in TrialState}
        return {state: count for state, count in numbers.items() if count}


@dataclass(frozen=True)
class Importance:
    """Share of the losses' variance that one parameter explains alone; None where there are too few trials."""

    key: str
    share: float | None
    groups: int


def read_sweeps(settings: Settings) -> tuple[tuple[Sweep, ...], str]:
    """Every sweep without its trials, by adapter and name; and what went wrong."""
    try:
        ids = sweep_ids(settings.storage)
        heads = [read_head(settings, sweep_id) for sweep_id in ids]
    except (PedroError, OSError) as error:
        return (), f"{settings.storage}: {error}" if tenant_seen(settings) is None else "They cannot be read right now."
    heads = [head for head in heads if sees(settings, head.model)]
    return tuple(sorted(heads, key=lambda sweep: (sweep.model, sweep.name, sweep.id))), ""


def read_head(settings: Settings, sweep_id: str) -> Sweep:
    """A sweep's own record."""
    try:
        record = Records(settings.storage, sweep_id).record()
        if record is None:
            return Sweep(sweep_id, sweep_id, "", problems=("sweep.json: it is not there",))
        base = record.spec["base"]
        model = ModelRef(base["tenant"], base["adapter"]).name
        return Sweep(sweep_id, str(record.spec["name"]), model, tuple(record.spec["space"]))
    except BROKEN as error:
        return Sweep(sweep_id, sweep_id, "", problems=(f"sweep.json: {_why(error)}",))


def read_sweep(settings: Settings, sweep_id: str) -> Sweep:
    """A sweep with its trials."""
    head, records = read_head(settings, sweep_id), Records(settings.storage, sweep_id)
    if not sees(settings, head.model):
        return Sweep(sweep_id, sweep_id, "")
    trials: list[Trial] = []
    problems = list(head.problems)
    number = 0
    while True:
        try:
            trial = records.trial(number)
        except BROKEN as error:
            problems.append(f"trial {number:03d}: {_why(error)}")
        else:
            if trial is None:
                break
            words = {name: without_places(settings, getattr(trial, name)) for name in ("message", "parameters")}
            trials.append(replace(trial, **words))
        number += 1
    keys = head.keys or tuple(dict.fromkeys(key for trial in trials for key in trial.parameters))
    told = tuple(without_places(settings, problem) for problem in problems)
    return Sweep(head.id, head.name, head.model, keys, tuple(trials), told)


def importances(sweep: Sweep) -> list[Importance]:
    """The parameters by how much of the finished trials' validation loss each explains, the most telling first.

    Epsilon squared of a one-way analysis of variance (Kelley 1935): the share of the variance that lies between the
    parameter's values, less what that many groups would explain by chance. Of each parameter alone: what only two of
    them together explain counts for neither.
    """
    trials = sweep.ended
    losses = [trial.loss for trial in trials if trial.loss is not None]
    ranked = []
    for key in sweep.keys:
        names = _groups([trial.parameters.get(key) for trial in trials])
        share = _epsilon_squared(names, losses)
        ranked.append(Importance(key, share, len(set(names))))
    return sorted(ranked, key=lambda one: -(one.share if one.share is not None else -1))


def parallel(sweep: Sweep) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parallel coordinates: a row for each trial and axis, and a row for each tick. Heights are between 0 and 1.

    The axes are the parameters, then loss and accuracy. Failed and lost trials have nothing to compare.
    """
    drawn = [t for t in sweep.trials if t.loss is not None and t.state not in (TrialState.FAILED, TrialState.LOST)]
    if not drawn:
        return [], []
    columns: list[tuple[str, list[Any]]] = [(key, [t.parameters.get(key) for t in drawn]) for key in sweep.keys]
    columns.append((LOSS, [trial.loss for trial in drawn]))
    if any(metric(trial, ACCURACY) is not None for trial in drawn):
        columns.append((ACCURACY, [metric(trial, ACCURACY) for trial in drawn]))
    best = sweep.best
    points, marks = [], []
    for name, values in columns:
        height, ticks = axis(values)
        marks += [{"axis": name, "height": y, "tick": text} for y, text in ticks]
        for trial, value in zip(drawn, values, strict=True):
            y = height(value)
            if y is not None:
                points.append(
                    {
                        "axis": name,
                        "height": y,
                        "value": format_value(value),
                        "trial": trial.number,
                        "state": trial.state.value,
                        "loss": trial.loss,
                        "best": best is not None and trial.number == best.number,
                    }
                )
    return points, marks


def order_map(sweep: Sweep) -> list[dict[str, Any]]:
    """The median loss of the finished trials at each (m, n); nothing where the orders did not vary."""
    losses_at: dict[tuple[int, int], list[float]] = {}
    for trial in sweep.ended:
        orders = trial.parameters.get(ORDERS)
        if isinstance(orders, list | tuple) and len(orders) == 2 and trial.loss is not None:
            losses_at.setdefault((int(orders[0]), int(orders[1])), []).append(trial.loss)
    if len(losses_at) < 2:
        return []
    return [
        {"m": m, "n": n, "loss": median(losses), "trials": len(losses)} for (m, n), losses in sorted(losses_at.items())
    ]


def trial_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """The table of trials: the best first, then those without a loss."""
    rows = [{**row, **{key: format_value(row.get(key)) for key in sweep.keys}} for row in rows_of(sweep.trials)]
    return sorted(
        rows,
        key=lambda row: (row["state"] != TrialState.FINISHED, row["validation_loss"] is None, row["validation_loss"]),
    )


def curve_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Every trial's validation losses."""
    return [
        {"trial": trial.number, "state": trial.state.value, "step": step, "loss": loss}
        for trial in sweep.trials
        for step, loss in trial.reports
        if math.isfinite(loss)
    ]


def format_value(value: Any) -> str:
    """A parameter's value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _groups(values: Sequence[Any]) -> list[str]:
    """To which group each value belongs: to its own, or for numbers with many values to its quarter."""
    if len({format_value(value) for value in values}) <= LEVELS or not all(isinstance(v, int | float) for v in values):
        return [format_value(value) for value in values]
    cuts = quantiles(values, n=4)
    return [str(sum(value > cut for cut in cuts)) for value in values]


def _epsilon_squared(names: Sequence[str], losses: Sequence[float]) -> float | None:
    groups: dict[str, list[float]] = {}
    for name, loss in zip(names, losses, strict=True):
        groups.setdefault(name, []).append(loss)
    free = len(losses) - len(groups)
    if len(groups) < 2 or free < 1:
        return None
    middle = fmean(losses)
    total = sum((loss - middle) ** 2 for loss in losses)
    within = sum((loss - fmean(group)) ** 2 for group in groups.values() for loss in group)
    if total == 0:
        return None
    return max(0.0, (total - within - (len(groups) - 1) * within / free) / total)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.120}"
