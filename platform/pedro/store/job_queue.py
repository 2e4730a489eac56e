"""The queue of jobs: what controllers do with the jobs that wait, run and are sent back.

Several controllers may work on one store. Each job has a lease: its owner alone handles it, until it gives the lease
up or lets it run out. Every new owner counts the job's `fence` up, and names it with each change; so one that slept
through the end of its lease changes nothing any more. A start is counted for the whole queue too, so that of two
controllers that saw the same free places one alone fills them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import ConflictError
from pedro.store import schema
from pedro.store.changes import audited, next_generation
from pedro.store.erasing import refuse_erased
from pedro.store.event_rows import end_event, insert_events
from pedro.store.jobs import job_not_found, job_record
from pedro.store.parents import check_parent
from pedro.store.records import By, JobKind, JobRecord, JobStatus
from pedro.store.webhook_outbox import enter_job_end

if TYPE_CHECKING:
    from pedro.store.database import Database

STARTS = "job_starts"
ACTIONS = {JobStatus.PAUSED: "job.pause", JobStatus.CANCELLED: "job.cancel"}
JOBS = schema.jobs.c
OPEN = (JobStatus.VALIDATING.value, JobStatus.QUEUED.value, JobStatus.RUNNING.value)
WAITING = (JobStatus.VALIDATING.value, JobStatus.QUEUED.value)


@dataclass(frozen=True)
class Leased:
    """What a controller has of the queue."""

    jobs: list[JobRecord]
    """Those whose lease it holds, oldest first."""
    open_jobs: int
    """All that have not ended, those of other controllers with them."""
    starts: int
    """Drivers that the queue has started so far."""


class JobQueue:
    """Leases, and changes of jobs that the holder of a lease, or their owner, may make."""

    _database: Database

    def lease_jobs(self, owner: str, now: float, until: float) -> Leased:
        """Take the open jobs that nobody holds, and hold them and one's own `until` then."""
        free = sa.or_(JOBS.lease_until.is_(None), JOBS.lease_until < now)
        mine = JOBS.lease_owner == owner
        in_queue = sa.and_(JOBS.attempt > 0, JOBS.status.in_(OPEN))
        with self._database.writing() as connection:
            connection.execute(
                sa.update(schema.jobs)
                .where(in_queue, free, sa.or_(JOBS.lease_owner.is_(None), JOBS.lease_owner != owner))
                .values(lease_owner=owner, fence=JOBS.fence + 1)
            )
            connection.execute(sa.update(schema.jobs).where(in_queue, mine).values(lease_until=until))
            rows = connection.execute(
                sa.select(schema.jobs).where(in_queue, mine).order_by(JOBS.created, JOBS.id)
            ).all()
            open_jobs = connection.execute(sa.select(sa.func.count()).select_from(schema.jobs).where(in_queue)).scalar()
            return Leased([job_record(row) for row in rows], int(open_jobs or 0), self._starts(connection))

    def release_jobs(self, owner: str) -> None:
        """Give up all leases of `owner`, so that the next controller need not wait for their end."""
        with self._database.writing() as connection:
            connection.execute(
                sa.update(schema.jobs).where(JOBS.lease_owner == owner).values(lease_owner=None, lease_until=None)
            )

    def count_open_jobs(self) -> int:
        """Jobs of the queue that have not ended, nor are paused."""
        in_queue = sa.and_(JOBS.attempt > 0, JOBS.status.in_(OPEN))
        query = sa.select(sa.func.count()).select_from(schema.jobs).where(in_queue)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar() or 0)

    def job_lease_owners(self) -> list[str]:
        """Who holds leases, or held those that ran out."""
        query = sa.select(JOBS.lease_owner).where(JOBS.lease_owner.is_not(None), JOBS.status.in_(OPEN)).distinct()
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def accept_job(self, job: JobRecord, spec: dict[str, Any] | None = None) -> bool:
        """A job whose spec and files are right waits for its turn, known by `spec` if one is given; False if it changed
        meanwhile: one that was looked at twice, and has gone on, is not sent back."""
        known_by = {} if spec is None else {"spec": spec}
        return self._change(job, JobStatus.VALIDATING, status=JobStatus.QUEUED.value, message="", **known_by)

    def start_job(self, job: JobRecord, submission_id: str, starts: int) -> bool:
        """Enter that a driver of the job is started as `submission_id`, with the spec that `job` has: its workers are
        held from now on. False if another one was started since `starts` were counted, or the job changed: then look
        again."""
        waits = sa.and_(
            self._held(job), JOBS.status == JobStatus.QUEUED.value, JOBS.submission_id.is_(None), JOBS.wanted.is_(None)
        )
        now = {"submission_id": submission_id, "started": time.time()}
        started: dict[str, Any] = {**now, "message": "", "estimated_finish": None}
        if job.kind == JobKind.SWEEP:
            started["spec"] = job.spec
        with self._database.writing() as connection:
            if not self._count_start(connection, starts):
                return False
            return bool(connection.execute(sa.update(schema.jobs).where(waits).values(**started)).rowcount)

    def requeue_job(self, job: JobRecord, message: str) -> bool:
        """Send a job whose driver is gone back to wait for its next attempt; False if it changed meanwhile, or is to be
        paused or cancelled."""
        values = {"status": "queued", "submission_id": None, "attempt": JOBS.attempt + 1, "message": message}
        with self._database.writing() as connection:
            back = sa.update(schema.jobs).where(self._held(job), JOBS.wanted.is_(None)).values(**values)
            return bool(connection.execute(back).rowcount)

    def end_job(
        self,
        job: JobRecord,
        status: JobStatus,
        message: str = "",
        result: dict[str, Any] | None = None,
        *,
        only: JobStatus | None = None,
    ) -> bool:
        """Enter the end (or the pause) of a job whose driver could not, and tell it; False if it changed meanwhile, or
        is not, or not any more, in the state `only`."""
        ended = {} if status == JobStatus.PAUSED else {"finished": time.time()}
        values = {"status": status.value, "message": message, "result": result, "wanted": None, **ended}
        with self._database.writing() as connection:
            changed = connection.execute(sa.update(schema.jobs).where(self._held(job, only)).values(**values)).rowcount
            if changed:
                insert_events(connection, job.id, job.tenant, [end_event(status, message)])
                enter_job_end(connection, job.tenant, job.id, status)
        return bool(changed)

    def explain_wait(self, job: JobRecord, message: str) -> None:
        """Say why a job waits; nothing is written if its row says so already."""
        if job.message != message:
            self._change(job, message=message)

    def ask_of_job(self, job_id: str, wanted: JobStatus, *, actor: By = None) -> JobRecord:
        """Ask for a job to be paused or cancelled. One that no driver works on is so at once; else whoever ends its
        driver enters it. Raises NotFoundError, or ConflictError for a job that has ended."""
        with self._database.writing() as connection:
            next_generation(connection)
            waits = sa.and_(JOBS.id == job_id, JOBS.submission_id.is_(None), JOBS.status.in_(WAITING))
            paused = sa.and_(JOBS.id == job_id, JOBS.status == JobStatus.PAUSED.value)
            at_once = sa.or_(waits, paused) if wanted == JobStatus.CANCELLED else waits
            ended = {} if wanted == JobStatus.PAUSED else {"finished": time.time(), "message": "stopped"}
            rests = sa.update(schema.jobs).where(at_once).values(status=wanted.value, wanted=None, **ended)
            told = connection.execute(rests).rowcount
            if not told:
                open_one = sa.and_(JOBS.id == job_id, JOBS.status.in_(OPEN))
                connection.execute(sa.update(schema.jobs).where(open_one).values(wanted=wanted.value))
            job = self._job(connection, job_id)
            if told:
                insert_events(connection, job_id, job.tenant, [end_event(wanted, "")])
                enter_job_end(connection, job.tenant, job_id, wanted)
            if wanted in (job.status, job.wanted):
                audited(connection, actor, ACTIONS[wanted], job.tenant, job_id)
        if wanted not in (job.status, job.wanted):
            raise ConflictError(f"job '{job_id}' is {job.status} and cannot be {wanted}", param="job")
        return job

    def let_job_continue(self, job_id: str, sources: Sequence[JobStatus], *, actor: By = None) -> JobRecord:
        """Queue a job again, which resumes it from its last checkpoint. Raises NotFoundError, also where the version
        that it goes on from was deleted, or ConflictError for one that is in none of the states `sources`, or is not
        the queue's."""
        unseen = sa.and_(JOBS.key_id.is_not(None), JOBS.started.is_(None))  # what came over HTTP is looked at first
        status = sa.case((unseen, JobStatus.VALIDATING.value), else_=JobStatus.QUEUED.value)
        with self._database.writing() as connection:
            next_generation(connection)
            changed = connection.execute(
                sa.update(schema.jobs)
                .where(JOBS.id == job_id, JOBS.attempt > 0, JOBS.status.in_([source.value for source in sources]))
                .values(
                    status=status, attempt=JOBS.attempt + 1, submission_id=None, wanted=None, finished=None,
                    result=None, message="", lease_owner=None, lease_until=None,
                )
            ).rowcount  # fmt: skip
            job = self._job(connection, job_id)
            refuse_erased(connection, job.tenant)
            if changed:
                check_parent(connection, job.spec)
                audited(connection, actor, "job.resume", job.tenant, job_id)
        if not changed:
            wanted = " or ".join(sources) if job.attempt else "of this release's queue"
            raise ConflictError(f"job '{job_id}' is {job.status}; it must be {wanted}", param="job")
        return job

    def worker_seconds(self, since: float) -> dict[str, float]:
        """For how long each tenant's drivers have run that began after `since`, in seconds times workers; each of
        several jobs that share one has its part."""
        ran = sa.or_(JOBS.finished.is_not(None), JOBS.submission_id.is_not(None))  # what waits again does not run
        query = sa.select(JOBS.tenant, JOBS.submission_id, JOBS.started, JOBS.finished, JOBS.spec).where(
            JOBS.started >= since, ran, JOBS.status != JobStatus.PAUSED.value
        )
        now, found = time.time(), dict[str, float]()
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        beside = Counter(row.submission_id for row in rows)
        for tenant, driver, started, finished, spec in rows:
            workers = int((spec.get("resources") or {}).get("workers", 1)) / (beside[driver] if driver else 1)
            found[tenant] = found.get(tenant, 0.0) + max(0.0, (finished or now) - started) * workers
        return found

    def trained_seconds(self, since: float, now: float) -> dict[str, float]:
        """What each tenant has trained since the beginning of a day (UTC), in seconds times workers: what the usage
        ledger has, and what its drivers that run have had since they began, or since then."""
        usage = schema.usage.c
        ledger = sa.select(usage.tenant, sa.func.sum(usage.training_seconds).label("seconds")).group_by(usage.tenant)
        running = sa.select(JOBS.tenant, JOBS.submission_id, JOBS.started, JOBS.spec).where(
            JOBS.submission_id.is_not(None), JOBS.status == JobStatus.RUNNING.value, JOBS.started.is_not(None)
        )
        with self._database.reading() as connection:
            rows = connection.execute(ledger.where(usage.day >= time.strftime("%Y-%m-%d", time.gmtime(since))))
            found = {row.tenant: float(row.seconds or 0.0) for row in rows}
            jobs = connection.execute(running).all()
            beside = Counter(job.submission_id for job in jobs)
            for tenant, driver, started, spec in jobs:
                workers = int((spec.get("resources") or {}).get("workers", 1)) / beside[driver]
                found[tenant] = found.get(tenant, 0.0) + max(0.0, now - max(started, since)) * workers
        return found

    def _change(self, job: JobRecord, only: JobStatus | None = None, **values: Any) -> bool:
        changed = sa.update(schema.jobs).where(self._held(job, only)).values(**values)
        with self._database.writing() as connection:
            return bool(connection.execute(changed).rowcount)

    @staticmethod
    def _held(job: JobRecord, only: JobStatus | None = None) -> sa.ColumnElement[bool]:
        """The row as its lease's holder last saw it: still its own, at the same attempt, and in the state `only`."""
        of = JOBS.status.in_(OPEN if only is None else (only.value,))
        return sa.and_(JOBS.id == job.id, JOBS.fence == job.fence, JOBS.attempt == job.attempt, of)

    def _count_start(self, connection: sa.Connection, starts: int) -> bool:
        """Count one more start; False if it is not `starts` that were counted so far."""
        counter = schema.counters.c
        counted = sa.update(schema.counters).where(counter.name == STARTS, counter.value == starts)
        if connection.execute(counted.values(value=starts + 1)).rowcount:
            return True
        if starts:
            return False
        first = self._database.insert_missing(schema.counters).values(name=STARTS, value=1)
        return connection.execute(first.returning(counter.name)).first() is not None

    @staticmethod
    def _starts(connection: sa.Connection) -> int:
        query = sa.select(schema.counters.c.value).where(schema.counters.c.name == STARTS)
        return int(connection.execute(query).scalar() or 0)

    @staticmethod
    def _job(connection: sa.Connection, job_id: str) -> JobRecord:
        row = connection.execute(sa.select(schema.jobs).where(JOBS.id == job_id)).one_or_none()
        if row is None:
            raise job_not_found(job_id)
        return job_record(row)
