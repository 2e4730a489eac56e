"""One sweep, from spec to version: `python -m pedro.training.sweep.job --sweep ID`, or `--spec FILE [key=value …]`.

The outline: check, prepare, run the trials, register the best, report. The last line on standard output is the result
as one JSON object. After a kill, the same command with `--sweep ID` resumes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pedro.backbone import resolve_backbone
from pedro.backbones.sharing import obtain_backbone
from pedro.config import Settings
from pedro.errors import ConfigError, PedroError, TrainingError
from pedro.provenance import provenance
from pedro.registry import CHAMPION, Registry, Version
from pedro.training.driver import connect_driver, drive, fail, log_beside, log_line
from pedro.training.job import Log, check_data, flat, judge_version, move_alias
from pedro.training.job_log import keeping_log
from pedro.training.job_record import OwnRecord
from pedro.training.job_usage import enter_training
from pedro.training.sweep.launch import create
from pedro.training.sweep.planner import make_planner
from pedro.training.sweep.records import Records, SweepRecord, Trial, TrialState
from pedro.training.sweep.report import SweepProgress, rows_of, write_sweep_report
from pedro.training.sweep.spec import SweepSpec, load_sweep_spec
from pedro.training.sweep.told import TrialEvents
from pedro.training.sweep.tracker import TrialTracker
from pedro.training.sweep.variants import check_sweep, variant
from pedro.training.trainer import Champion, Result, unservable


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep, as printed by `pedro sweep --wait --json`."""

    sweep: str
    name: str
    model: str
    """The version of the best trial, `tenant.adapter:version`."""
    alias: str
    gate: str
    digest: str
    best: dict[str, Any]
    """trial, parameters, metrics."""
    counts: dict[str, int]
    """Trials by state."""
    kept: int
    """Trials that had ended before this driver started, and were not repeated."""
    trials: list[dict[str, Any]]
    directory: str
    """summary.json, trials.csv and parallel.png, on the driver's host; also artifacts of the run."""
    run_id: str
    seconds: float
    """Of this driver."""
    evidence: dict[str, Any] | None = None
    """The comparison of the version with the champion, row by row, if there was one."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_sweep(
    sweep_id: str,
    settings: Settings,
    registry: Registry,
    log: Log = print,
    *,
    attempt: int = 1,
    at_once: int | None = None,
) -> SweepResult:
    """Run a sweep, or the rest of it, on the Ray cluster that this process is connected to.

    `attempt` is the number of this driver's start; `at_once` how many concurrent trials the controller allows. If it
    raises PedroError, finished trials are kept, and the same call resumes from there.
    """
    from pedro.training.sweep.tuning import concurrent_trials, run_trials

    started = time.monotonic()
    records = Records(settings.storage, sweep_id)
    spec = records.spec()
    check_data(spec.base, settings, log)
    run_id = _own_run(records, spec, registry)
    status = "FAILED"
    try:
        tracker = TrialTracker(records, spec, make_planner(spec, records.trials()), registry, run_id)
        if tracker.waiting:
            most = at_once or spec.concurrency or concurrent_trials(spec.base.resources)
            concurrency = min(most, tracker.waiting)
            kept = f"{tracker.kept} of {tracker.planner.total} trials had already ended; " if tracker.kept else ""
            log(f"sweep {sweep_id}: {kept}{tracker.waiting} trials to run, {concurrency} at a time")
            experiment = sweep_id if attempt == 1 else f"{sweep_id}-again-{attempt - 1}"
            progress, events = SweepProgress(tracker, log), TrialEvents(tracker, registry.store)

            def show(changed: bool) -> None:
                progress.show(changed)
                if changed:
                    events.tell()

            run_trials(tracker, settings, experiment, concurrency, show)
            events.tell()
        result = _finish(tracker, settings, registry, started, log)
        status = "FINISHED"
        return result
    finally:
        registry.finish_run(run_id, status)


def _own_run(records: Records, spec: SweepSpec, registry: Registry) -> str:
    """The sweep's run in MLflow, the parent of its trials' runs; created once."""
    record = records.record()
    assert record is not None
    if record.run_id:
        return record.run_id
    space = {f"space.{key}": f"{dimension.kind} {list(dimension.values)}" for key, dimension in spec.space.items()}
    how = flat({"search": spec.search.model_dump(), "scheduler": spec.scheduler.model_dump()})
    run_id = registry.start_run(
        experiment=spec.base.name,
        name=records.sweep_id,
        params={**space, **how, **flat(spec.to_dict()["base"], "base.")},
        tags={"sweep": records.sweep_id, "sweep_name": spec.name, "model": spec.base.name},
    )
    records.write_record(replace(record, run_id=run_id))
    return run_id


def _finish(tracker: TrialTracker, settings: Settings, registry: Registry, started: float, log: Log) -> SweepResult:
    best = tracker.best
    if best is None or best.outcome is None:
        last = next((trial for trial in reversed(tracker.trials) if trial.message), None)
        why = f"; trial {last.number}: {last.message}" if last else ""
        raise TrainingError(f"sweep {tracker.records.sweep_id}: none of its {len(tracker.trials)} trials finished{why}")
    version, alias, gate = _register(tracker, best, registry)
    outcome, counts = best.outcome, tracker.counts()
    chosen = {"trial": best.number, "parameters": best.parameters, "metrics": outcome.metrics}
    folder = settings.home / "sweeps" / tracker.records.sweep_id
    result = SweepResult(
        sweep=tracker.records.sweep_id,
        name=tracker.spec.name,
        model=version.ref,
        alias=alias,
        gate=gate,
        digest=version.digest,
        best={**chosen, "trainable_parameters": outcome.trainable_parameters, "run_id": best.run_id},
        counts=counts,
        kept=tracker.kept,
        trials=rows_of(tracker.trials),
        directory=str(folder),
        run_id=tracker.run_id,
        seconds=round(time.monotonic() - started, 2),
        evidence=(outcome.champion or {}).get("paired"),
    )
    summary = {**result.to_dict(), "spec": tracker.spec.to_dict(), "provenance": provenance()}
    write_sweep_report(tracker, folder, summary)
    registry.log_artifacts(tracker.run_id, folder, "sweep")
    scores = {f"best/{name}": value for name, value in outcome.metrics.items() if isinstance(value, (int, float))}
    registry.log_metrics(
        tracker.run_id, len(tracker.trials), {**scores, **{f"trials/{k}": v for k, v in counts.items()}}
    )
    registry.tag_run(tracker.run_id, {"version": version.ref, "best_trial": str(best.number)})
    log(f"{version.ref} is {'the champion' if alias == CHAMPION else 'kept as candidate'}: {gate}")
    if counts[TrialState.LOST]:
        log(f"{counts[TrialState.LOST]} trials were lost; `pedro sweep … --resume` repeats them")
    return result


def _register(tracker: TrialTracker, best: Trial, registry: Registry) -> tuple[Version, str, str]:
    """Register the best trial's adapter through the gate. Returns the version, its alias and why. Idempotent."""
    job = variant(tracker.spec, best.parameters)
    for version in registry.versions(job.name):
        if version.run_id == best.run_id and version.gate:
            alias = CHAMPION if version.gate.startswith("passed") else "candidate"
            return version, alias, version.gate.partition(": ")[2]
    assert best.outcome is not None
    obtain_backbone(Settings.from_env(), job.backbone)
    champion = Champion(**best.outcome.champion) if best.outcome.champion else None
    with tempfile.TemporaryDirectory() as scratch:
        directory = registry.download_artifacts(best.run_id, "adapter", Path(scratch), of=f"trial {best.number}")
        version = registry.register(best.run_id, directory, job.tenant, job.adapter)
        trained = Result(
            best.outcome.digest,
            best.outcome.metrics,
            best.outcome.trainable_parameters,
            champion,
            directory,
            unservable(directory, resolve_backbone(job.backbone)),
        )
    decision = judge_version(job, trained, registry)
    alias, decision = move_alias(registry, version, decision, champion.version if champion else None)
    return version, alias, decision.reason


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the Ray job."""
    parser = argparse.ArgumentParser(prog="pedro.training.sweep.job", description="Run one sweep, or resume it.")
    parser.add_argument("--sweep", help="the id of a sweep prepared by `pedro sweep`, or interrupted")
    parser.add_argument("--spec", help="a YAML spec, for a new sweep")
    parser.add_argument(
        "--attempt", type=int, default=None, help="the number of this start, if a controller counts them"
    )
    parser.add_argument("--at-once", type=int, default=None, help="concurrent trials allowed by the controller")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the spec")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_env()
        record = _record(options, settings)
    except PedroError as error:
        return fail(error.message)
    with keeping_log(settings.storage, record.id):
        return _drive(options, record, settings)


class _OwnRow(OwnRecord):
    """A sweep's row: trials are in its records, the metrics are the best trial's."""

    def succeeded(self, result: dict[str, Any]) -> None:
        told = {name: value for name, value in result.items() if name != "trials"}
        super().succeeded({**told, "metrics": result["best"]["metrics"]})


def _drive(options: argparse.Namespace, record: SweepRecord, settings: Settings) -> int:
    """Run the sweep, update its row, and add its trials' training to the usage ledger."""
    own = _OwnRow(settings.database_url, record.id, log_line, options.attempt)

    def work() -> dict[str, Any]:
        own.running()
        connect_driver(log_to_driver=False)
        registry, counted = Registry.open(settings), options.attempt or 1
        result = run_sweep(record.id, settings, registry, log_line, attempt=counted, at_once=options.at_once)
        _enter_trials(record.id, settings)  # before its end is recorded, after which nothing restarts it
        return result.to_dict()

    code = drive(work, "sweep", f"`pedro jobs logs {record.id} --raw` shows where; --resume resumes it", own)
    _enter_trials(record.id, settings)
    return code


def _enter_trials(sweep_id: str, settings: Settings) -> None:
    """Add its trials' training to the usage ledger; trials already there are not added again."""
    records = Records(settings.storage, sweep_id)
    model = records.spec().base.name
    for trial in records.trials():
        for attempt in range(1, trial.attempt + 1):
            enter_training(settings, replace(trial, attempt=attempt).job_id(sweep_id), model, log_beside)


def _record(options: argparse.Namespace, settings: Settings) -> SweepRecord:
    if bool(options.sweep) == bool(options.spec):
        raise ConfigError("pass either --sweep ID or --spec FILE", param="--sweep")
    if options.spec:
        spec = load_sweep_spec(options.spec, options.overrides)
        check_sweep(spec)
        record = create(spec, settings)
        log_line(f"sweep {record.id}; if it is interrupted: --sweep {record.id}")
        return record
    known = Records(settings.storage, options.sweep).record()
    if known is None:
        raise ConfigError(f"--sweep: {options.sweep!r} does not exist in {settings.storage}", param="--sweep")
    return known


if __name__ == "__main__":
    sys.exit(main())
