"""Five fine-tunes in the queue, and what carries them killed in their middle: each must end once, and as undisturbed.

Nothing is simulated: the store is in PostgreSQL, the jobs train on a local Ray head of a home of its own, two at a
time. A kill comes when a running job has two checkpoints that were not there at the kill before, so that it has
something to go on from. Jobs of a round differ by their seeds. At last, what 200 jobs cost that only wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.home_processes import kill, of_home
from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.config import Settings, validate_spec
from pedro.errors import ConflictError, PedroError, UnavailableError
from pedro.store import JobStatus, Store

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.postgres_server import PostgresServer
    from pedro.store import JobRecord
    from pedro.training.spec import FineTuneSpec

COLUMNS = (
    *("case", "jobs", "running", "waiting", "succeeded", "once", "as_undisturbed", "tokens", "starts", "seconds"),
    *("more_mb", "more_processes"),
)
TENANT, JOBS, QUICK_JOBS = "bench", 5, 2
UNDISTURBED, KILLED, PAUSED = "undisturbed", "killed", "paused and resumed"
WORKER, CONTROLLER, HEAD, DATABASE = "a worker", "the controller", "the Ray head", "PostgreSQL"
CASES: dict[str, tuple[str, ...]] = {
    UNDISTURBED: (),
    KILLED: (WORKER, CONTROLLER, HEAD, DATABASE),  # one after another, in the middle of the same jobs
    PAUSED: (PAUSED,),
}
QUICK = (UNDISTURBED, KILLED)
STEPS, CHECKPOINT_EVERY, AWAY_S, GUARD_S = 60, 5, 5.0, 900.0
WAITING, WAITING_MB, ROUNDS_S = 200, 1024.0, 5.0
ENDED = ("succeeded", "once", "as_undisturbed", "tokens")


def queue_report(options: Options, log: Log) -> BenchmarkReport:
    """A round of jobs for each case."""
    from jobs.benchmarks.postgres_server import running_server
    from pedro.registry import Registry
    from pedro.serving.deploy import end
    from pedro.training.queue.process import end_controller

    jobs = QUICK_JOBS if options.quick else JOBS
    report = BenchmarkReport("queue", {"jobs": jobs, "steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY})
    home = bench_folder() / "queue"
    with running_server() as postgres:
        env = {"PEDRO_HOME": str(home), "PEDRO_DATABASE_URL": postgres.ready_database()}
        settings = Settings.from_env(env)
        try:
            end_controller(settings)  # of a run that was killed
            end(settings)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            Registry.open(settings).take_over()  # of none
            with closing(Store(settings.database_url)) as store:
                rounds = _Rounds(settings, store, postgres, log)
                for case in QUICK if options.quick else CASES:
                    report.rows.append(rounds.run(case, jobs))
                waiting = rounds.waiting(WAITING)
        finally:
            end_controller(settings)
            end(settings)
            shutil.rmtree(home, ignore_errors=True)
    for row in report.rows:
        report.targets += [Target(f"{row['case']}: {what}", jobs, exactly(row[what])) for what in ENDED]
    report.rows.append(waiting)
    report.targets.append(Target(f"{waiting['case']}: MB", WAITING_MB, exactly(waiting["more_mb"]), at_most=True))
    return report


class _Rounds:
    """Rounds of the same jobs, each disturbed in another way."""

    def __init__(self, settings: Settings, store: Store, postgres: PostgresServer, log: Log) -> None:
        self._settings, self._store, self._postgres, self._log = settings, store, postgres, log
        self._cpus = max(1, (psutil.cpu_count() or 1) // 2)  # of a job, so that two run at a time
        self._undisturbed: list[tuple[str, int]] = []  # digest and tokens, by seed
        self._disturb: Mapping[str, Callable[[Sequence[str]], None]] = {
            WORKER: self._kill_worker,
            CONTROLLER: self._kill_controller,
            HEAD: self._kill_head,
            DATABASE: self._kill_database,
            PAUSED: self._pause,
        }

    def run(self, case: str, count: int) -> dict[str, Any]:
        """One round: submit, disturb, wait for all ends, and look at what there is then."""
        from pedro.training.submit import submit

        self._log(f"{case}: {count} jobs")
        began = time.monotonic()
        label = f"r{list(CASES).index(case)}"
        specs = [self._spec(f"{label}-{seed}", seed) for seed in range(count)]
        jobs = [submit(spec, self._settings, self._store) for spec in specs]
        row: dict[str, Any] = {"case": case, "jobs": count}
        seen: set[Path] = set()
        for name in CASES[case]:
            seen |= self._wait_for_checkpoints(jobs, seen)
            states = [job.status for job in self._now(jobs)]
            row.setdefault("running", states.count(JobStatus.RUNNING))
            row.setdefault("waiting", states.count(JobStatus.QUEUED))
            self._log(f"  {name}: {', '.join(states)}")
            self._disturb[name](jobs)
            row["disturbed"] = [*row.get("disturbed", ()), name]
        self._wait_for(lambda: all(job.status.final for job in self._now(jobs)), jobs)
        return {**row, **self._figures(case, jobs), "seconds": round(time.monotonic() - began, 1)}

    def waiting(self, count: int) -> dict[str, Any]:
        """What so many jobs that wait take of this machine beside one that does, in every process of the home."""
        from pedro.training.queue.process import hand_over

        spec = {**self._spec("waits", 0).to_dict(), "resources": {"workers": 1, "cpus_per_worker": 4096}}
        jobs = [self._store.create_job(TENANT, "waits", spec, queued=True).id]
        hand_over(jobs[0], self._settings, self._store)
        time.sleep(ROUNDS_S)  # in which the controller looks at it a few times
        before = self._memory()
        jobs += [self._store.create_job(TENANT, "waits", spec, queued=True).id for _ in range(count - 1)]
        time.sleep(ROUNDS_S)
        after = self._memory()
        assert all(job.status == JobStatus.QUEUED and job.message for job in self._now(jobs)), "each was looked at"
        for job in jobs:
            self._store.ask_of_job(job, JobStatus.CANCELLED)
        more_mb, more_processes = (now - then for now, then in zip(after, before, strict=True))
        self._log(f"{count} jobs that wait: {more_mb:.0f} MB and {more_processes:.0f} processes more")
        figures = {"more_mb": round(more_mb, 1), "more_processes": round(more_processes)}
        return {"case": f"{count} jobs that wait", "jobs": count, **figures}

    def _memory(self) -> tuple[float, float]:
        """MB that belong to processes of the home alone, and how many these are."""
        sizes = []
        for process in of_home(self._settings.home, ""):
            with suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_full_info().uss / 2**20)
        return sum(sizes), float(len(sizes))

    def _figures(self, case: str, jobs: Sequence[str]) -> dict[str, Any]:
        records = self._now(jobs)
        ends = [self._end_of(record) for record in records]
        if case == UNDISTURBED:
            self._undisturbed = [(digest, tokens) for _, digest, tokens in ends]
            distinct = len({digest for digest, _ in self._undisturbed})
            assert distinct == len(jobs), "seeds give different adapters"
        beside = list(zip(ends, self._undisturbed, strict=True))
        failed = [record.message for record in records if record.status != JobStatus.SUCCEEDED]
        figures: dict[str, Any] = {
            "succeeded": len(jobs) - len(failed),
            "once": sum(versions == 1 for versions, _, _ in ends),
            "as_undisturbed": sum(end[1] == wanted[0] for end, wanted in beside),
            "tokens": sum(end[2] == wanted[1] for end, wanted in beside),
            "starts": sum(record.attempt for record in records),
        }
        self._log(f"  {figures}")
        return figures | ({"first_failure": failed[0]} if failed else {})

    def _end_of(self, job: JobRecord) -> tuple[int, str, int]:
        """How many versions there are of a job's adapter, the digest of the last, and the tokens of its training that
        the ledger has."""
        versions = self._store.list_versions(job.name)
        used = [one.training_tokens for one in self._store.usage(TENANT, by=["model"]) if one.model == job.name]
        return len(versions), versions[-1].digest if versions else "", sum(used)

    def _spec(self, adapter: str, seed: int) -> FineTuneSpec:
        from pedro.training.spec import FineTuneSpec

        training = {"max_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": 2 * CHECKPOINT_EVERY}
        tree = {
            "tenant": TENANT,
            "adapter": adapter,
            "data": {"train": "pedro://demo/acme/train.jsonl", "test": "pedro://demo/acme/test.jsonl"},
            "training": {**training, "batch_size": 8, "lr": 1e-2, "eval_rows": 16, "seed": seed},
            "gate": {"max_rows": 16, "min_gain": -1},
            "resources": {"cpus_per_worker": self._cpus},
        }
        return validate_spec(tree, FineTuneSpec, source=f"{TENANT}.{adapter}").located(Path.cwd())

    def _now(self, jobs: Sequence[str]) -> list[JobRecord]:
        """The jobs as they are; a connection of before the database died is tried once more."""
        with suppress(UnavailableError):
            return [self._store.get_job(job) for job in jobs]
        return [self._store.get_job(job) for job in jobs]

    def _wait_for_checkpoints(self, jobs: Sequence[str], seen: set[Path]) -> set[Path]:
        """Those there are once a job that has not ended has two that were not seen before: then the first is whole."""
        storage = Path(self._settings.storage)

        def new(job: JobRecord) -> list[Path]:
            return [path for path in storage.glob(f"runs/{job.id}/checkpoint_*") if path not in seen]

        def enough() -> bool:
            records = self._now(jobs)
            if all(record.status.final for record in records):
                raise PedroError("the jobs ended before they could be disturbed")
            return any(len(new(record)) >= 2 for record in records if record.status == JobStatus.RUNNING)

        self._wait_for(enough, jobs)
        return set(storage.glob("runs/*/checkpoint_*"))

    def _wait_for(self, condition: Callable[[], bool], jobs: Sequence[str]) -> None:
        until = time.monotonic() + GUARD_S
        while not condition():
            if time.monotonic() > until:
                states = [f"{job.id}: {job.status} {job.message}" for job in self._now(jobs)]
                raise PedroError(f"the jobs did not go on within {GUARD_S:g} s: {'; '.join(states)}")
            time.sleep(0.1)

    def _kill_worker(self, _jobs: Sequence[str]) -> None:
        kill(of_home(self._settings.home, "RayTrainWorker")[:1])

    def _kill_controller(self, jobs: Sequence[str]) -> None:
        """And start another one, as any command of the queue does that finds none."""
        from pedro.training.queue.process import hand_over

        kill([psutil.Process(int((self._settings.home / "ray" / "controller.pid").read_text()))])
        hand_over(next(job.id for job in self._now(jobs) if not job.status.final), self._settings, self._store)

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

    def _pause(self, jobs: Sequence[str]) -> None:
        """All of them, those first that wait; then let them go on."""
        from pedro.training.submit import resume, stop

        for job in reversed(jobs):
            with suppress(ConflictError):  # it has ended meanwhile
                stop(job, self._settings, self._store, JobStatus.PAUSED)
        paused = [job.id for job in self._now(jobs) if job.status == JobStatus.PAUSED]
        self._log(f"  {len(paused)} are paused")
        for job in paused:
            resume(job, self._settings, self._store)
