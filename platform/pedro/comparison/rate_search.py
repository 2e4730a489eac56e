"""The search for a learning rate: which one validation prefers, and which to try next where that one lies at an edge.

Every method is searched by this one rule, from the same values. Trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pedro.comparison.result_model import FINISHED, RunResult
from pedro.comparison.spec_sections import MOST_RATE, TuneSpec

ALONE = 3.0  # from one value to the next, where a single one was given


@dataclass(frozen=True)
class Chosen:
    """What a search found. `searched` is what the runs say of it: every value with its score on validation."""

    lr: float
    searched: dict[str, Any]


def choose(runs: Sequence[RunResult]) -> float | None:
    """The learning rate whose run has the best score on validation, then the least loss; None if every run failed."""
    ended = [run for run in runs if run.state == FINISHED]
    if not ended:
        return None

    def worth(run: RunResult) -> tuple[float, float]:
        value, loss = run.validation.get("value"), run.validation.get("loss")  # null where it was NaN
        return (-math.inf if value is None else value, -math.inf if loss is None else -loss)

    return max(ended, key=worth).lr


def next_rate(runs: Sequence[RunResult], tune: TuneSpec) -> float | None:
    """The value to try beside those that `runs` had; None where the search is over.

    Where the best lies at an edge, the pattern of the values goes on beyond it (1, 3, 10 is followed by 30), as far as
    `tune.extend` allows. Where every run failed, it goes on below.
    """
    if len(runs) >= len(tune.lr) + tune.extend:
        return None
    tried, best = sorted(run.lr for run in runs), choose(runs)
    if best is None or best == tried[0]:
        following = _beyond(tried)
    elif best == tried[-1]:
        following = _beyond(tried[::-1])
    else:
        return None
    return following if 0 < following <= MOST_RATE and following not in tried else None


def chosen(runs: Sequence[RunResult], tune: TuneSpec) -> Chosen:
    """The learning rate that the search ends with. Where every run failed it is the first: the runs will say so."""
    tried, best = sorted(run.lr for run in runs), choose(runs)
    lr = tune.lr[0] if best is None else best
    values = {f"{run.lr:g}": run.validation.get("value") for run in sorted(runs, key=lambda run: run.lr)}
    at_edge = len(tried) > 1 and lr in (tried[0], tried[-1])
    return Chosen(lr, {"validation": values, "extended": len(runs) - len(tune.lr), "at_edge": at_edge})


def _beyond(values: Sequence[float]) -> float:
    """What comes before the first of `values`, by the pattern of the first three."""
    first, *others = values
    if not others:
        return _round(first / ALONE)
    return _round(first * first / others[0] if len(others) == 1 else first * others[0] / others[1])


def _round(value: float) -> float:
    """Two digits, so that a value has one spelling wherever the search came from."""
    return float(f"{value:.1e}")
