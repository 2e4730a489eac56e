"""Adapters at risk: a gate refused the newest version, or answers fail more often than before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sources.adapters import gate_of
from sources.serving import OWN

if TYPE_CHECKING:
    from pedro.store import Version
    from pedro.traffic.history import Interval

REFUSED, FAILING = "gate refused", "errors are rising"
LATELY_S = 900.0
FEWEST = 3  # failed answers lately
LEAST_SHARE = 0.01  # of the answers lately
GROWN = 2.0  # as often as before


@dataclass(frozen=True)
class Risk:
    """What is wrong with an adapter, or with the backbone where `model` names it."""

    model: str
    what: str
    detail: str


def refused(versions: Iterable[Version], champions: Mapping[str, int | None]) -> list[Risk]:
    """Of versions, newest first, those that their gate refused and no later one followed."""
    newest: dict[str, Version] = {}
    for version in versions:
        newest.setdefault(version.name, version)
    risks = []
    for name, version in newest.items():
        verdict, reason = gate_of(version)
        if verdict == "refused":
            anyway = "in service all the same" if champions.get(name) == version.version else reason
            risks.append(Risk(name, REFUSED, f"v{version.version}: {anyway}"))
    return risks


def rising(intervals: Iterable[Interval], now: float) -> list[Risk]:
    """Those whose share of failed answers is at least `GROWN` times that of the earlier intervals, the worst first."""
    answers: dict[str, list[float]] = {}  # failed and all lately, failed and all before
    for interval in intervals:
        at = 0 if interval.end > now - LATELY_S else 2
        for name, traffic in interval.traffic.items():
            if name != OWN:
                counts = answers.setdefault(name, [0.0] * 4)
                counts[at] += traffic.counts.get("failed", 0.0)
                counts[at + 1] += traffic.counts.get("requests", 0.0)
    risks = []
    for name, (failed, asked, failed_before, asked_before) in answers.items():
        share, before = failed / max(asked, 1.0), failed_before / max(asked_before, 1.0)
        if failed >= FEWEST and share >= max(LEAST_SHARE, GROWN * before):
            told = f"{failed:,.0f} of {asked:,.0f} answers failed in the last {LATELY_S / 60:.0f} minutes"
            earlier = f", {failed_before:,.0f} of {asked_before:,.0f} before" if asked_before else ""
            risks.append((-share, Risk(name, FAILING, told + earlier)))
    return [risk for _, risk in sorted(risks, key=lambda each: (each[0], each[1].model))]
