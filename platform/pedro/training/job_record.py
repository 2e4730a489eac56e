"""A job's row among the platform's records: its driver writes it, everybody else only reads it. Knows nothing of Ray.

`queued → running → succeeded | failed | cancelled`. A driver that was killed could not write its end; `shown` says
what such a row means beside what the cluster tells, for the command line and the dashboard alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from pedro.errors import ConflictError, NotFoundError, UnavailableError
from pedro.store import JobRecord, JobStatus, Store

LOST = "lost"
RAY_SAYS = {
    "PENDING": JobStatus.QUEUED,
    "RUNNING": JobStatus.RUNNING,
    "SUCCEEDED": JobStatus.SUCCEEDED,
    "FAILED": JobStatus.FAILED,
    "STOPPED": JobStatus.CANCELLED,
}
HANDOVER_S = 3600  # a job that was not handed to its cluster by then never will be: its `pedro submit` was ended
PAUSES_S = (1.0, 4.0, 15.0)
MAX_MESSAGE = 2000


class OwnRecord:
    """The row of the job that this process drives. A job that the records do not know keeps none."""

    def __init__(self, database_url: str, job_id: str, say: Callable[[str], None]) -> None:
        self._url, self._job_id, self._say = database_url, job_id, say

    def running(self) -> None:
        """Raises ConflictError if the job has ended already, for instance because it was stopped while it waited."""
        self._write(status=JobStatus.RUNNING)

    def succeeded(self, result: dict[str, Any]) -> None:
        with contextlib.suppress(ConflictError):  # it runs, even if the database did not answer when it began
            self._write(status=JobStatus.RUNNING)
        self._end(JobStatus.SUCCEEDED, result=result)

    def failed(self, reason: str) -> None:
        self._end(JobStatus.FAILED, message=" ".join(reason.split())[:MAX_MESSAGE])

    def cancelled(self) -> None:
        self._end(JobStatus.CANCELLED, message="stopped")

    def _end(self, status: JobStatus, **fields: Any) -> None:
        try:
            self._write(status=status, **fields)
        except ConflictError:  # it has ended: whoever stopped it has said so
            return

    def _write(self, **fields: Any) -> None:
        """Wait for a database that does not answer, but not for ever: the adapter is worth more than the row."""
        for pause in (*PAUSES_S, None):
            try:
                store = Store(self._url)
                try:
                    store.update_job(self._job_id, **fields)
                finally:
                    store.close()
                return
            except NotFoundError:
                return
            except UnavailableError as error:
                if pause is None:
                    self._say(f"the job's record could not be written ({fields['status']}): {error.message}")
                    return
                time.sleep(pause)


def shown(record: JobRecord, told: Mapping[str, Any] | None, *, asked: bool) -> tuple[str, str]:
    """(status, message) of a job for people, computed and never written: the row's own once it has ended.

    `told` is the cluster's word on it (`submit.jobs`), None if the cluster does not know the job. `asked` says that
    the cluster answered, or that there is none any more; without that the row is all there is.
    """
    if record.status.final or record.status == JobStatus.PAUSED:
        return record.status, record.message
    if told:
        status = RAY_SAYS.get(told["status"], record.status)
        if status != JobStatus.FAILED:
            return status, record.message
        why = str(told.get("message") or "").strip().partition("\n")[0]
        return status, "its driver died" + (f": {why}" if why else "")
    if record.submission_id and asked:
        return LOST, "its cluster was ended"
    if not record.submission_id and time.time() - record.created > HANDOVER_S:
        return LOST, "it was never handed to a cluster"
    return record.status, record.message
