"""The driver's part of a group: manages one worker for all its jobs until each has ended.

Every job has its own driver thread (`driver.py`), which calls `fit` instead of `trainer.fit`. If the worker of a single
job dies, it is replaced. With several jobs, any may be the cause: all unfinished ones return to the queue, and each
resumes alone from its own last checkpoint.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import NotFoundError, PedroError, TrainingError, UnavailableError
from pedro.store import Store
from pedro.training.cotraining.worker import RESULT, Ended, GroupWorker, Line, MadeModel, Member
from pedro.training.errands import Errands
from pedro.training.handed_adapters import hand_parent
from pedro.training.lost_workers import reason
from pedro.training.scored_rows import FILE
from pedro.training.storage import fetch_folder, folders, join
from pedro.training.trainer import ENVIRONMENT, Result, WorkersLost, is_result, read_result
from pedro.training.waiting_checkpoints import ADAPTER

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.spec import FineTuneSpec

LOOK_S, WISHES_S, LEAVES_S = 0.5, 1.0, 60.0
Message = tuple[Any, Callable[[int, Any], object]]
"""A message of a job's worker, and how to answer it."""


@dataclass
class JobOfGroup:
    """A job that is ready for training."""

    member: Member
    spec: FineTuneSpec
    inbox: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    ended: bool = False
    left: bool = False
    """Whether its thread is gone, so that its training must stop."""

    def say(self, item: Any) -> None:
        """Send its thread a message that needs no answer."""
        self.inbox.put((item, lambda _number, _answer: None))


class JobGroup:
    """The jobs of one driver. Each job's thread calls `fit`, and in any case `leave`; one thread calls `run`."""

    def __init__(self, settings: Settings, job_ids: Iterable[str]) -> None:
        self._settings, self._awaited = settings, set(job_ids)
        self._store = Store(settings.database_url)
        self._jobs: dict[str, JobOfGroup] = {}
        self._change, self._over = threading.Condition(), False

    def fit(
        self,
        spec: FineTuneSpec,
        settings: Settings,
        run_id: str,
        job_id: str,
        scratch: Path,
        *,
        checkpoint_models: bool = False,
    ) -> Result:
        """As `trainer.fit`, beside the others. Raises SystemExit for a job that was asked to stop."""
        run = join(settings.storage, "runs", job_id)
        if (result := _result(run, scratch)) is not None:  # an earlier driver was lost after everything was done
            self.leave(job_id)
            self._heed(job_id)
            with closing(Errands(settings, spec.ref, run_id, job_id)) as errands:
                errands.take_up()
            return result
        member = Member(job_id, spec.to_dict(), hand_parent(spec, settings, job_id), checkpoint_models)
        job = JobOfGroup(member, spec)
        errands = Errands(settings, spec.ref, run_id, job_id)
        errands.take_up()
        try:
            with self._change:
                if self._over:  # the driver was asked to stop meanwhile
                    raise SystemExit("stopped")
                self._jobs[job_id] = job
            self.leave(job_id)
            _follow(job, errands, run)
        finally:
            self._rid_of(job)
            errands.close()
        result = _result(run, scratch)
        if result is None:
            raise UnavailableError(f"the result of {job_id} is not in the storage")
        self._heed(job_id)
        return result

    def leave(self, job_id: str) -> None:
        """Stop waiting for the job."""
        with self._change:
            self._awaited.discard(job_id)
            self._change.notify_all()

    def is_over(self, within_s: float) -> bool:
        """Whether every job has ended by then, or the driver was asked to stop."""
        with self._change:
            return self._change.wait_for(lambda: self._over, within_s)

    def _rid_of(self, job: JobOfGroup) -> None:
        """Wait for a job's training to end, if its thread ended for another reason."""
        with self._change:
            job.left = True
            self._change.wait_for(lambda: job.ended or self._over, LEAVES_S)

    def _heed(self, job_id: str) -> None:
        """Raise SystemExit for a job that was stopped: it must not create a version."""
        with suppress(PedroError):
            store = Store(self._settings.database_url)
            try:
                wanted = store.get_job(job_id).wanted
            finally:
                store.close()
            if wanted is not None:
                raise SystemExit("stopped")

    def run(self) -> None:
        """Train until every job has ended."""
        losses = 0
        try:
            with self._change:
                self._change.wait_for(lambda: not self._awaited)
            while jobs := [job for job in self._jobs.values() if not job.ended]:
                lost = self._train(jobs)
                if lost is None:
                    for job in jobs:
                        self._hand(
                            job, (Ended(TrainingError(f"{job.member.job_id}: its worker reported no result")), _nobody)
                        )
                    continue
                losses += 1
                most = jobs[0].spec.resources.max_failures
                for job in (job for job in jobs if not job.ended):
                    self._tell_loss(job, losses, most, reason(lost), len(jobs) == 1)
        finally:
            self._store.close()
            with self._change:
                self._over, jobs = True, list(self._jobs.values())
                self._change.notify_all()
            for job in jobs:
                self._hand(job, (Ended(stopped=True), _nobody))

    def _tell_loss(self, job: JobOfGroup, losses: int, most: int, why: str, alone: bool) -> None:
        if losses <= most and not alone:
            self._hand(job, (Ended(UnavailableError(f"the worker that it shared was lost ({why})")), _nobody))
            return
        if losses <= most:
            then = f"replaced, {losses} of at most {most} times; training resumes from the last checkpoint"
            job.say(Line(f"worker 0 was lost ({why}); {then}"))
            return
        told = f"training: workers failed more than {most} times (resources.max_failures): {why}"
        self._hand(job, (Ended(WorkersLost(told)), _nobody))

    def _train(self, jobs: list[JobOfGroup]) -> Exception | None:
        """Train with one worker until it has ended; if it was lost, returns why."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resources = jobs[0].spec.resources
        room = {"CPU": resources.cpus_per_worker}
        if resources.gpus_per_worker:
            room["GPU"] = resources.gpus_per_worker
        for_worker = {**self._settings.env_of_workers(), **ENVIRONMENT}
        place = placement_group([room])
        worker: Any = None
        try:
            while not place.wait(WISHES_S):
                for job in self._unwanted(jobs):
                    self._hand(job, (Ended(stopped=True), _nobody))
                if not (jobs := [job for job in jobs if not job.ended]):
                    return None
            actor: Any = ray.remote(GroupWorker)
            worker = actor.options(
                num_cpus=resources.cpus_per_worker,
                num_gpus=resources.gpus_per_worker,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(place),
                runtime_env={"env_vars": for_worker},
            ).remote()
            running = worker.train.remote([job.member for job in jobs], self._settings.env_of_workers())
            over = False
            while not over:
                done, _ = ray.wait([running], timeout=LOOK_S)
                over = bool(done)
                self._pass_on(worker, ray.get(worker.take.remote()))
                for job in self._unwanted(jobs):
                    worker.stop.remote(job.member.job_id)
            ray.get(running)
        except ray.exceptions.RayError as error:
            return error
        finally:
            if worker is not None:
                ray.kill(worker)
            remove_placement_group(place)
        return None

    def _pass_on(self, worker: Any, said: list[tuple[str, Any]]) -> None:
        for job_id, item in said:
            self._hand(self._jobs[job_id], (item, partial(worker.answer.remote, job_id)))

    def _hand(self, job: JobOfGroup, message: Message) -> None:
        """Deliver to the job's thread; nothing follows its end."""
        if not job.ended:
            job.inbox.put(message)
            if isinstance(message[0], Ended):
                with self._change:
                    job.ended = True
                    self._change.notify_all()

    def _unwanted(self, jobs: list[JobOfGroup]) -> list[JobOfGroup]:
        """Jobs that were paused, stopped or erased, and those whose threads have ended."""
        return [job for job in jobs if not job.ended and (job.left or self._is_unwanted(job.member.job_id))]

    def _is_unwanted(self, job_id: str) -> bool:
        try:
            return self._store.get_job(job_id).wanted is not None
        except NotFoundError:
            return True
        except PedroError:  # the next check will tell
            return False


def _nobody(_number: int, _answer: Any) -> None:
    """Discard an answer: the worker that asked is gone."""


def _follow(job: JobOfGroup, errands: Errands, run: str) -> None:
    """Serve the job's worker until the job has ended. Raises the error that ended it."""
    while True:
        item, reply = job.inbox.get()
        if isinstance(item, Line):
            print(item.text, flush=True)
        elif isinstance(item, MadeModel):
            errands.publish_from(partial(fetch_folder, join(run, item.checkpoint, ADAPTER)), item.made)
        elif not isinstance(item, Ended):
            errands.do(item, reply)
        elif item.stopped:
            raise SystemExit("stopped")
        elif item.error is not None:
            raise item.error
        else:
            return


def _result(run: str, scratch: Path) -> Result | None:
    """The result of the job's worker, fetched to `scratch`; None if it is missing or incomplete."""
    if RESULT not in folders(run):
        return None
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / RESULT
        fetch_folder(join(run, RESULT), kept)
        if not is_result(kept):
            return None
        shutil.copytree(kept / ADAPTER, scratch / ADAPTER)
        if (kept / FILE).is_file():
            shutil.copy(kept / FILE, scratch / FILE)
        return read_result(kept, scratch / ADAPTER)
