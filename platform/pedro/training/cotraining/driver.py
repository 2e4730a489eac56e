"""The driver of a group of jobs: `python -m pedro.training.cotraining.driver --job ID:ATTEMPT --job …`.

Each job has a thread, which does the work of a single job's driver and prints only to that job's log; the main thread
manages the shared worker. Each job's end is written to its own record; a job that could not be ended is returned to the
queue, while the driver continues for the others. The exit code is the group's.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pedro.config import Settings
from pedro.errors import PedroError, UnavailableError
from pedro.process import update_environment
from pedro.registry import Registry
from pedro.store import JobStatus, Store
from pedro.training.driver import connect_driver, fail
from pedro.training.job import drive_job, read_spec
from pedro.training.job_log import by_thread, keeping_log_of_thread
from pedro.training.storage import join
from pedro.training.trainer import ENVIRONMENT

if TYPE_CHECKING:
    from pedro.training.cotraining.job_group import JobGroup

AGAIN_S = 15.0
"""Delay before an unresponsive database is queried again."""
LEFT = "-left"
"""Suffix of the submission id of a driver that no longer works on the job."""
END_S = 20.0
"""How long the jobs' threads may take to record their ends when the driver is asked to stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the Ray job."""
    parser = argparse.ArgumentParser(
        prog="pedro.training.cotraining.driver", description="Run jobs that share a worker."
    )
    parser.add_argument("--job", action="append", required=True, metavar="ID:ATTEMPT", help="a job and its attempt")
    options = parser.parse_args(arguments)
    update_environment(ENVIRONMENT)
    try:
        settings = Settings.from_env()
        connect_driver(log_to_driver=False)
        Registry.open(settings).connect()  # imports MLflow, before several threads would
    except PedroError as error:
        return fail(error.message)
    from pedro.training.cotraining.job_group import JobGroup

    jobs = [(job_id, int(attempt)) for job_id, _, attempt in (text.rpartition(":") for text in options.job)]
    group, codes = JobGroup(settings, (job_id for job_id, _ in jobs)), dict[str, int]()
    threads = [
        threading.Thread(target=_drive, args=(settings, group, *job, codes), name=job[0], daemon=True) for job in jobs
    ]
    with by_thread():
        for thread in threads:
            thread.start()
        patience: float | None = END_S
        try:
            group.run()
            patience = None
        finally:  # also when this process is stopped: each job is notified
            for thread in threads:
                thread.join(patience)
    return max(codes.get(job_id, 1) for job_id, _ in jobs)


def _drive(settings: Settings, group: JobGroup, job_id: str, attempt: int, codes: dict[str, int]) -> None:
    """One job, from its spec to its end."""
    location = join(settings.storage, "jobs", job_id, "spec.json")
    try:
        with keeping_log_of_thread(settings.storage, job_id):
            read = partial(read_spec, location, settings.cache)
            codes[job_id] = drive_job(read, settings, job_id, attempt, group.fit)
    finally:
        group.leave(job_id)
        while not _handed_back(settings, job_id, attempt) and not group.is_over(AGAIN_S):
            pass


def _handed_back(settings: Settings, job_id: str, attempt: int) -> bool:
    """Return a job that could not be ended to its controller: its row then names a driver that does not exist, as if it
    had been lost. False if the database does not answer."""
    try:
        store = Store(settings.database_url)
        try:
            job = store.get_job(job_id)
            if job.status in (JobStatus.QUEUED, JobStatus.RUNNING) and job.attempt == attempt and job.submission_id:
                why = job.message or "its driver could not finish it"
                store.update_job(job_id, submission_id=job.submission_id + LEFT, message=why, attempt=attempt)
        finally:
            store.close()
    except UnavailableError:
        return False
    except PedroError:  # it was erased, or restarted
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
