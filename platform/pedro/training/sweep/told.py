"""Reports each finished trial to the sweep's followers, as an event of its job."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pedro.errors import UnavailableError
from pedro.training.sweep.records import TrialState

if TYPE_CHECKING:
    from pedro.store import Store
    from pedro.training.sweep.records import Trial
    from pedro.training.sweep.tracker import TrialTracker


class TrialEvents:
    """Each trial is reported once, also across restarts of the driver."""

    def __init__(self, tracker: TrialTracker, store: Store) -> None:
        self._tracker, self._store = tracker, store
        self._told: set[tuple[int, int]] = set()  # number and attempt

    def tell(self) -> None:
        """Report trials that have ended since the last call; retried in the next call if the database is away."""
        for trial in self._tracker.trials:
            if trial.state is TrialState.RUNNING or (trial.number, trial.attempt) in self._told:
                continue
            message, data = trial_event(trial, self._tracker.planner.total)
            kind = "metrics" if "valid_loss" in data else "message"
            try:
                self._store.add_job_event(self._tracker.records.sweep_id, message, kind=kind, data=data, once=True)
            except UnavailableError:
                return
            self._told.add((trial.number, trial.attempt))


def trial_event(trial: Trial, total: int) -> tuple[str, dict[str, Any]]:
    """The event's text and its data; missing losses are omitted."""
    values = ", ".join(f"{key}={value}" for key, value in trial.parameters.items())
    loss = trial.loss if trial.loss is not None and math.isfinite(trial.loss) else None
    how = f"validation loss {loss:.4f}" if loss is not None else trial.message or "no validation loss"
    data: dict[str, Any] = {"trial": trial.number, "trials": total, "state": trial.state.value}
    if loss is not None:
        data |= {"step": trial.step, "valid_loss": loss}
    return f"Trial {trial.number} {trial.state.value}: {how} ({values})", {**data, "parameters": trial.parameters}
