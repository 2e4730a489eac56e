"""One fine-tuning job from spec to champion: `python -m pedro.training.job --spec FILE [--job-id ID] [key=value …]`.

The outline: resolve, prepare the data, train, register, gate, promote. The last line on standard output is the result
as one JSON object; a failure is one line on standard error and exit code 1, and registers nothing. The job's record
and its log in the storage are written here, not by observers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pedro import tracing
from pedro.config import Settings
from pedro.errors import ConfigError, DataError, NotFoundError, PedroError
from pedro.refs import ModelRef
from pedro.registry import CHAMPION, Registry, Version
from pedro.registry.queries import find_run_of_job
from pedro.spec_reader import validate_spec
from pedro.store import JobStatus, Store
from pedro.training.allowed_files import check_allowed_files
from pedro.training.driver import connect_driver, drive, fail, log_beside, log_line
from pedro.training.job_log import keeping_log
from pedro.training.job_record import OwnRecord
from pedro.training.job_results import store_results
from pedro.training.job_usage import enter_training
from pedro.training.paired_test import PairedTest
from pedro.training.promotion_gate import GateDecision, decide
from pedro.training.scored_rows import FILE, keep_rows
from pedro.training.spec import FineTuneSpec, load_finetune_spec
from pedro.training.storage import fetch, put_dataset
from pedro.training.trainer import Result, fit
from pedro.training.uploaded_files import with_uploaded_files

Log = Callable[[str], None]
Fit = Callable[..., Result]
"""`trainer.fit`, or a replacement with the same interface."""


@dataclass(frozen=True)
class JobResult:
    """The result of a job, as printed by `pedro submit --wait --json`."""

    model: str
    """`tenant.adapter:version`."""
    alias: str
    """champion, or candidate if the gate refused."""
    gate: str
    digest: str
    metrics: dict[str, Any]
    trainable_parameters: int
    steps: int
    optimizer_steps: int
    seconds: float
    """Of the whole job, including the start of workers; `metrics.seconds` is only the training."""
    job_id: str
    run_id: str
    result_files: list[str] = field(default_factory=list)
    """Ids of files with its metrics, for jobs over HTTP."""
    evidence: dict[str, Any] | None = None
    """The comparison of the version with the champion, row by row (`PairedTest`), if there was one."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_job(
    spec: FineTuneSpec,
    settings: Settings,
    registry: Registry,
    job_id: str | None = None,
    log: Log = print,
    train: Fit | None = None,
) -> JobResult:
    """Run one job on the Ray cluster that this process is connected to; `train` replaces `trainer.fit`.

    Raises PedroError; then nothing is registered, and the run in MLflow is FAILED.
    """
    started = time.monotonic()
    job_id = job_id or new_job_id()
    with tracing.span("check data"):
        check_data(spec, settings, log)
    run_id = _run_of(job_id, spec, registry)
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            followed = _came_over_http(registry, job_id)
            with tracing.span("train and score"):
                trained = (train or fit)(spec, settings, run_id, job_id, Path(scratch), checkpoint_models=followed)
            with tracing.span("register"):
                _log_spec(registry, run_id, spec, Path(scratch))
                log("scored; registering")
                keep_rows(settings.storage, job_id, Path(scratch) / FILE, log)
                version = _registered(registry, spec.name, run_id) or registry.register(
                    run_id, trained.directory, spec.tenant, spec.adapter
                )
        with tracing.span("gate"):
            if version.aliases:  # an earlier driver was lost after everything was done
                alias, decision = version.aliases[0], GateDecision(CHAMPION in version.aliases, version.gate)
            else:
                decision = judge_version(spec, trained, registry)
                judged_against = trained.champion.version if trained.champion else None
                alias, decision = move_alias(registry, version, decision, judged_against)
            evidence = trained.champion.paired if trained.champion else None
            tags = {"version": version.ref, "alias": alias, "gate": decision.reason}
            registry.tag_run(run_id, {**tags, **({"evidence": json.dumps(evidence)} if evidence else {})})
        status = "FINISHED"
    finally:
        registry.finish_run(run_id, status)
    log(f"{version.ref} is {'the champion' if alias == CHAMPION else 'kept as candidate'}: {decision.reason}")
    return JobResult(
        model=version.ref,
        alias=alias,
        gate=decision.reason,
        digest=version.digest,
        metrics=trained.metrics,
        trainable_parameters=trained.trainable_parameters,
        steps=trained.metrics["steps"],
        optimizer_steps=trained.metrics["optimizer_steps"],
        seconds=round(time.monotonic() - started, 2),
        job_id=job_id,
        run_id=run_id,
        evidence=evidence,
    )


def _came_over_http(registry: Registry, job_id: str) -> bool:
    """Whether the job can be followed through the API, where its checkpoints are models."""
    with suppress(NotFoundError):
        return registry.store.get_job(job_id).key_id is not None
    return False


def _run_of(job_id: str, spec: FineTuneSpec, registry: Registry) -> str:
    """The job's run in MLflow: a new one, or that of its earlier drivers."""
    begun = find_run_of_job(registry, spec.name, job_id)
    if begun is not None:
        registry.reopen_run(begun.id)
        return begun.id
    return registry.start_run(
        experiment=spec.name,
        name=job_id,
        params=flat(spec.to_dict()),
        tags={"job": job_id, "model": spec.name},
    )


def _registered(registry: Registry, name: str, run_id: str) -> Version | None:
    """The version that an earlier driver registered."""
    return next((version for version in registry.versions(name) if version.run_id == run_id), None)


def check_data(spec: FineTuneSpec, settings: Settings, log: Log) -> None:
    """Validate the files before a worker is started.

    Nothing is tokenised here, to keep the driver light (no torch models, no tokenizer); workers check the rest. Raises
    DataError with the file's role and the first bad line.
    """
    from pedro.data.check import check_file
    from pedro.data.files import Kind
    from pedro.data.preferences import check_objective

    counts = []
    for role, location in spec.data.files().items():
        report = check_file(fetch(location, settings.cache), fields=spec.data.fields)
        if not report.usable:
            first = report.errors[0] if report.errors else None
            unit = Kind(report.kind).unit
            why = f"{unit} {first['line']}: {first['field']}: {first['reason']}" if first else "it holds no examples"
            more = f"; and {report.error_count - 1:,} more bad lines" if report.error_count > 1 else ""
            raise DataError(f"data.{role}: {why}{more}; `pedro data check` lists them", param=f"data.{role}")
        check_objective(spec.objective, role, str(report.shape))
        counts.append(f"{report.examples:,} in {role}")
        if report.numbers:
            log(f"data.{role}: {report.numbers_said()}")
    log(f"{spec.name}: examples: {', '.join(counts)}")


def judge_version(spec: FineTuneSpec, trained: Result, registry: Registry) -> GateDecision:
    """The gate's decision. Versions that cannot be served do not pass, and a champion that could not be compared, or
    was replaced meanwhile, is kept."""
    if trained.unservable:
        return GateDecision(False, f"it cannot be served: {trained.unservable}")
    champion = trained.champion
    if _champion(registry, spec.name) != (champion.version if champion else None):
        return GateDecision(
            False, "the champion changed while this version was scored; compare and promote it manually"
        )
    if champion and champion.metrics is None:
        return GateDecision(
            False, f"the champion {spec.ref.at(champion.version)} cannot be compared: {champion.problem}"
        )
    metrics = trained.metrics
    names = ("accuracy", "loss", "preference_accuracy")
    bare = {name: metrics[f"backbone_{name}"] for name in names if f"backbone_{name}" in metrics}
    paired = PairedTest(**champion.paired) if champion and champion.paired else None
    return decide(spec.gate, metrics, champion.metrics if champion else None, bare, paired)


def read_spec(location: str, cache: Path, overrides: Sequence[str] = ()) -> FineTuneSpec:
    """A job's spec: the resolved JSON of `submit`, or a YAML file with `overrides` applied to it."""
    if not location.endswith(".json"):
        return load_finetune_spec(location, overrides)
    if overrides:
        raise ConfigError(f"{overrides[0]!r}: {location} is resolved already; give overrides to `pedro submit` instead")
    try:
        values = json.loads(fetch(location, cache).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{location}: cannot be read as JSON ({error})", param="--spec") from error
    spec = validate_spec(values, FineTuneSpec, source=location)
    check_allowed_files({f"data.{role}": file for role, file in spec.data.files().items()}, Settings.from_env())
    return spec


def stage(spec: FineTuneSpec, storage: str) -> FineTuneSpec:
    """The spec with its data files copied to the storage, named by content, for every host."""
    stored = {name: put_dataset(file, storage) for name, file in spec.data.files().items()}
    return spec.model_copy(update={"data": spec.data.model_copy(update=stored)})


def new_job_id() -> str:
    """An id in the form of the store's."""
    return f"ftjob-{uuid.uuid4().hex[:24]}"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the Ray job."""
    parser = argparse.ArgumentParser(prog="pedro.training.job", description="Run one fine-tuning job.")
    parser.add_argument("--spec", required=True, help="a spec: YAML, or the resolved JSON of `pedro submit`")
    parser.add_argument("--job-id", default=None)
    parser.add_argument(
        "--attempt", type=int, default=None, help="the number of this start, if a controller counts them"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of a YAML spec")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_env()
    except PedroError as error:
        return fail(error.message)
    job_id = options.job_id or new_job_id()
    with keeping_log(settings.storage, job_id):
        return _drive(options, settings, job_id)


def _drive(options: argparse.Namespace, settings: Settings, job_id: str) -> int:
    """Run the job and trace it."""
    tracing.start("pedro-job", job_id)
    with tracing.span("driver", tracing.of_job(job_id), job=job_id, attempt=options.attempt):
        code = drive_job(
            lambda: read_spec(options.spec, settings.cache, options.overrides), settings, job_id, options.attempt
        )
    _end_trace(settings, job_id)
    return code


def drive_job(
    read: Callable[[], FineTuneSpec], settings: Settings, job_id: str, attempt: int | None, train: Fit | None = None
) -> int:
    """Run a job, update its record, and add its training to the usage ledger; returns the exit code."""
    record = OwnRecord(settings.database_url, job_id, log_line, attempt)
    begun: list[FineTuneSpec] = []

    def work() -> dict[str, Any]:
        record.running()
        spec = stage(with_uploaded_files(read(), settings), settings.storage)
        begun.append(spec)
        connect_driver()
        result = run_job(spec, settings, Registry.open(settings), job_id, log_line, train)
        enter_training(settings, job_id, spec.name, log_beside)  # before its end, after which nothing restarts it
        return {**result.to_dict(), "result_files": store_results(settings, job_id, log_line)}

    code = drive(work, "job", f"`pedro jobs logs {job_id} --raw` shows where", record)
    for spec in begun:
        enter_training(settings, job_id, spec.name, log_beside)
    return code


def _end_trace(settings: Settings, job_id: str) -> None:
    """Send the span of the whole job once it has ended, and pending ones."""
    if tracing.TRACER is None:
        return
    with suppress(PedroError):
        store = Store(settings.database_url)
        try:
            job = store.get_job(job_id)
        finally:
            store.close()
        if job.status.final:
            facts = {"tenant": job.tenant, "model": ModelRef(job.tenant, job.adapter).name, "status": str(job.status)}
            tracing.TRACER.end_job(job_id, job.created, facts, job.status != JobStatus.SUCCEEDED)
    tracing.stop()


def _champion(registry: Registry, name: str) -> int | None:
    try:
        return registry.get(name, CHAMPION).version
    except NotFoundError:
        return None


def move_alias(
    registry: Registry, version: Version, decision: GateDecision, judged_against: int | None
) -> tuple[str, GateDecision]:
    """Make the version champion, or candidate if its gate refused. Returns which, and the final decision.

    `judged_against` is the champion that the gate compared it with; the decision is not valid for another one.
    """
    alias, reason = registry.judge(version, decision.passed, decision.reason, judged_against)
    return alias, GateDecision(alias == CHAMPION, reason)


def _log_spec(registry: Registry, run_id: str, spec: FineTuneSpec, scratch: Path) -> None:
    folder = scratch / "spec"
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(spec.to_dict(), indent=2))
    registry.log_artifacts(run_id, folder)


if __name__ == "__main__":
    sys.exit(main())
