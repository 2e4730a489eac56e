"""A sweep's state that survives a kill: its spec, and one small file per trial. Imports neither Ray nor MLflow.

Stored under `sweeps/<id>/`. `trials/<n>.json` is only written by the sweep's driver, `results/<n>.json` only by the
trial, so that no file has two writers; a trial with a result is never repeated.
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
LATER = ("fields", "special_tokens_in_content")  # added to a spec's data later: sweeps without them are found


class TrialState(StrEnum):
    """A trial's state. RUNNING → FINISHED | STOPPED | FAILED | LOST; a resume repeats RUNNING and LOST ones."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """Stopped by the scheduler, because others were better."""
    FAILED = "failed"
    """Failed by itself, for instance by diverging; it would fail again."""
    LOST = "lost"
    """Lost for an external reason: a worker was killed, a disk was full."""

    @property
    def final(self) -> bool:
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)


@dataclass(frozen=True)
class TrialOutcome:
    """A trial's own record of its end."""

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
    """One trial, as known to the driver."""

    number: int
    parameters: Parameters
    run_id: str
    state: TrialState = TrialState.RUNNING
    attempt: int = 1
    """Incremented when a lost trial is restarted; an interrupted one resumes with the same attempt."""
    reports: tuple[tuple[int, float], ...] = ()
    """(step, validation loss), as reported to the scheduler."""
    steps: int = 0
    """The planned number of steps; 0 before the first report."""
    message: str = ""
    outcome: TrialOutcome | None = None

    @property
    def loss(self) -> float | None:
        """The trial's validation loss: of the kept checkpoint if it finished, else the last finite one."""
        if self.outcome and "validation_loss" in self.outcome.metrics:
            kept: float = self.outcome.metrics["validation_loss"]
            return kept
        return next((loss for _, loss in reversed(self.reports) if math.isfinite(loss)), None)

    @property
    def step(self) -> int:
        """The last step reached."""
        return self.reports[-1][0] if self.reports else 0

    def job_id(self, sweep_id: str) -> str:
        """The name of its Ray Train run; the same name resumes an interrupted run."""
        again = f"-{self.attempt}" if self.attempt > 1 else ""
        return f"{sweep_id}-trial-{self.number:03d}{again}"


@dataclass(frozen=True)
class SweepRecord:
    """The record of a sweep."""

    id: str
    spec: dict[str, Any]
    run_id: str = ""
    """Its run in MLflow, once it exists."""


class Records:
    """The files of one sweep."""

    def __init__(self, storage: str, sweep_id: str) -> None:
        self.sweep_id = sweep_id
        self.location = join(storage, "sweeps", sweep_id)

    def record(self) -> SweepRecord | None:
        """The sweep; None if it does not exist."""
        text = read_text(join(self.location, "sweep.json"))
        if text is None:
            return None
        fields = json.loads(text)  # earlier releases also counted drivers
        return SweepRecord(fields["id"], fields["spec"], fields.get("run_id", ""))

    def write_record(self, record: SweepRecord) -> None:
        self._write("sweep.json", asdict(record))

    def spec(self) -> SweepSpec:
        """The resolved spec, with data in the storage."""
        record = self.record()
        assert record is not None, f"{self.sweep_id} has no record; check first"
        return SweepSpec.model_validate(record.spec)

    def trials(self) -> list[Trial]:
        """All trials ever begun, in order, merged with their own results."""
        trials: list[Trial] = []
        while (trial := self.trial(len(trials))) is not None:
            trials.append(trial)
        return trials

    def trial(self, number: int) -> Trial | None:
        """One trial merged with its own result; None if it was never begun."""
        text = read_text(self._trial(number))
        return None if text is None else self._with_outcome(_trial(json.loads(text)))

    def write_trial(self, trial: Trial) -> None:
        """For the driver."""
        self._write(f"trials/{trial.number:03d}.json", {**asdict(trial), "outcome": None})

    def write_outcome(self, number: int, outcome: TrialOutcome) -> None:
        """For the trial."""
        self._write(f"results/{number:03d}.json", asdict(outcome))

    def outcome(self, trial: Trial) -> TrialOutcome | None:
        """The result of this attempt of the trial, if it has ended."""
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
    """The sweeps in a storage."""
    return [name for name in folders(join(storage, "sweeps")) if name != BY_SPEC]


def remember(storage: str, spec: SweepSpec, sweep_id: str) -> None:
    """Let `recall` find `sweep_id` for this spec."""
    write_text(_by_spec(storage, spec), json.dumps({"id": sweep_id}))


def recall(storage: str, spec: SweepSpec) -> str | None:
    """The last sweep of exactly this spec, data included."""
    text = read_text(_by_spec(storage, spec)) or read_text(_by_spec(storage, spec, placed=True))
    return None if text is None else json.loads(text)["id"]


def _by_spec(storage: str, spec: SweepSpec, *, placed: bool = False) -> str:
    """A digest in which data sets count by name, which depends on their content, since the home may have been moved.
    Earlier releases used their locations (`placed`)."""
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
