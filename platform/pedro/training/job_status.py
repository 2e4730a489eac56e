"""The state of a job: from its record and, until it has ended, from its cluster. Read-only.

The only place that combines the two, for the command line and the dashboard. A driver records its own end
(`job_record.py`); a killed one could not, and its job is `failed` or `lost` here while its row stays open.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pedro.store import JobRecord, JobStatus, Store

LOST = "lost"
FROM_RAY = {
    "PENDING": JobStatus.QUEUED,
    "RUNNING": JobStatus.RUNNING,
    "SUCCEEDED": JobStatus.SUCCEEDED,
    "FAILED": JobStatus.FAILED,
    "STOPPED": JobStatus.CANCELLED,
}
RAY_OPEN = tuple(name for name, status in FROM_RAY.items() if not status.final)
"""The states of a Ray job that has not ended."""
HANDOVER_S = 3600  # a job not submitted to its cluster by then never will be: its `pedro submit` was killed


@dataclass(frozen=True)
class ClusterJobs:
    """A cluster's jobs by id, as listed by `submit.jobs`, or why it cannot be queried."""

    jobs: Mapping[str, Mapping[str, Any]]
    url: str = ""
    gone: bool = False
    """The cluster is gone, so nothing runs."""
    problem: str = ""

    @property
    def answered(self) -> bool:
        """Whether a job missing from `jobs` is certainly not running; otherwise only the record is known."""
        return self.gone or bool(self.url and not self.problem)


@dataclass(frozen=True)
class ReconciledJob:
    """A job's row, and its current status and message: a `JobStatus`, or `lost`."""

    record: JobRecord
    status: str
    message: str


def reconcile(
    store: Store,
    cluster: ClusterJobs,
    tenant: str | None = None,
    *,
    adapter: str | None = None,
    status: str | None = None,
    limit: int | None = None,
    offset: int = 0,
) -> list[ReconciledJob]:
    """The store's jobs, newest first, in their current state. `status` filters by the stored status.

    The store is read after the cluster: jobs that have ended there have recorded their end by then.
    """
    records = store.list_jobs(tenant, adapter=adapter, status=status, limit=limit, offset=offset)
    return [reconcile_record(record, cluster) for record in records]


def reconcile_record(record: JobRecord, cluster: ClusterJobs) -> ReconciledJob:
    """One job: the status of its row once it has ended, else the cluster's."""
    ray_job = cluster.jobs.get(record.submission_id or ("" if record.attempt else record.id))
    if record.status.final or record.status == JobStatus.PAUSED:
        return ReconciledJob(record, record.status, record.message)
    if record.attempt and not ray_job:  # a controller handles it
        again = bool(record.submission_id) and cluster.answered
        return ReconciledJob(
            record, record.status, "its cluster was ended; it will be restarted" if again else record.message
        )
    if ray_job:
        status = FROM_RAY.get(ray_job["status"], record.status)
        if status != JobStatus.FAILED:
            return ReconciledJob(record, status, record.message)
        if record.attempt:
            return ReconciledJob(record, record.status, "its driver died; it will be restarted")
        why = str(ray_job.get("message") or "").strip().partition("\n")[0]
        return ReconciledJob(record, status, "its driver died" + (f": {why}" if why else ""))
    if record.submission_id and cluster.answered:
        return ReconciledJob(record, LOST, "its cluster was ended")
    if not record.submission_id and time.time() - record.created > HANDOVER_S:
        return ReconciledJob(record, LOST, "it was never submitted to a cluster")
    return ReconciledJob(record, record.status, record.message)
