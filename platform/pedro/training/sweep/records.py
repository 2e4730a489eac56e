"""What of a sweep must survive a kill: its spec, and one small file for each trial. Imports neither Ray nor MLflow.

Under `sweeps/<id>/` of the storage. `trials/<n>.json` is written by the sweep's driver alone, `results/<n>.json` by the
trial alone, so that no two processes ever write one file; a trial that has a result is never run again.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pedro.training.storage import DATASET, folders, join, read_text, write_text
from pedro.training.sweep.spec import SweepSpec

if TYPE_CHECKING:
    from pedro.search_space import Parameters

BY_SPEC = "by-spec"
LATER = ("fields", "special_tokens_in_content")  # of a spec's data: sweeps from before there were these are found too


class TrialState(StrEnum):
    """How a trial stands. RUNNING → FINISHED | STOPPED | FAILED | LOST; a resume runs RUNNING and LOST ones again."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """By the scheduler, for others were better."""
    FAILED = "failed"
    """By itself, for instance because it diverged; it would only do so again."""
    LOST = "lost"
    """By its surroundings: a worker was killed, a disk was full."""

    @property
    def final(self) -> bool:
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)


@dataclass(frozen=True)
class TrialOutcome:
    """What a trial says of its own end."""

    state: TrialState
    attempt: int
    message: str = ""
    digest: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    champion: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One trial, as the driver knows it."""

    number: int
    parameters: Parameters
    run_id: str
    state: TrialState = TrialState.RUNNING
    attempt: int = 1
    """Counts up when a lost trial is started anew; one that was only interrupted resumes as the same attempt."""
    reports: tuple[tuple[int, float], ...] = ()
    """(step, validation loss), as the scheduler saw them."""
    steps: int = 0
    """How many there will be; 0 before the first report."""
    message: str = ""
    outcome: TrialOutcome | None = None

    @property
    def loss(self) -> float | None:
        """The validation loss that counts: of the kept checkpoint if it finished, else the last finite one seen."""
        if self.outcome and "validation_loss" in self.outcome.metrics:
            kept: float = self.outcome.metrics["validation_loss"]
            return kept
        return next((loss for _, loss in reversed(self.reports) if math.isfinite(loss)), None)

    @property
    def step(self) -> int:
        """How far it got."""
        return self.reports[-1][0] if self.reports else 0

    def job_id(self, sweep_id: str) -> str:
        """The name of its Ray Train run; the same name resumes where it was interrupted."""
        again = f"-{self.attempt}" if self.attempt > 1 else ""
        return f"{sweep_id}-trial-{self.number:03d}{again}"


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as such."""

    id: str
    spec: dict[str, Any]
    run_id: str = ""
    """Its run in MLflow, once there is one."""


class Records:
    """The files of one sweep."""

    def __init__(self, storage: str, sweep_id: str) -> None:
        self.sweep_id = sweep_id
        self.location = join(storage, "sweeps", sweep_id)

    def record(self) -> SweepRecord | None:
        """The sweep itself; None if there is none of this id."""
        text = read_text(join(self.location, "sweep.json"))
        if text is None:
            return None
        fields = json.loads(text)  # those of earlier releases count their drivers, too
        return SweepRecord(fields["id"], fields["spec"], fields.get("run_id", ""))

    def write_record(self, record: SweepRecord) -> None:
        self._write("sweep.json", asdict(record))

    def spec(self) -> SweepSpec:
        """The resolved spec, its data in the storage."""
        record = self.record()
        assert record is not None, f"{self.sweep_id} has no record; the caller looks first"
        return SweepSpec.model_validate(record.spec)

    def trials(self) -> list[Trial]:
        """All trials that were ever begun, in order, with their own words on how they ended."""
        trials: list[Trial] = []
        while (trial := self.trial(len(trials))) is not None:
            trials.append(trial)
        return trials

    def trial(self, number: int) -> Trial | None:
        """One trial with its own word on how it ended; None if it was never begun."""
        text = read_text(self._trial(number))
        return None if text is None else self._with_outcome(_trial(json.loads(text)))

    def write_trial(self, trial: Trial) -> None:
        """For the driver."""
        self._write(f"trials/{trial.number:03d}.json", {**asdict(trial), "outcome": None})

    def write_outcome(self, number: int, outcome: TrialOutcome) -> None:
        """For the trial."""
        self._write(f"results/{number:03d}.json", asdict(outcome))

    def outcome(self, trial: Trial) -> TrialOutcome | None:
        """What this attempt of the trial said of its end, if it came so far."""
        text = read_text(join(self.location, f"results/{trial.number:03d}.json"))
        if text is None:
            return None
        fields = json.loads(text)
        outcome = TrialOutcome(**{**fields, "state": TrialState(fields["state"])})
        return outcome if outcome.attempt == trial.attempt else None

    def _with_outcome(self, trial: Trial) -> Trial:
        outcome = self.outcome(trial)
        return replace(trial, state=outcome.state, message=outcome.message, outcome=outcome) if outcome else trial

    def _trial(self, number: int) -> str:
        return join(self.location, f"trials/{number:03d}.json")

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        write_text(join(self.location, name), json.dumps(fields, indent=1))


def sweep_ids(storage: str) -> list[str]:
    """The sweeps that a storage holds."""
    return [name for name in folders(join(storage, "sweeps")) if name != BY_SPEC]


def remember(storage: str, spec: SweepSpec, sweep_id: str) -> None:
    """Make `sweep_id` the one that `recall` finds for this spec."""
    write_text(_by_spec(storage, spec), json.dumps({"id": sweep_id}))


def recall(storage: str, spec: SweepSpec) -> str | None:
    """The last sweep of exactly this spec, data included."""
    text = read_text(_by_spec(storage, spec)) or read_text(_by_spec(storage, spec, placed=True))
    return None if text is None else json.loads(text)["id"]


def _by_spec(storage: str, spec: SweepSpec, *, placed: bool = False) -> str:
    """Data sets count by their names, which are those of their contents: the home may have been moved. Earlier
    releases took their places (`placed`)."""
    fields = spec.to_dict()
    data = fields["base"]["data"].items()
    named = {name: value if placed else _name(value) for name, value in data if value or name not in LATER}
    fields["base"]["data"] = named
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return join(storage, "sweeps", BY_SPEC, f"{digest[:32]}.json")


def _name(value: Any) -> Any:
    found = DATASET.search(value) if isinstance(value, str) else None
    return value if found is None else value[found.start() :]


def _trial(fields: dict[str, Any]) -> Trial:
    reports = tuple((int(step), float(loss)) for step, loss in fields["reports"])
    return Trial(**{**fields, "state": TrialState(fields["state"]), "reports": reports})
