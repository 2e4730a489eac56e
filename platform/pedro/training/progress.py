"""A job's progress, parsed from its log lines: phase, steps, remaining time.

The lines are those of `loop.py`, `trainer.py`, `worker.py` and `job.py`; a test trains and reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

PLANNED = re.compile(r"^training [\d,]+ parameters on [\d,]+ \w+, (?P<steps>[\d,]+) steps$")
STEP = re.compile(r"^step (?P<step>[\d,]+)/(?P<steps>[\d,]+) · ")
LEFT = re.compile(r" · (?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d\d) left$")
TRAINED = re.compile(r"^trained (?P<step>[\d,]+) steps")
SCORED = re.compile(r"^scored; registering")


def say(text: str) -> None:
    """Print a line for a person who reads the job's log."""
    print(text, flush=True)


def clock(seconds: float) -> str:
    """A time for a person, as `read_progress` reads it: 1:05, or 2:01:05 with hours."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase(StrEnum):
    """The phases of a job, in order."""

    VALIDATING = "validating"
    QUEUED = "queued"
    STARTING = "starting workers"
    TRAINING = "training"
    SCORING = "scoring"
    REGISTERING = "registering"


@dataclass(frozen=True)
class Progress:
    """`steps` is the planned number, 0 while unknown; `left_s` the remaining time at the speed so far."""

    phase: Phase
    step: int = 0
    steps: int = 0
    left_s: float | None = None

    @property
    def share(self) -> float:
        """The completed share of training, from 0 to 1."""
        if self.phase in (Phase.SCORING, Phase.REGISTERING):
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0


def read_progress(lines: Iterable[str]) -> Progress:
    """The latest progress in a running job's lines, which may start anywhere. A restarted driver starts over."""
    now = Progress(Phase.STARTING)
    for line in lines:
        if planned := PLANNED.match(line):
            now = Progress(Phase.TRAINING, 0, _number(planned["steps"]))
        elif step := STEP.match(line):
            left = LEFT.search(line)
            left_s = _seconds(left) if left else now.left_s
            now = Progress(Phase.TRAINING, _number(step["step"]), _number(step["steps"]), left_s)
        elif trained := TRAINED.match(line):
            now = replace(now, phase=Phase.SCORING, step=_number(trained["step"]), left_s=None)
        elif SCORED.match(line):
            now = replace(now, phase=Phase.REGISTERING)
    return now


def _seconds(left: re.Match[str]) -> float:
    return 3600.0 * int(left["hours"] or 0) + 60.0 * int(left["minutes"]) + int(left["seconds"])


def _number(text: str) -> int:
    return int(text.replace(",", ""))
