"""Tracks the trials of a sweep: keeps records, MLflow runs and the planner in sync. Does not import Ray.

Everything runs in the driver, on one thread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pedro.training.job import flat
from pedro.training.sweep.records import Records, Trial, TrialState
from pedro.training.sweep.variants import variant

if TYPE_CHECKING:
    from pedro.registry import Registry
    from pedro.training.sweep.planner import TrialPlanner
    from pedro.training.sweep.spec import SweepSpec

RUN_STATUS = {
    TrialState.FINISHED: "FINISHED",
    TrialState.STOPPED: "KILLED",
    TrialState.FAILED: "FAILED",
    TrialState.LOST: "FAILED",
}


class TrialTracker:
    """The trials of one sweep. Unfinished trials come first, then the planner's proposals."""

    def __init__(
        self, records: Records, spec: SweepSpec, planner: TrialPlanner, registry: Registry, run_id: str
    ) -> None:
        self.records, self.spec, self.planner = records, spec, planner
        self.registry, self.run_id = registry, run_id
        self.trials = records.trials()
        self._open = [trial.number for trial in self.trials if not trial.state.final]
        self.kept = len(self.trials) - len(self._open)
        """Trials that had ended before this driver started, and are not repeated."""
        for trial in self.trials:
            if trial.state.final:
                self._close(trial)  # the driver may have been killed between a trial's result and this

    @property
    def waiting(self) -> int:
        """How many trials have yet to be started."""
        return len(self._open) + max(0, self.planner.total - len(self.trials))

    def next(self) -> Trial | None:
        """Begin a trial, or resume an interrupted one; None if none is left."""
        if self._open:
            trial = self.trials[self._open.pop(0)]
            if trial.state is TrialState.LOST:
                trial = replace(trial, state=TrialState.RUNNING, attempt=trial.attempt + 1, reports=(), message="")
            return self._keep(replace(trial, state=TrialState.RUNNING, outcome=None))
        number = len(self.trials)
        if number >= self.planner.total:
            return None
        parameters = self.planner.propose(number)
        job = variant(self.spec, parameters)
        run_id = self.registry.start_run(
            experiment=job.name,
            name=f"{self.records.sweep_id}-trial-{number:03d}",
            params=flat(job.to_dict()),
            tags={"sweep": self.records.sweep_id, "trial": str(number), "model": job.name},
            parent=self.run_id,
        )
        trial = Trial(number, parameters, run_id)
        self.trials.append(trial)
        return self._keep(trial)

    def report(self, number: int, step: int, steps: int, loss: float) -> None:
        """Record a validation."""
        trial = self.trials[number]
        if step > trial.step:
            self._keep(replace(trial, reports=(*trial.reports, (step, loss)), steps=steps))

    def ended(self, number: int, broke: str | None = None) -> Trial:
        """Record the end of a trial: by its own result, else as stopped, or as lost if it `broke`."""
        trial = self.trials[number]
        outcome = self.records.outcome(trial)
        if outcome:
            trial = replace(trial, state=outcome.state, message=outcome.message, outcome=outcome)
        elif broke is not None:
            trial = replace(trial, state=TrialState.LOST, message=broke)
        else:
            trial = replace(
                trial, state=TrialState.STOPPED, message=f"stopped at step {trial.step:,}: others were better"
            )
        self._keep(trial)
        self._close(trial)
        self.planner.learn(trial)
        return trial

    @property
    def best(self) -> Trial | None:
        """The finished trial with the lowest validation loss."""
        finished = [(t.loss, t.number, t) for t in self.trials if t.state is TrialState.FINISHED and t.loss is not None]
        return min(finished)[2] if finished else None

    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return {state.value: sum(trial.state is state for trial in self.trials) for state in TrialState}

    def _keep(self, trial: Trial) -> Trial:
        self.trials[trial.number] = trial
        self.records.write_trial(trial)
        return trial

    def _close(self, trial: Trial) -> None:
        self.registry.tag_run(trial.run_id, {"trial_state": trial.state, "message": trial.message})
        self.registry.finish_run(trial.run_id, RUN_STATUS[trial.state])
