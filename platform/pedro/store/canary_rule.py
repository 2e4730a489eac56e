"""When a canary is withdrawn by itself: its answers against the champion's, as far as both were asked alike. Pure.

Both are looked at when the side with fewer answers has LEAST, 2 LEAST, 4 LEAST and so on. Look k, from 1, is a
one-sided test at LEVEL / 2^k: a canary that is as good as the champion is withdrawn with a chance of at most LEVEL by
each of the two rules, however long it runs (Bonferroni's bound over the looks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

LEAST = 50
LEVEL = 0.01


@dataclass(frozen=True)
class AnswerCounts:
    """Answers of one version: how many there were and failed, and how those that a client scored were scored."""

    answers: int = 0
    errors: int = 0
    scores: int = 0
    score_sum: float = 0.0
    score_squares: float = 0.0

    @classmethod
    def scored(cls, score: float) -> AnswerCounts:
        """One answer's score."""
        return cls(scores=1, score_sum=score, score_squares=score * score)

    def __add__(self, other: AnswerCounts) -> AnswerCounts:
        return AnswerCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def judge_errors(canary: AnswerCounts, champion: AnswerCounts, looks: int) -> tuple[int, str]:
    """The looks there were by now, and why the canary is withdrawn, empty where it is not: it fails more often, by
    Fisher's exact test."""
    if not _due(canary.answers, champion.answers, looks):
        return looks, ""
    level = LEVEL / 2 ** (looks + 1)
    p = _more_errors(canary, champion)
    ours, theirs = (f"{side.errors:,} of {side.answers:,}" for side in (canary, champion))
    said = f"{ours} answers of the canary failed, of the champion {theirs}: Fisher's exact test, one-sided"
    return looks + 1, f"{said} p = {p:.2g} at level {level:.2g}" if p < level else ""


def judge_scores(canary: AnswerCounts, champion: AnswerCounts, looks: int) -> tuple[int, str]:
    """As `judge_errors`: its answers are scored lower, by Welch's test with the normal distribution."""
    if not _due(canary.scores, champion.scores, looks):
        return looks, ""
    level = LEVEL / 2 ** (looks + 1)
    (mean, variance), (other, other_variance) = _moments(canary), _moments(champion)
    spread = math.sqrt(variance / canary.scores + other_variance / champion.scores)
    z = (mean - other) / spread if spread else math.copysign(math.inf, mean - other) if mean != other else 0.0
    p = math.erfc(-z / math.sqrt(2)) / 2
    ours, theirs = f"{mean:.3f} in {canary.scores:,} scores", f"{other:.3f} in {champion.scores:,}"
    said = f"the canary has a mean of {ours}, the champion {theirs}: Welch's test, one-sided"
    return looks + 1, f"{said} p = {p:.2g} at level {level:.2g}" if p < level else ""


def _due(ours: int, theirs: int, looks: int) -> bool:
    return min(ours, theirs) >= LEAST << looks


def _moments(side: AnswerCounts) -> tuple[float, float]:
    mean = side.score_sum / side.scores
    return mean, max(0.0, side.score_squares - side.scores * mean * mean) / (side.scores - 1)


def _more_errors(canary: AnswerCounts, champion: AnswerCounts) -> float:
    """The chance of so many of the errors or more on the canary's side, were they spread over all answers alike."""
    errors, every = canary.errors + champion.errors, canary.answers + champion.answers
    most = min(errors, canary.answers)
    ways = _ways(every, errors)
    found = range(max(canary.errors, errors - champion.answers), most + 1)
    return min(
        1.0, math.fsum(math.exp(_ways(canary.answers, k) + _ways(champion.answers, errors - k) - ways) for k in found)
    )


def _ways(every: int, chosen: int) -> float:
    """The logarithm of how many choices there are."""
    return math.lgamma(every + 1) - math.lgamma(chosen + 1) - math.lgamma(every - chosen + 1)
