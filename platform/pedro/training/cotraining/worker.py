"""The process in which a group of jobs trains: a Ray actor with one coordinator for all of them. Its driver polls their
messages.

Like a single job's worker it has no credentials of the platform; the driver answers the jobs' requests. Each job has
its own outbox, and writes its results to its own run's folder in the storage.
"""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbones.sharing import obtain_backbone
from pedro.config import Settings
from pedro.errors import PedroError, UnavailableError
from pedro.process import set_torch_threads
from pedro.stored_files import remove
from pedro.training.outbox import THE_CHAMPION, Outbox
from pedro.training.spec import FineTuneSpec
from pedro.training.storage import fetch_folder, folders, join, put_folder
from pedro.training.trainer import STATE, quiet_worker, write_result
from pedro.training.waiting_checkpoints import ADAPTER

if TYPE_CHECKING:
    import torch

    from pedro.training.checkpoint_models import CheckpointModels
    from pedro.training.cotraining.coordinator import Participant, PassCoordinator
    from pedro.training.cotraining.engine import SharedBackbone
    from pedro.training.engines import StepEngine
    from pedro.training.handed_adapters import HandedAdapter
    from pedro.training.loop import TrainState
    from pedro.training.worker_group import WorkerGroup

CHECKPOINT, RESULT = "checkpoint_", "result"
KEPT = 2


@dataclass(frozen=True)
class Member:
    """One job of a group, as passed to the worker."""

    job_id: str
    spec: dict[str, Any]
    parent: HandedAdapter | None
    checkpoint_models: bool = False
    """Whether validated checkpoints become versions during training."""


@dataclass(frozen=True)
class Line:
    """A line for the job's log."""

    text: str


@dataclass(frozen=True)
class MadeModel:
    """A checkpoint, by its name in the run's folder, whose adapter becomes a version."""

    checkpoint: str
    made: Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """The job's last message: its error, or that it was stopped; neither if its result is in its run's folder."""

    error: PedroError | None = None
    stopped: bool = False


class GroupWorker:
    """One group's worker; `train` runs on one of the actor's threads, other calls on further threads."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}
        self._stopped: set[str] = set()
        self._lock = threading.Lock()
        """Guards `_stopped` and `_coordinator`."""
        self._coordinator: PassCoordinator | None = None
        self._members: list[Member] = []

    def train(self, members: list[Member], settings: Mapping[str, str]) -> None:
        """Train all jobs; return when each has ended. If there is only one, its errors are raised, as by other
        workers."""
        quiet_worker()
        self._outboxes = {member.job_id: Outbox() for member in members}
        self._members = members
        given, specs = Settings.from_env(settings), [FineTuneSpec.model_validate(member.spec) for member in members]
        set_torch_threads(max(1, int(specs[0].resources.cpus_per_worker)))
        from pedro.training.cotraining.coordinator import PassCoordinator
        from pedro.training.cotraining.engine import SharedBackbone

        try:
            obtain_backbone(given, specs[0].backbone)
            backbone = SharedBackbone(specs[0])
        except PedroError as error:
            for outbox in self._outboxes.values():
                outbox.put(Ended(error))
            return
        works = [
            partial(self._work, member, spec, given, backbone) for member, spec in zip(members, specs, strict=True)
        ]
        coordinator = PassCoordinator(backbone.stacked_model, works)
        with self._lock:
            self._coordinator, stopped = coordinator, list(self._stopped)
        for job_id in stopped:
            self.stop(job_id)
        coordinator.run()
        for participant in coordinator.participants:
            if participant.error is not None:
                raise participant.error

    def take(self) -> list[tuple[str, Any]]:
        """The jobs' messages since the last call, each with the job's id."""
        return [(job_id, item) for job_id, outbox in list(self._outboxes.items()) for item in outbox.take()]

    def answer(self, job_id: str, number: int, value: Any) -> None:
        """Answer a job's question."""
        self._outboxes[job_id].answer(number, value)

    def stop(self, job_id: str) -> None:
        """Stop one job; the others continue."""
        with self._lock:
            self._stopped.add(job_id)
            coordinator = self._coordinator
        if coordinator is not None:
            for member, participant in zip(self._members, coordinator.participants, strict=True):
                if member.job_id == job_id:
                    participant.stop()

    def _work(
        self, member: Member, spec: FineTuneSpec, settings: Settings, backbone: SharedBackbone, participant: Participant
    ) -> None:
        from pedro.training.cotraining.coordinator import Stopped

        outbox, ended = self._outboxes[member.job_id], Ended()
        try:
            _train(member, spec, settings, backbone, participant, outbox)
        except Stopped:
            ended = Ended(stopped=True)
        except PedroError as error:
            ended = Ended(error)
        except Exception as error:
            for line in traceback.format_exc().splitlines():
                outbox.put(Line(f"(worker pid={os.getpid()}) {line}"))
            if len(self._members) == 1:
                raise
            ended = Ended(UnavailableError(f"training: the job failed beside others ({type(error).__name__})"))
        finally:
            backbone.stacked_model.leave(participant.number)
        outbox.put(ended)


def _train(
    member: Member,
    spec: FineTuneSpec,
    settings: Settings,
    backbone: SharedBackbone,
    participant: Participant,
    outbox: Outbox,
) -> None:
    """As a single job's worker (`trainer._train`): train, score, save, and write the result to the run's folder."""
    from pedro.training import worker
    from pedro.training.checkpoint_models import CheckpointModels

    run = join(settings.storage, "runs", member.job_id)
    with ExitStack() as stack:
        start = stack.enter_context(member.parent.here()) if member.parent else None
        reporter = CotrainingReporter(run, outbox, participant)
        context = backbone.context(spec, settings.cache, participant, start, reporter.line)
    if member.checkpoint_models:
        reporter.models = CheckpointModels(context, reporter.line)
    what = f"{context.trainable_parameters:,} parameters on {len(context.data.train):,} rows"
    reporter.line(f"training {what}, {context.plan.steps:,} steps")
    trained = worker.train_and_score(context, reporter)
    participant.heed()
    with tempfile.TemporaryDirectory() as folder:
        digest = worker.save(context, trained, Path(folder) / ADAPTER)
        with participant.away():
            handed = outbox.ask(THE_CHAMPION)
        write_result(Path(folder), context, trained, digest, handed, reporter)
        participant.heed()
        with participant.away():
            put_folder(Path(folder), join(run, RESULT))


class CotrainingReporter:
    """Writes checkpoints to the run's folder, points and lines to the outbox. Other jobs continue meanwhile."""

    def __init__(self, run: str, outbox: Outbox, participant: Participant) -> None:
        self._run, self._outbox, self._participant = run, outbox, participant
        self.models: CheckpointModels | None = None
        """Set if checkpoints are saved as models."""

    def resume(self, engine: StepEngine, group: WorkerGroup) -> tuple[TrainState, Mapping[str, torch.Tensor]] | None:
        from pedro.training.checkpoints import DamagedCheckpoint, read_checkpoint

        for name in reversed(self._kept()):
            try:
                with _local(join(self._run, name)) as folder:
                    return read_checkpoint(folder / STATE, engine, group)
            except DamagedCheckpoint as error:
                self.line(f"{error.message}; resuming from the one before it, if there is one")
        return None

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        from pedro.training.checkpoints import write_checkpoint

        name = f"{CHECKPOINT}{state.step:09}"
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / STATE, engine, group, state, best)
            made = self.models.save(state, Path(folder) / ADAPTER) if self.models else None
            with self._participant.away():
                put_folder(Path(folder), join(self._run, name))
                for other in self._kept()[:-KEPT]:
                    remove(join(self._run, other))
                if made is not None:
                    self._outbox.put(MadeModel(name, made))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._outbox.tell(step, values)

    def line(self, text: str) -> None:
        self._outbox.put(Line(text))

    def _kept(self) -> list[str]:
        return [name for name in folders(self._run) if name.startswith(CHECKPOINT)]


@contextmanager
def _local(location: str) -> Iterator[Path]:
    if "://" not in location:
        yield Path(location)
        return
    with tempfile.TemporaryDirectory() as scratch:
        fetch_folder(location, Path(scratch) / "fetched")
        yield Path(scratch) / "fetched"
