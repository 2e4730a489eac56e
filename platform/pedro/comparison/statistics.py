"""Medians over seeds and their bootstrap intervals, in plain numpy.

A *run* is the scores of one trained model on each test row; the runs of a method differ in their seed and are scored
on the same rows. The number that is reported is the **median over the runs** of a run's mean over its rows. Its
interval is the 95 % percentile interval of the hierarchical bootstrap of that same number. Each of 2,000 times, test
rows are drawn with replacement, the same ones for all runs and all methods; runs are drawn with replacement, for each
method by itself, since an equal seed does not make two different methods a pair; and the median of the drawn runs on
the drawn rows is taken. So the interval speaks of other seeds and of other rows of the same kind, not of other
training data, learning rates or tasks. A difference of two methods has the interval of the differences of their
medians, sample by sample: rows that both find hard or easy cancel.

What few seeds can give, simulated with 400 rows and a standard deviation over seeds of 0, 1.5, 4.4 and 8.5 points:

  seeds  how often it holds the true value   how often two equal methods "differ"
  1      93 %, 88 %, 65 %, 40 %              5 %, 14 %, 42 %, 65 %   (rows alone are drawn: no claim may rest on it)
  2      98 %, 99 %, 89 %, 79 %              0 %,  0 %, 10 %, 14 %
  3     100 %, 99 %, 95 %, 91 %              0 %,  0 %,  4 %,  6 %
  5     100 %, 99 %, 99 %, 97 %              0 %,  0 %,  1 %,  1 %
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLES = 2000
LEVEL = 0.95
SEED = 20240917
DIGITS = 12  # beyond these a difference is rounding, not a finding
FEWEST = 2  # seeds for a claim that two methods differ
AT_ONCE = 4_000_000  # numbers of the largest array that is made

Runs = Sequence[Sequence[float] | NDArray[np.float64]]
"""One method's runs: S seeds, each with its N rows."""
BootstrapSamples = NDArray[np.float64]
"""[NUM_SAMPLES] what the reported number would have been."""


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle. Raises ValueError if there is none."""
    if len(values) == 0:
        raise ValueError("the median of no values")
    return float(np.median(values))


def interval(samples: BootstrapSamples) -> tuple[float, float]:
    """The middle 95 % of the samples."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap(methods: Mapping[str, Runs], rows_key: str = "") -> dict[str, BootstrapSamples]:
    """Bootstrap samples of each method's median over seeds. The same rows are drawn for all of them.

    What is drawn depends on `rows_key` (a name for the set of rows), the number of rows and a method's own name alone:
    methods may come and go without changing the others' intervals. Raises ValueError for a method without runs or rows.
    """
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, runs in methods.items():
        if len(runs) == 0 or not all(len(rows) for rows in runs):
            raise ValueError(f"{name or 'a method'}: no runs, or one without rows")
        for number, rows in enumerate(runs):
            by_length[len(rows)].append((name, number))
    means = {name: np.empty((NUM_SAMPLES, len(runs))) for name, runs in methods.items()}  # [NUM_SAMPLES, S]
    for members in by_length.values():
        table = np.array([methods[name][number] for name, number in members], dtype=np.float64)  # [runs, N]
        for (name, number), column in zip(members, _row_means(table, rows_key).T, strict=True):
            means[name][:, number] = column
    return {name: _medians(values, f"{rows_key}|{name}") for name, values in means.items()}


def _row_means(table: NDArray[np.float64], key: str) -> NDArray[np.float64]:
    """[NUM_SAMPLES, runs]: the runs' means over drawn rows; table [runs, N]."""
    rows = table.shape[1]
    random = _random(f"rows|{key}|{rows}")
    step = max(1, AT_ONCE // rows)
    parts = []
    for start in range(0, NUM_SAMPLES, step):
        count = min(step, NUM_SAMPLES - start)
        drawn = random.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)  # how often a row is drawn
        parts.append(times @ table.T / rows)
    return np.concatenate(parts)


def _medians(means: NDArray[np.float64], key: str) -> BootstrapSamples:
    """[NUM_SAMPLES]: medians of drawn runs; means [NUM_SAMPLES, S].

    Of two runs one is drawn: the mean of two drawn ones would vary half as much as that of two new ones does.
    """
    seeds = means.shape[1]
    drawn = _random(f"seeds|{key}").integers(0, seeds, (NUM_SAMPLES, seeds if seeds > 2 else 1))
    return np.round(np.median(np.take_along_axis(means, drawn, axis=1), axis=1), DIGITS)


def _random(key: str) -> np.random.Generator:
    return np.random.default_rng([SEED, *hashlib.sha256(key.encode()).digest()[:8]])
