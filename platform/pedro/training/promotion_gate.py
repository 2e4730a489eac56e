"""Decides whether a new version becomes champion. A pure function of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.training.paired_test import PairedTest
    from pedro.training.spec import GateSpec

ROUNDING = 1e-9  # so that a gain of exactly min_gain passes


@dataclass(frozen=True)
class GateDecision:
    """Whether the alias moves, and why, as one sentence."""

    passed: bool
    reason: str


def decide(
    gate: GateSpec,
    metrics: Mapping[str, float],
    champion_metrics: Mapping[str, float] | None,
    backbone_metrics: Mapping[str, float],
    paired: PairedTest | None = None,
) -> GateDecision:
    """Compare the new version with the champion, or with the bare backbone if there is no champion yet.

    All metrics must come from the same rows. For `loss`, lower is better and `floor` is the maximum. `paired` can only
    refuse a version that the gain alone would accept; without it, only the gain decides.
    """
    name, sign = gate.metric, (-1.0 if gate.metric == "loss" else 1.0)
    rival, than = (backbone_metrics, "backbone") if champion_metrics is None else (champion_metrics, "champion")
    value, other = metrics.get(name, math.nan), rival.get(name, math.nan)
    if not math.isfinite(value):
        return GateDecision(False, f"{name} could not be measured: no test or validation rows")
    if gate.floor is not None and sign * (value - gate.floor) < -ROUNDING:
        side = "above" if sign < 0 else "below"
        return GateDecision(False, f"{name} {value:.4f} is {side} the gate's floor of {gate.floor:g}")
    if not math.isfinite(other):
        return GateDecision(True, f"{name} {value:.4f}; the {than} has no {name} to compare with")
    gain = sign * (value - other)
    compared = (
        f"{name} {value:.4f} against {other:.4f} of the {than}: gain {gain:+.4f}, gate requires {gate.min_gain:+g}"
    )
    enough = gain >= gate.min_gain - ROUNDING
    if champion_metrics is None:
        return GateDecision(enough, compared)
    if paired is None:
        return GateDecision(enough, f"{compared}; decided by the gain, since there are no scores by row")
    compared = f"{compared}; {paired.said()}"
    if not enough or gate.evidence == "none":
        return GateDecision(enough, compared)
    if paired.p_worse < gate.level:
        return GateDecision(False, f"{compared}: significantly worse at {gate.level:g}")
    if gate.evidence == "better" and paired.p_better >= gate.level:
        return GateDecision(False, f"{compared}: not significantly better at {gate.level:g}, as gate.evidence requires")
    return GateDecision(True, compared)
