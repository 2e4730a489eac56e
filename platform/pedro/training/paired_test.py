"""Compares two versions row by row: whether one is significantly better than the other. A pure function.

For rows that are right or wrong: McNemar's exact test (McNemar 1947, the binomial distribution over the rows on which
they differ). For a loss: the paired bootstrap (Efron & Tibshirani 1993, chapter 16), which resamples rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RowScore = tuple[float, float, int]
"""A row's correctness, loss and answer tokens."""
RESAMPLES, SEED = 10_000, 20_260_101
DRAWN = 4_000_000  # counts in memory at a time
MOST_DRAWN = 400_000_000  # with many rows there are fewer resamples, but at least 1,000


@dataclass(frozen=True)
class PairedTest:
    """A new version compared with the champion on the same rows. Positive gains are better: for a loss, its
    decrease."""

    metric: str
    method: str
    """`exact McNemar` or `paired bootstrap`."""
    rows: int
    score: float
    champion_score: float
    better: int
    """Rows on which the new version is better than the champion."""
    worse: int
    p_better: float
    """One-sided: the probability of at least this gain under the null hypothesis."""
    p_worse: float
    low: float | None = None
    high: float | None = None
    """95 % interval of the gain, by the bootstrap."""

    def said(self) -> str:
        """A short text."""
        interval = "" if self.low is None else f"95 % {self.low:+.4f} to {self.high:+.4f}, "
        chance = f"p = {self.p_better:.4f} for better, {self.p_worse:.4f} for worse"
        return (
            f"of {self.rows:,} rows {self.better:,} better and {self.worse:,} worse ({self.method}: {interval}{chance})"
        )


def compare_rows(metric: str, mine: Sequence[RowScore], champions: Sequence[RowScore]) -> PairedTest | None:
    """The test for `metric`; None if there are no rows, their numbers differ, or a loss is not finite."""
    if not mine or len(mine) != len(champions):
        return None
    place = 1 if metric == "loss" else 0
    gains = [(a[place] - b[place]) * (-1 if place else 1) for a, b in zip(mine, champions, strict=True)]
    if not all(map(math.isfinite, gains)):
        return None
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if metric != "loss":
        right, other = (sum(row[0] for row in rows) / len(rows) for rows in (mine, champions))
        p_better, p_worse = _tail(better, better + worse), _tail(worse, better + worse)
        return PairedTest(metric, "exact McNemar", len(mine), right, other, better, worse, p_better, p_worse)
    return _bootstrap(mine, champions, better, worse)


def _tail(least: int, tries: int) -> float:
    """The probability of at least `least` heads in `tries` tosses of a fair coin."""
    fixed = math.lgamma(tries + 1) - tries * math.log(2)
    terms = (math.exp(fixed - math.lgamma(k + 1) - math.lgamma(tries - k + 1)) for k in range(least, tries + 1))
    return min(1.0, math.fsum(terms))


def _bootstrap(mine: Sequence[RowScore], champions: Sequence[RowScore], better: int, worse: int) -> PairedTest | None:
    """The mean loss per answer token of both, on rows drawn with replacement, with a fixed seed."""
    import numpy as np

    tokens = np.array([row[2] for row in mine], dtype=np.float64)
    if tokens.sum() == 0 or any(a[2] != b[2] for a, b in zip(mine, champions, strict=True)):
        return None
    losses = np.array([[row[1] for row in rows] for rows in (mine, champions)], dtype=np.float64)  # [2, rows]
    rows = len(mine)
    random = np.random.default_rng(SEED)
    resamples = max(1000, min(RESAMPLES, MOST_DRAWN // rows))
    together = max(1, DRAWN // rows)
    parts = []
    for start in range(0, resamples, together):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=min(together, resamples - start))
        drawn = np.maximum(counts @ tokens, 1)  # a resample may only have rows without an answer
        parts.append((counts @ (losses[1] - losses[0])) / drawn)
    gains = np.concatenate(parts)
    low, high = (float(value) for value in np.quantile(gains, (0.025, 0.975)))
    p_better, p_worse = (float((np.sum(side) + 1) / (resamples + 1)) for side in (gains <= 0, gains >= 0))
    ours, theirs = (float(value) for value in losses.sum(1) / tokens.sum())
    return PairedTest("loss", "paired bootstrap", rows, ours, theirs, better, worse, p_better, p_worse, low, high)
