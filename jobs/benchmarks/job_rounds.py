"""Rounds of small fine-tunes in the queue of a home, each round disturbed in another way: each job must end once, as it
does undisturbed. Jobs of a round differ by their seeds.

A disturbance comes when a running job has two checkpoints that were not there at the one before, so that it has
something to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.home_processes import kill, of_home
from pedro.errors import ConflictError, NotFoundError, PedroError, UnavailableError
from pedro.spec_reader import validate_spec
from pedro.store import JobStatus, Store

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.postgres_server import PostgresServer
    from pedro.config import Settings
    from pedro.store import JobRecord
    from pedro.training.spec import FineTuneSpec

TENANT = "bench"
UNDISTURBED, PAUSED = "undisturbed", "paused and resumed"
WORKER, DRIVER, CONTROLLER, HEAD = "a worker", "a driver", "the controller", "the Ray head"
DATABASE, CHECKPOINT, LIST = "PostgreSQL", "a checkpoint", "the list of checkpoints"
STEPS, CHECKPOINT_EVERY, AWAY_S, GUARD_S, ANSWERS_S = 60, 5, 5.0, 900.0, 120.0
FELL_BACK = "resuming from the one before it"  # of a job's log


class JobRounds:
    """Rounds of the same jobs."""

    def __init__(self, settings: Settings, store: Store, postgres: PostgresServer, log: Log) -> None:
        self._settings, self._store, self._postgres, self._log = settings, store, postgres, log
        self._cpus = max(1, (psutil.cpu_count() or 1) // 2)  # of a job, so that two run at a time
        self._undisturbed: list[tuple[str, int]] = []  # digest and tokens, by seed
        self._disturb: Mapping[str, Callable[[Sequence[str]], None]] = {
            WORKER: self._kill_worker,
            DRIVER: self._kill_driver,
            CONTROLLER: self._kill_controller,
            HEAD: self._kill_head,
            DATABASE: self._kill_database,
            CHECKPOINT: self._damage_checkpoint,
            LIST: self._damage_list,
            PAUSED: self._pause,
        }

    def run(
        self, label: str, case: str, count: int, disturbances: Sequence[str], *, all_of_them: bool = True
    ) -> dict[str, Any]:
        """One round: submit, disturb, wait for all ends, and look at what there is then. `label` is part of the
        adapters' names. Jobs that end before they could be disturbed are an error, unless not `all_of_them` count."""
        self._log(f"{case}: {count} jobs")
        began = time.monotonic()
        jobs = [self._submit(self.spec(f"{label}-{seed}", seed)) for seed in range(count)]
        row: dict[str, Any] = {"case": case, "jobs": count}
        seen: set[Path] = set()
        for name in disturbances:
            there = self._wait_for_checkpoints(jobs, seen)
            if there is None:
                if all_of_them:
                    raise PedroError("the jobs ended before they could be disturbed")
                break
            seen |= there
            states = [job.status for job in self.now(jobs)]
            row.setdefault("running", states.count(JobStatus.RUNNING))
            row.setdefault("waiting", states.count(JobStatus.QUEUED))
            self._log(f"  {name}: {', '.join(states)}")
            self._disturb[name](jobs)
            row["disturbed"] = [*row.get("disturbed", ()), name]
        self._wait_for(lambda: all(job.status.final for job in self.now(jobs)), jobs)
        return {**row, **self._figures(case, jobs), "seconds": round(time.monotonic() - began, 1)}

    def spec(self, adapter: str, seed: int) -> FineTuneSpec:
        """A job that takes seconds."""
        from pedro.training.spec import FineTuneSpec

        training = {"max_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": 2 * CHECKPOINT_EVERY}
        fields = {
            "tenant": TENANT,
            "adapter": adapter,
            "data": {"train": "pedro://demo/acme/train.jsonl", "test": "pedro://demo/acme/test.jsonl"},
            "training": {**training, "batch_size": 8, "lr": 1e-2, "eval_rows": 16, "seed": seed},
            "gate": {"max_rows": 16, "min_gain": -1},
            "resources": {"cpus_per_worker": self._cpus},
        }
        return validate_spec(fields, FineTuneSpec, source=f"{TENANT}.{adapter}").located(Path.cwd())

    def now(self, jobs: Sequence[str]) -> list[JobRecord]:
        """The jobs as they are; a database that is away is waited for, but not for ever."""
        until = time.monotonic() + ANSWERS_S
        while time.monotonic() < until:
            with suppress(UnavailableError):
                return [self._store.get_job(job) for job in jobs]
            time.sleep(0.5)
        return [self._store.get_job(job) for job in jobs]

    def _submit(self, spec: FineTuneSpec) -> str:
        """The job's id; where something is away that it needs, it is handed over again, but made once."""
        from pedro.training.queue.process import hand_over
        from pedro.training.submit import submit

        until, job = time.monotonic() + ANSWERS_S, ""
        while True:
            try:
                made = self._store.list_jobs(TENANT, adapter=spec.adapter)
                if not made:
                    return submit(spec, self._settings, self._store)
                job = made[0].id
                hand_over(job, self._settings, self._store)
                return job
            except UnavailableError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)

    def _figures(self, case: str, jobs: Sequence[str]) -> dict[str, Any]:
        from pedro.training.job_log import kept_log

        records = self.now(jobs)
        ends = [self._end_of(record) for record in records]
        if case == UNDISTURBED:
            self._undisturbed = [(digest, tokens) for _, digest, tokens in ends]
            distinct = len({digest for digest, _ in self._undisturbed})
            assert distinct == len(jobs), "seeds give different adapters"
        beside = list(zip(ends, self._undisturbed, strict=False))
        failed = [record.message for record in records if record.status != JobStatus.SUCCEEDED]
        figures: dict[str, Any] = {
            "succeeded": len(jobs) - len(failed),
            "once": sum(versions == 1 for versions, _, _ in ends),
            "as_undisturbed": sum(end[1] == wanted[0] for end, wanted in beside),
            "tokens": sum(end[2] == wanted[1] for end, wanted in beside),
            "starts": sum(record.attempt for record in records),
            "fell_back": sum(FELL_BACK in (kept_log(self._settings.storage, job) or "") for job in jobs),
        }
        self._log(f"  {figures}")
        return figures | ({"first_failure": failed[0]} if failed else {})

    def _end_of(self, job: JobRecord) -> tuple[int, str, int]:
        """How many versions there are of a job's adapter, the digest of the last, and the tokens of its training that
        the ledger has."""
        try:
            versions = self._store.list_versions(job.name)
        except NotFoundError:
            versions = []
        used = [one.training_tokens for one in self._store.usage(TENANT, by=["model"]) if one.model == job.name]
        return len(versions), versions[-1].digest if versions else "", sum(used)

    def _checkpoints(self, job: JobRecord) -> list[Path]:
        return sorted(Path(self._settings.storage).glob(f"runs/{job.id}/checkpoint_*/"))  # not the list of them

    def _wait_for_checkpoints(self, jobs: Sequence[str], seen: set[Path]) -> set[Path] | None:
        """Those there are once a job that has not ended has two that were not seen before: then the first is whole.
        None if all have ended."""

        def enough() -> bool:
            records = self.now(jobs)
            running = [record for record in records if record.status == JobStatus.RUNNING]
            return all(record.status.final for record in records) or any(
                len(set(self._checkpoints(record)) - seen) >= 2 for record in running
            )

        self._wait_for(enough, jobs)
        if all(record.status.final for record in self.now(jobs)):
            return None
        return set(Path(self._settings.storage).glob("runs/*/checkpoint_*"))

    def _wait_for(self, condition: Callable[[], bool], jobs: Sequence[str]) -> None:
        until = time.monotonic() + GUARD_S
        while not condition():
            if time.monotonic() > until:
                states = [f"{job.id}: {job.status} {job.message}" for job in self.now(jobs)]
                raise PedroError(f"the jobs did not go on within {GUARD_S:g} s: {'; '.join(states)}")
            time.sleep(0.2)

    # disturbances

    def _found(self, title: str, jobs: Sequence[str]) -> list[psutil.Process]:
        """Processes of the home by a part of their command line, once there are any; none if all jobs have ended."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = of_home(self._settings.home, title)
            return bool(found) or all(job.status.final for job in self.now(jobs))

        self._wait_for(there, jobs)
        return found

    def _kill(self, title: str, jobs: Sequence[str]) -> None:
        """One of them."""
        if found := self._found(title, jobs):
            kill(found[:1])

    def _kill_worker(self, jobs: Sequence[str]) -> None:
        self._kill("RayTrainWorker", jobs)

    def _kill_driver(self, jobs: Sequence[str]) -> None:
        self._kill("-m pedro.training.job ", jobs)

    def _kill_controller(self, jobs: Sequence[str]) -> None:
        """And start another one, as any command of the queue does that finds none."""
        from pedro.training.queue.process import hand_over

        self._kill("pedro.training.queue.process", jobs)
        open_jobs = [job.id for job in self.now(jobs) if not job.status.final]
        if open_jobs:
            hand_over(open_jobs[0], self._settings, self._store)

    def _kill_head(self, _jobs: Sequence[str]) -> None:
        """With all that runs on it; the controller starts another one."""
        from pedro.cluster import find_head

        head = find_head(self._settings)
        assert head is not None, "the queue has started one"
        process = psutil.Process(head.pid)
        kill([process, *process.children(recursive=True)])

    def _kill_database(self, _jobs: Sequence[str]) -> None:
        self._postgres.kill()
        time.sleep(AWAY_S)  # which drivers and controller meet
        self._postgres.start()

    def _damage_checkpoint(self, jobs: Sequence[str]) -> None:
        """The last of a job that runs loses the end of a file, then its workers die: they must go on from the one
        before. They stand still meanwhile, so that no other comes."""
        workers = self._found("RayTrainWorker", jobs)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.suspend()
        for job in self.now(jobs):
            if job.status == JobStatus.RUNNING:
                for checkpoint in self._checkpoints(job)[-1:]:
                    for file in checkpoint.glob("state/parameters.safetensors"):
                        file.write_bytes(file.read_bytes()[:-8])
        if workers:
            kill(workers)

    def _damage_list(self, jobs: Sequence[str]) -> None:
        """Drivers die as if in the middle of writing down which checkpoints there are."""
        if drivers := self._found("-m pedro.training.job ", jobs):
            kill(drivers)
        for job in self.now(jobs):
            for listed in Path(self._settings.storage).glob(f"runs/{job.id}/checkpoint_manager_snapshot.json"):
                listed.write_bytes(listed.read_bytes()[:100])

    def _pause(self, jobs: Sequence[str]) -> None:
        """All of them, those first that wait; then let them go on."""
        from pedro.training.submit import resume, stop

        for job in reversed(jobs):
            with suppress(ConflictError):  # it has ended meanwhile
                stop(job, self._settings, self._store, JobStatus.PAUSED)
        paused = [job.id for job in self.now(jobs) if job.status == JobStatus.PAUSED]
        self._log(f"  {len(paused)} are paused")
        for job in paused:
            resume(job, self._settings, self._store)
