"""Five fine-tunes in the queue, and what carries them killed in their middle: each must end once, and as undisturbed.

Nothing is simulated: the store is in PostgreSQL, the jobs train on a local Ray head of a home of its own, two at a
time (`job_rounds.py`). Then rounds of two jobs, each disturbed as a seed has it, and what 200 jobs cost that only wait.
"""

from __future__ import annotations

import random
import shutil
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.home_processes import of_home
from jobs.benchmarks.job_rounds import (
    CHECKPOINT,
    CHECKPOINT_EVERY,
    CONTROLLER,
    DATABASE,
    DRIVER,
    HEAD,
    LIST,
    PAUSED,
    STEPS,
    TENANT,
    UNDISTURBED,
    WORKER,
    JobRounds,
)
from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.config import Settings
from pedro.store import JobStatus, Store

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

COLUMNS = (
    *("case", "jobs", "running", "waiting", "succeeded", "once", "as_undisturbed", "tokens", "starts", "seconds"),
    *("fell_back", "more_mb", "more_processes"),
)
JOBS, QUICK_JOBS = 5, 2
KILLED = "killed"
CASES: dict[str, tuple[str, ...]] = {
    UNDISTURBED: (),
    KILLED: (WORKER, CONTROLLER, HEAD, DATABASE),  # one after another, in the middle of the same jobs
    PAUSED: (PAUSED,),
}
QUICK = (UNDISTURBED, KILLED)
DRAWN, EACH, ROUNDS, SEED = (WORKER, DRIVER, CONTROLLER, HEAD, DATABASE, CHECKPOINT, LIST), 2, 20, 0
WAITING, WAITING_MB, ROUNDS_S = 200, 1024.0, 5.0
ENDED = ("succeeded", "once", "as_undisturbed", "tokens")


def queue_report(options: Options, log: Log) -> BenchmarkReport:
    """A round of jobs for each case, then `--rounds` of drawn ones."""
    from jobs.benchmarks.postgres_server import running_server
    from pedro.registry import Registry
    from pedro.serving.deploy import end
    from pedro.training.queue.process import end_controller

    jobs = QUICK_JOBS if options.quick else JOBS
    drawn = options.rounds or (0 if options.quick else ROUNDS)
    sizes = {"jobs": jobs, "steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "rounds": drawn, "seed": SEED}
    report = BenchmarkReport("queue", sizes)
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
                rounds = JobRounds(settings, store, postgres, log)
                for number, case in enumerate(QUICK if options.quick else CASES):
                    report.rows.append(rounds.run(f"r{number}", case, jobs, CASES[case]))
                if drawn:
                    report.rows.append(_drawn(rounds, drawn))
                waiting = _waiting(rounds, settings, store, WAITING, log)
        finally:
            end_controller(settings)
            end(settings)
            shutil.rmtree(home, ignore_errors=True)
    for row in report.rows:
        report.targets += [Target(f"{row['case']}: {what}", row["jobs"], exactly(row[what])) for what in ENDED]
    report.rows.append(waiting)
    report.targets.append(Target(f"{waiting['case']}: MB", WAITING_MB, exactly(waiting["more_mb"]), at_most=True))
    return report


def _drawn(rounds: JobRounds, count: int) -> dict[str, Any]:
    """All rounds of two jobs and two disturbances together."""
    rng = random.Random(SEED)  # noqa: S311
    rows = [
        rounds.run(f"d{n}", f"round {n} of {count}", QUICK_JOBS, rng.sample(DRAWN, EACH), all_of_them=False)
        for n in range(1, count + 1)
    ]
    sums = {key: sum(row[key] for row in rows) for key in ("jobs", *ENDED, "starts", "fell_back")}
    disturbed = sum(len(row.get("disturbed", ())) for row in rows)
    seconds = round(sum(row["seconds"] for row in rows), 1)
    return {"case": f"{count} rounds drawn", "disturbed": disturbed, **sums, "seconds": seconds}


def _waiting(rounds: JobRounds, settings: Settings, store: Store, count: int, log: Log) -> dict[str, Any]:
    """What so many jobs that wait take of this machine beside one that does, in every process of the home."""
    from pedro.training.queue.process import hand_over

    spec = {**rounds.spec("waits", 0).to_dict(), "resources": {"workers": 1, "cpus_per_worker": 4096}}
    jobs = [store.create_job(TENANT, "waits", spec, queued=True).id]
    hand_over(jobs[0], settings, store)
    time.sleep(ROUNDS_S)  # in which the controller looks at it a few times
    before = _memory(settings.home)
    jobs += [store.create_job(TENANT, "waits", spec, queued=True).id for _ in range(count - 1)]
    time.sleep(ROUNDS_S)
    after = _memory(settings.home)
    assert all(job.status == JobStatus.QUEUED and job.message for job in rounds.now(jobs)), "each was looked at"
    for job in jobs:
        store.ask_of_job(job, JobStatus.CANCELLED)
    more_mb, more_processes = (now - then for now, then in zip(after, before, strict=True))
    log(f"{count} jobs that wait: {more_mb:.0f} MB and {more_processes:.0f} processes more")
    figures = {"more_mb": round(more_mb, 1), "more_processes": round(more_processes)}
    return {"case": f"{count} jobs that wait", "jobs": count, **figures}


def _memory(home: Path) -> tuple[float, float]:
    """MB that belong to processes of the home alone, and how many these are."""
    sizes = []
    for process in of_home(home, ""):
        with suppress(psutil.NoSuchProcess):
            sizes.append(process.memory_full_info().uss / 2**20)
    return sum(sizes), float(len(sizes))
