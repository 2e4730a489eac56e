"""A job's row in the store, as written by its driver.

`queued → running → succeeded | failed | cancelled`, or `paused` on request (`store.JobStatus`). A killed driver could
not write its end, and one that got no answer from a platform service writes none: the controller restarts the job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from pedro.errors import ConflictError, NotFoundError, UnavailableError
from pedro.store import JobStatus, Store
from pedro.training.job_results import last_events

PAUSES_S = (1.0, 4.0, 15.0)
MAX_MESSAGE = 2000


class OwnRecord:
    """The row of the job that this process drives. Jobs without a row are not recorded."""

    def __init__(self, database_url: str, job_id: str, log: Callable[[str], None], attempt: int | None = None) -> None:
        """`attempt` is the number of this driver's start, as counted by the job's controller; None outside the
        queue."""
        self._url, self._job_id, self._log, self._attempt = database_url, job_id, log, attempt

    def running(self) -> None:
        """Raises ConflictError if the job has already ended, for instance because it was stopped while queued."""
        self._write(status=JobStatus.RUNNING)

    def succeeded(self, result: dict[str, Any]) -> None:
        with contextlib.suppress(ConflictError):  # it runs, even if the database did not answer at its start
            self._write(status=JobStatus.RUNNING)
        self._end(JobStatus.SUCCEEDED, result=result, told=last_events(result))

    def failed(self, reason: str) -> None:
        self._end(JobStatus.FAILED, message=" ".join(reason.split())[:MAX_MESSAGE])

    def stopped(self) -> None:
        """Paused or cancelled, as requested. Without a request, a queued job is left to its controller."""
        wanted = self._wanted()
        if wanted is None and self._attempt is not None:
            return
        if wanted == JobStatus.PAUSED:
            self._end(JobStatus.PAUSED)
        else:
            self._end(JobStatus.CANCELLED, message="stopped")

    def unanswered(self, reason: str) -> bool:
        """A platform service did not answer the driver: returns whether the job will be restarted, so that it has not
        ended."""
        if self._attempt is None:
            return False
        with contextlib.suppress(ConflictError):
            self._write(message=" ".join(reason.split())[:MAX_MESSAGE])
        return True

    def _wanted(self) -> JobStatus | None:
        try:
            store = Store(self._url)
            try:
                return store.get_job(self._job_id).wanted
            finally:
                store.close()
        except (NotFoundError, UnavailableError):
            return None

    def _end(self, status: JobStatus, **fields: Any) -> None:
        try:
            self._write(status=status, **fields)
        except ConflictError:  # it has ended, and its end is recorded
            return

    def _write(self, **fields: Any) -> None:
        def write(store: Store) -> None:
            with contextlib.suppress(NotFoundError):
                store.update_job(self._job_id, attempt=self._attempt, **fields)

        insist(self._url, write, f"the job's record ({fields.get('status', 'its message')})", self._log)


def insist(database_url: str, write: Callable[[Store], object], what: str, log: Callable[[str], None]) -> None:
    """Retry while the database does not answer, up to a limit: the adapter matters more than the row."""
    for pause in (*PAUSES_S, None):
        try:
            store = Store(database_url)
            try:
                write(store)
            finally:
                store.close()
            return
        except UnavailableError as error:
            if pause is None:
                log(f"{what} could not be written: {error.message}")
                return
            time.sleep(pause)
