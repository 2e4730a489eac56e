"""Medians, percentiles, shares and their intervals, bootstrap or Wilson. Standard library only."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

RESAMPLES = 2000
Z = 1.959964  # 95 % of a normal distribution lie within as many standard deviations


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over rounds, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        return [round(self.low, 4), round(self.high, 4)]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """ours / theirs round by round: the pairs share what the machine did meanwhile."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> Ratio:
    """The median of `values` and the interval that 95 % of the medians of resampled rounds fall in."""
    rng = random.Random(0)  # noqa: S311
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Ratio(median(values), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentile_ratio(ours: Sequence[float], theirs: Sequence[float], share: float) -> Ratio:
    """The ratio of a percentile of two samples, and the interval of 95 % of those of resampled ones."""
    rng = random.Random(0)  # noqa: S311

    def again(values: Sequence[float]) -> float:
        return percentile(rng.choices(values, k=len(values)), share)

    ratios = sorted(again(ours) / again(theirs) for _ in range(RESAMPLES))
    low, high = ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1]
    return Ratio(percentile(ours, share) / percentile(theirs, share), low, high)


def wilson(right: int, rows: int) -> Ratio:
    """A share of independent rows with its 95 % Wilson score interval (Wilson 1927), which holds near 0 as well."""
    share, spread_of_z = right / rows, Z * Z / rows
    middle = (share + spread_of_z / 2) / (1 + spread_of_z)
    half = Z * math.sqrt(share * (1 - share) / rows + spread_of_z / (4 * rows)) / (1 + spread_of_z)
    return Ratio(share, max(0.0, middle - half), min(1.0, middle + half))


def mean_of_groups(groups: Sequence[Sequence[float]]) -> Ratio:
    """The mean of the groups' means, and the 95 % interval over rows drawn again within each group."""
    rng = random.Random(0)  # noqa: S311
    means = sorted(fmean(fmean(rng.choices(group, k=len(group))) for group in groups) for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return Ratio(fmean(map(fmean, groups)), low, high)
