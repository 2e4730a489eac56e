"""Runs a job's workers on Ray Train (V2): starts them, keeps checkpoints, replaces lost ones, returns the result.

Workers get no credentials of the platform; they request data from the driver (`errands.py`). If a worker dies, it is
replaced, and its group resumes from the last checkpoint. A PedroError (a NaN loss, a full disk) would only recur:
workers return it as their result instead of raising it, so that it is not retried.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro import tracing
from pedro.backbones.sharing import obtain_backbone
from pedro.config import Settings
from pedro.errors import PedroError, TrainingError
from pedro.process import set_torch_threads, update_environment
from pedro.training.handed_adapters import HandedAdapter, hand_parent
from pedro.training.outbox import MODEL, OUTBOX, THE_CHAMPION
from pedro.training.progress import say
from pedro.training.scored_rows import FILE, write_rows
from pedro.training.spec import FineTuneSpec
from pedro.training.storage import join
from pedro.training.waiting_checkpoints import ADAPTER

if TYPE_CHECKING:
    import torch
    from ray.train import Checkpoint

    from pedro.backbone import Backbone
    from pedro.evaluation.scoring import Score
    from pedro.training.checkpoint_models import CheckpointModels
    from pedro.training.context import TrainingContext
    from pedro.training.engines import StepEngine
    from pedro.training.loop import Reporter, TrainState
    from pedro.training.worker import Trained
    from pedro.training.worker_group import WorkerGroup

STATE, ANSWER = "state", "answer.json"
ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports wait for it; Ray's default is 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # lost nodes are noticed anyway; it needs an extra process
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",  # a job may wait for resources for a day
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True)
class Champion:
    """The champion's score on this job's rows, or why it has none."""

    version: int
    metrics: dict[str, float] | None
    problem: str = ""
    paired: dict[str, Any] | None = None
    """The comparison of the new version with it, row by row (`PairedTest`); missing in trials of earlier releases."""


@dataclass(frozen=True)
class Result:
    """The workers' result for the driver; `directory` is the adapter, on the driver's host."""

    digest: str
    metrics: dict[str, Any]
    trainable_parameters: int
    champion: Champion | None
    directory: Path
    unservable: str = ""
    """Why the engine cannot serve the adapter; empty if it can."""


class WorkersLost(TrainingError):
    """Workers died too often; the same job may succeed later."""


def fit(
    spec: FineTuneSpec,
    settings: Settings,
    run_id: str,
    job_id: str,
    scratch: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    checkpoint_models: bool = False,
) -> Result:
    """Train on the cluster that this process is connected to; the adapter is then in `scratch`.

    An interrupted run of the same `job_id` resumes from its last checkpoint. `extra` is added to the manifest;
    `callbacks` are Ray Train's, and receive each checkpoint's report: step, steps, and dev_loss if known. With
    `checkpoint_models`, validated checkpoints become versions during training. Raises the workers' PedroError, or
    WorkersLost if they were lost more often than `max_failures`.
    """
    update_environment(ENVIRONMENT)
    import ray.train
    from ray.train.torch import TorchConfig

    from pedro.training.errands import Errands
    from pedro.training.lean_trainer import LeanTorchTrainer
    from pedro.training.lost_workers import TellLosses, reason

    resources, losses = spec.resources, TellLosses(spec.resources.max_failures)
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}
    per_worker = {"CPU": resources.cpus_per_worker, **gpus}
    run_config: Any = ray.train.RunConfig  # the types describe V1; V2's fields and return values differ
    loop: Any = work
    for_workers = settings.env_of_workers()
    trainer = LeanTorchTrainer(
        loop,
        train_loop_config={
            "spec": spec.to_dict(),
            "settings": for_workers,
            "job_id": job_id,
            "parent": hand_parent(spec, settings, job_id),
            "extra": dict(extra or {}),
            "checkpoint_models": checkpoint_models,
            "trace": tracing.TRACEPARENT.get(),
        },
        errands=Errands(settings, spec.ref, run_id, job_id),
        tell_lost=losses.tell,
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=run_config(
            name=job_id,
            storage_path=join(settings.storage, "runs"),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=[*callbacks, losses],
            worker_runtime_env={"env_vars": for_workers},
        ),
    )
    try:
        result: Any = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise WorkersLost(
            f"training: workers failed more than {resources.max_failures} times (resources.max_failures): "
            f"{reason(_first_failure(error))}"
        ) from error
    if isinstance(result.return_value, PedroError):
        raise result.return_value
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / ADAPTER, scratch / ADAPTER)
        if (Path(folder) / FILE).is_file():
            shutil.copy(Path(folder) / FILE, scratch / FILE)
        return read_result(Path(folder), scratch / ADAPTER)


def read_result(folder: Path, adapter: Path) -> Result:
    """What `write_result` wrote; the adapter is then in a separate directory."""
    answer = json.loads((folder / ANSWER).read_text())
    champion = answer.pop("champion")
    return Result(**answer, champion=Champion(**champion) if champion else None, directory=adapter)


def work(config: dict[Any, Any]) -> PedroError | None:
    """One Ray Train worker. Its result is in the last checkpoint; its return value is the error that stopped it."""
    quiet_worker()
    try:
        _work(config)
    except PedroError as error:
        return error
    return None


def _work(config: dict[str, Any]) -> None:
    import ray.train

    from pedro.training.worker_group import WorkerGroup

    context = ray.train.get_context()
    group = WorkerGroup(context.get_world_rank(), context.get_world_size())
    if all(group.gather(_finished(ray.train.get_checkpoint()))):  # all must agree, in case one cannot read it now
        return
    spec = FineTuneSpec.model_validate(config["spec"])
    settings = Settings.from_env(config["settings"])
    set_torch_threads(max(1, int(spec.resources.cpus_per_worker)))
    obtain_backbone(settings, spec.backbone)
    tracing.start("pedro-worker", f"{config['job_id']}/{group.rank}")
    try:
        with tracing.span("worker", config["trace"], job=config["job_id"], rank=group.rank):
            _train(spec, settings, group, config)
    finally:
        tracing.stop()


def _train(spec: FineTuneSpec, settings: Settings, group: WorkerGroup, config: Mapping[str, Any]) -> None:
    """Train, score, save, and report the adapter as the run's last checkpoint."""
    import ray.train

    from pedro.training import worker
    from pedro.training.checkpoint_models import CheckpointModels
    from pedro.training.context import build_context, engine_for

    parent: HandedAdapter | None = config["parent"]
    with ExitStack() as stack, tracing.span("prepare"):
        start = group.together(lambda: stack.enter_context(parent.here())) if parent else None
        context = build_context(spec, settings.cache, engine_for(spec), group, start, tell=say)
    reporter = RayReporter(context.plan.steps)
    if config["checkpoint_models"]:
        reporter.models = CheckpointModels(context, reporter.line)
    if group.rank == 0:
        what = f"{context.trainable_parameters:,} parameters on {len(context.data.train):,} rows"
        reporter.line(f"training {what}, {context.plan.steps:,} steps")
    with tracing.span("train and score"):
        trained = worker.train_and_score(context, reporter)
    with tempfile.TemporaryDirectory() as folder:
        digest = worker.save(context, trained, Path(folder) / ADAPTER, config["extra"])
        handed = group.together(lambda: _ask_for_champion(group))
        checkpoint = None
        if group.rank == 0:
            write_result(Path(folder), context, trained, digest, handed, reporter)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        _report({"step": trained.outcome.steps, "steps": context.plan.steps}, checkpoint, group)


def write_result(
    folder: Path,
    context: TrainingContext,
    trained: Trained,
    digest: str | None,
    handed: HandedAdapter | None,
    reporter: Reporter,
) -> None:
    """The first worker writes the result beside the adapter in `folder`, with its score and the champion's. The trained
    adapter may be unusable afterwards."""
    from pedro.training import worker

    finals = {f"final/{name}": value for name, value in trained.metrics.items() if isinstance(value, float)}
    reporter.metrics(trained.outcome.steps, {**finals, "final/steps": float(trained.outcome.steps)})
    answer = {
        "digest": digest,
        "metrics": trained.metrics,
        "trainable_parameters": context.trainable_parameters,
        "champion": _score_champion(context, trained.score, handed, reporter),
        "unservable": unservable(folder / ADAPTER, context.backbone),
    }
    (folder / ANSWER).write_text(json.dumps(answer))
    write_rows(folder / FILE, worker.rows_behind(context, trained))


def _report(metrics: dict[str, Any], checkpoint: Checkpoint | None, group: WorkerGroup) -> None:
    """Pass a checkpoint to Ray Train. With one worker, a full disk is an error that is not retried."""
    import ray.train

    from pedro.training.checkpoints import cannot_write

    try:
        ray.train.report(metrics, checkpoint=checkpoint)
    except OSError as error:
        if group.world > 1:
            raise  # the others wait in Ray's barrier, which only a restart ends
        raise cannot_write("checkpoint", ray.train.get_context().get_storage().storage_fs_path, error) from error


class RayReporter:
    """Checkpoints go through Ray Train, points to the outbox, lines to standard output, which the job's log has."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.models: CheckpointModels | None = None
        """Set if checkpoints are saved as models."""

    def resume(self, engine: StepEngine, group: WorkerGroup) -> tuple[TrainState, Mapping[str, torch.Tensor]] | None:
        from pedro.training.checkpoints import DamagedCheckpoint, read_checkpoint
        from pedro.training.kept_checkpoints import newest_first

        for checkpoint in newest_first():
            try:
                with checkpoint.as_directory() as folder:
                    return read_checkpoint(Path(folder) / STATE, engine, group)
            except DamagedCheckpoint as error:
                if group.rank == 0:
                    self.line(f"{error.message}; resuming from the one before it, if there is one")
        return None

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        import ray.train

        from pedro.training.checkpoints import write_checkpoint

        with tracing.span("checkpoint", step=state.step), tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / STATE, engine, group, state, best)
            metrics: dict[str, Any] = {"step": state.step, "steps": self._steps}
            if state.validations:
                metrics["dev_loss"] = state.validations[-1][1]
            if self.models is not None and (made := self.models.save(state, Path(folder) / ADAPTER)):
                metrics[MODEL] = made
            _report(metrics, ray.train.Checkpoint.from_directory(folder), group)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        from pedro.training.curves import system_metrics

        OUTBOX.tell(step, {**values, **system_metrics()})

    line = staticmethod(say)


def _finished(checkpoint: Checkpoint | None) -> bool:
    """Whether the last checkpoint is the run's result, because its worker was lost after everything was done. If it is
    damaged, the end is repeated from the checkpoint before it."""
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as folder:
        return is_result(Path(folder))


def is_result(folder: Path) -> bool:
    """Whether the files of `write_result` and the adapter beside them are complete."""
    from pedro.adapter_directory import verify_adapter

    try:
        json.loads((folder / ANSWER).read_text())
        verify_adapter(folder / ADAPTER, None)
    except (OSError, ValueError, PedroError):
        return False
    return True


def _ask_for_champion(group: WorkerGroup) -> HandedAdapter | None:
    """The first worker requests the champion; the others wait with it, so that an error stops them all."""
    if group.rank:
        return None
    handed: HandedAdapter | None = OUTBOX.ask(THE_CHAMPION)
    return handed


def _score_champion(
    context: TrainingContext, adapted: Score, handed: HandedAdapter | None, reporter: Reporter
) -> dict[str, Any] | None:
    """The champion's score on the rows of `adapted`, the new version's score, and their comparison row by row."""
    from pedro.training.paired_test import compare_rows
    from pedro.training.worker import compared, score_directory

    if handed is None:
        return None
    if handed.problem:
        return asdict(Champion(handed.version, None, handed.problem))
    reporter.line(f"scoring the champion {handed.ref} on the same rows")
    try:
        with handed.here() as directory:
            score = score_directory(context, directory)
    except PedroError as error:
        return asdict(Champion(handed.version, None, error.message))
    paired = compare_rows(context.spec.gate.metric, adapted.each, score.each)
    return asdict(Champion(handed.version, compared(context, score), paired=None if paired is None else asdict(paired)))


def unservable(directory: Path, backbone: Backbone) -> str:
    """Why the engine cannot serve the adapter; empty if it can."""
    from pedro.methods.servable import check_servable

    try:
        check_servable(directory, backbone)
    except PedroError as error:
        return error.message
    return ""


def pack_settings(settings: Settings) -> dict[str, str]:
    """Settings as plain values, for a process on another host, without passwords, since Ray's pages show them."""
    return settings.env()


def unpack_settings(plain: Mapping[str, str]) -> Settings:
    """The inverse of `pack_settings`; passwords are read from their files or this host's environment."""
    return Settings.from_env({**os.environ, **plain})


def _first_failure(error: BaseException) -> BaseException:
    return next(iter((getattr(error, "worker_failures", None) or {}).values()), None) or error


def quiet_worker() -> None:
    """Silence warnings: only progress lines are for users."""
    import logging
    import warnings

    from pedro.backbone import quiet

    update_environment({name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")})
    warnings.simplefilter("ignore", UserWarning)
    quiet()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
