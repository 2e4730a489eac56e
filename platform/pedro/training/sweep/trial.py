"""One trial of a sweep: a job up to its adapter, which the sweep registers if it is the best.

Runs in a process started by Ray Tune, which is idle while its workers train.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pedro.errors import PedroError, UnavailableError
from pedro.registry import Registry
from pedro.training.sweep.records import Records, Trial, TrialOutcome, TrialState
from pedro.training.sweep.variants import variant
from pedro.training.trainer import WorkersLost, fit, unpack_settings


def run_trial(config: dict[str, Any]) -> None:
    """Train one trial and record its result, even a failure, which affects only this trial.

    `config`: sweep (id), settings, run_id (of the sweep), number.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    settings = unpack_settings(config["settings"])
    records = Records(settings.storage, config["sweep"])
    trial = records.trials()[config["number"]]
    if trial.state.final:  # it had ended when its driver was killed
        return
    started = time.monotonic()
    try:
        outcome = _train(trial, config, [TuneReportCallback()])
    except (WorkersLost, UnavailableError) as error:
        outcome = TrialOutcome(TrialState.LOST, trial.attempt, error.message)
    except PedroError as error:
        outcome = TrialOutcome(TrialState.FAILED, trial.attempt, error.message)
    seconds = round(time.monotonic() - started, 2)
    records.write_outcome(trial.number, TrialOutcome(**{**asdict(outcome), "seconds": seconds}))


def _train(trial: Trial, config: dict[str, Any], callbacks: list[Any]) -> TrialOutcome:
    settings = unpack_settings(config["settings"])
    spec = Records(settings.storage, config["sweep"]).spec()
    origin = {
        "id": config["sweep"],
        "name": spec.name,
        "run_id": config["run_id"],
        "trial": trial.number,
        "trial_run_id": trial.run_id,
        "parameters": trial.parameters,
    }
    with tempfile.TemporaryDirectory() as scratch:
        result = fit(
            variant(spec, trial.parameters),
            settings,
            trial.run_id,
            trial.job_id(config["sweep"]),
            Path(scratch),
            extra={"sweep": origin},
            callbacks=callbacks,
        )
        Registry.open(settings).log_artifacts(trial.run_id, result.directory, "adapter")
    return TrialOutcome(
        TrialState.FINISHED,
        trial.attempt,
        digest=result.digest,
        metrics=result.metrics,
        trainable_parameters=result.trainable_parameters,
        champion=asdict(result.champion) if result.champion else None,
    )
