"""A job's row among the platform's records, as its own driver writes it.

`queued → running → succeeded | failed | cancelled`, or `paused` if that was asked for (`store.JobStatus`). A driver
that was killed could not write its end, and one to which the platform did not answer writes none: the controller starts
the job again.
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
    """The row of the job that this process drives. A job that the records do not know keeps none."""

    def __init__(self, database_url: str, job_id: str, log: Callable[[str], None], attempt: int | None = None) -> None:
        """`attempt` is which start of a driver this is, as the job's controller counts them; None outside the queue."""
        self._url, self._job_id, self._log, self._attempt = database_url, job_id, log, attempt

    def running(self) -> None:
        """Raises ConflictError if the job has ended already, for instance because it was stopped while it waited."""
        self._write(status=JobStatus.RUNNING)

    def succeeded(self, result: dict[str, Any]) -> None:
        with contextlib.suppress(ConflictError):  # it runs, even if the database did not answer when it began
            self._write(status=JobStatus.RUNNING)
        self._end(JobStatus.SUCCEEDED, result=result, told=last_events(result))

    def failed(self, reason: str) -> None:
        self._end(JobStatus.FAILED, message=" ".join(reason.split())[:MAX_MESSAGE])

    def stopped(self) -> None:
        """Paused or cancelled, as was asked for. If nobody asked, a job of the queue is left to its controller."""
        wanted = self._wanted()
        if wanted is None and self._attempt is not None:
            return
        if wanted == JobStatus.PAUSED:
            self._end(JobStatus.PAUSED)
        else:
            self._end(JobStatus.CANCELLED, message="stopped")

    def unanswered(self, reason: str) -> bool:
        """The platform did not answer the driver: whether the job will be started again, so that this is no end."""
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
        except ConflictError:  # it has ended: whoever stopped it has said so
            return

    def _write(self, **fields: Any) -> None:
        def write(store: Store) -> None:
            with contextlib.suppress(NotFoundError):
                store.update_job(self._job_id, attempt=self._attempt, **fields)

        insist(self._url, write, f"the job's record ({fields.get('status', 'its message')})", self._log)


def insist(database_url: str, write: Callable[[Store], object], what: str, log: Callable[[str], None]) -> None:
    """Wait for a database that does not answer, but not for ever: the adapter is worth more than the row."""
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
