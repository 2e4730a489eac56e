"""Runs trials with Ray Tune: the next trial, early stopping, concurrency. Persistent state is in the tracker.

A resumed sweep is a new Tune experiment for the unfinished trials; the scheduler gets the others' reports again. So
nothing depends on when Tune last saved its state.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pedro.process import update_environment
from pedro.training.storage import join
from pedro.training.sweep.records import TrialState
from pedro.training.sweep.trial import run_trial
from pedro.training.trainer import ENVIRONMENT, pack_settings

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from pedro.config import Settings
    from pedro.training.spec import ResourcesSpec
    from pedro.training.sweep.spec import SweepSpec
    from pedro.training.sweep.tracker import TrialTracker

LOSS, STEP, STEPS = "dev_loss", "step", "steps"
UNBOUNDED_STEPS = 10**9
# A trial's own process waits for its workers. It reserves a tiny amount of a resource that only the head has, so that
# waiting trials take no CPUs from their workers.
WAITS_ON_HEAD = {"node:__internal_head__": 0.0001}
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the report of a finished adapter has no validation
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_trials(
    tracker: TrialTracker, settings: Settings, name: str, concurrency: int, show: Callable[[bool], None]
) -> None:
    """Run all unfinished trials, at most `concurrency` at a time.

    `show` is called repeatedly, with whether a trial just ended.
    """
    update_environment({**ENVIRONMENT, **TUNE_ENVIRONMENT})
    scheduler = make_scheduler(tracker.spec)
    tell(scheduler, tracker)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, tune.PlacementGroupFactory([WAITS_ON_HEAD])),
        param_space={"sweep": tracker.records.sweep_id, "settings": pack_settings(settings), "run_id": tracker.run_id},
        tune_config=tune.TuneConfig(
            search_alg=Next(tracker, scheduler),
            scheduler=scheduler,
            num_samples=tracker.waiting,
            max_concurrent_trials=concurrency,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:03d}",
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=join(settings.storage, "tune"),
            callbacks=[Watch(tracker, show)],
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    tuner.fit()


def concurrent_trials(resources: ResourcesSpec) -> int:
    """How many trials' workers fit on the cluster; at least 1, since a cluster may grow."""
    import ray

    there = ray.cluster_resources()
    needs = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    fits = [int(there.get(name, 0) // (need * resources.workers)) for name, need in needs.items() if need]
    return max(1, min(fits))


class Halving(ASHAScheduler):
    """ASHA, but without stopping trials that have finished training and only need scoring."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get(STEP, 0) >= result.get(STEPS, UNBOUNDED_STEPS):
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


def make_scheduler(spec: SweepSpec) -> TrialScheduler:
    """ASHA over Ω steps and the validation loss, or none."""
    if spec.scheduler.name == "none":
        return FIFOScheduler()
    tried = spec.space.get("training.max_steps")
    longest = max(steps or UNBOUNDED_STEPS for steps in (tried.values if tried else [spec.base.training.max_steps]))
    return Halving(
        time_attr=STEP,
        metric=LOSS,
        mode="min",
        grace_period=spec.grace_steps,
        max_t=max(longest, spec.grace_steps),
        reduction_factor=spec.scheduler.reduction,
        stop_last_trials=False,
    )


def tell(scheduler: TrialScheduler, tracker: TrialTracker) -> None:
    """Replay the reports of earlier trials to the scheduler."""
    for trial in tracker.trials:
        if trial.state in (TrialState.FINISHED, TrialState.STOPPED):
            _replay(scheduler, f"before-{trial.number}", trial.reports)


def _replay(scheduler: TrialScheduler, trial_id: str, reports: tuple[tuple[int, float], ...]) -> None:
    stand_in: Any = SimpleNamespace(trial_id=trial_id)
    controller: Any = None
    scheduler.on_trial_add(controller, stand_in)
    for step, loss in reports:
        scheduler.on_trial_result(controller, stand_in, {STEP: step, LOSS: loss})


class _OfThisProcess:
    """Not restored by Tune, which pickles its arguments: the records serve that purpose."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Next(_OfThisProcess, Searcher):
    """Passes the tracker's trials to Tune."""

    def __init__(self, tracker: TrialTracker, scheduler: TrialScheduler) -> None:
        super().__init__(metric=LOSS, mode="min")
        self._tracker, self._scheduler = tracker, scheduler

    def suggest(self, trial_id: str) -> Any:
        trial = self._tracker.next()
        if trial is None:
            return Searcher.FINISHED
        _replay(self._scheduler, trial_id, trial.reports)
        return {"number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """`Watch` informs the tracker, which informs the planner."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Watch(_OfThisProcess, tune.Callback):
    """Informs the tracker of Tune's events."""

    def __init__(self, tracker: TrialTracker, show: Callable[[bool], None]) -> None:
        self._tracker, self._show = tracker, show

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if LOSS in result:
            self._tracker.report(trial.config["number"], result[STEP], result[STEPS], result[LOSS])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tracker.ended(trial.config["number"])
        self._show(True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        text = str(trial.get_error() or "").strip()
        self._tracker.ended(trial.config["number"], broke=text.splitlines()[-1] if text else "its process died")
        self._show(True)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._show(False)
