"""Jobs: their records, and which state may follow which."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import ConfigError, ConflictError, NotFoundError, RateLimitError
from pedro.store import schema
from pedro.store.changes import audited, next_generation
from pedro.store.erasing import refuse_erased
from pedro.store.event_rows import NewEvent, end_event, insert_events
from pedro.store.parents import UNENDED, check_parent
from pedro.store.records import NEXT, By, JobRecord, JobStatus
from pedro.store.webhook_outbox import enter_job_end

if TYPE_CHECKING:
    from pedro.store.database import Database


@dataclass(frozen=True)
class Idempotency:
    """By what a request that is sent again is known: the client's key, and a digest of the request as it was given."""

    key: str | None
    request_digest: str | None


class JobTable:
    """Reads and writes jobs."""

    _database: Database

    def create_job(
        self,
        tenant: str,
        adapter: str,
        spec: dict[str, Any],
        job_id: str | None = None,
        *,
        queued: bool = False,
        priority: int = 0,
    ) -> JobRecord:
        """A job that waits. `job_id` lets a caller that needs the id beforehand bring it.

        `queued` leaves its start to a controller (`JobQueue`), which takes those of a higher `priority` first. Raises
        NotFoundError where its parent was deleted meanwhile.
        """
        job = replace(_new_job(tenant, adapter, spec), priority=priority, attempt=1 if queued else 0)
        job = replace(job, id=job_id or job.id)
        with self._database.writing() as connection:
            if spec.get("parent"):
                next_generation(connection)  # in its turn with those that delete versions
                check_parent(connection, spec)
            refuse_erased(connection, tenant)
            connection.execute(sa.insert(schema.jobs).values(_row(job)))
        return job

    def ask_for_job(
        self,
        tenant: str,
        adapter: str,
        spec: dict[str, Any],
        *,
        key_id: str,
        labels: dict[str, str] | None = None,
        idempotency: Idempotency | None = None,
        most_open: int | None = None,
        actor: By = None,
    ) -> JobRecord:
        """A job of which a controller checks spec and files before it is queued.

        What was asked before under the same key is that job (`job_asked_before`). Raises RateLimitError where the
        tenant has `most_open` jobs that have not ended, NotFoundError where the parent was deleted meanwhile.
        """
        job = replace(
            _new_job(tenant, adapter, spec), status=JobStatus.VALIDATING, attempt=1, key_id=key_id, labels=labels
        )
        asked = idempotency or Idempotency(None, None)
        row = {**_row(job), "idempotency_key": asked.key, "request_digest": asked.request_digest}
        with self._database.writing() as connection:
            next_generation(connection)  # the audit's entries are in the order of the changes, and no count is passed
            refuse_erased(connection, tenant)
            earlier = _asked_before(connection, tenant, asked)
            if earlier is None:
                check_parent(connection, spec)
                _check_open(connection, tenant, most_open)
                connection.execute(sa.insert(schema.jobs).values(row))
                audited(connection, actor, "job.create", tenant, job.id, after={"adapter": adapter})
                insert_events(connection, job.id, tenant, [NewEvent(f"Created fine-tuning job: {job.id}")])
        return earlier or job

    def job_asked_before(self, tenant: str, idempotency: Idempotency) -> JobRecord | None:
        """The job that the same request made; None if that key is new, or there is none. Raises ConflictError if it was
        used for another request."""
        with self._database.reading() as connection:
            return _asked_before(connection, tenant, idempotency)

    def update_job(
        self,
        job_id: str,
        *,
        status: JobStatus | str | None = None,
        submission_id: str | None = None,
        result: dict[str, Any] | None = None,
        message: str | None = None,
        attempt: int | None = None,
        told: Sequence[NewEvent] = (),
    ) -> JobRecord:
        """Changes what is given; a final status stamps `finished`. Naming the present status again is allowed.
        With `attempt` only a job that is at that attempt changes: a driver that was given up writes nothing.
        A job that comes to rest tells so in the same transaction: by `told`, or else in the store's words.

        Raises NotFoundError, or ConflictError when the job cannot go from its status to this one: the check and the
        change are one statement, so of two processes that race for a transition one gets the error.
        """
        given = {"submission_id": submission_id, "result": result, "message": message}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        here = where = schema.jobs.c.id == job_id
        if status is not None:
            target = _job_status(status)
            sources = [source.value for source in JobStatus if target in NEXT[source] or source == target]
            where = sa.and_(where, schema.jobs.c.status.in_(sources))
            values["status"] = target.value
            if target.final or target == JobStatus.PAUSED:
                values["wanted"] = None
            if target.final:
                values["finished"] = sa.func.coalesce(schema.jobs.c.finished, time.time())
        if attempt is not None:
            where = sa.and_(where, schema.jobs.c.attempt == attempt)
        with self._database.writing() as connection:
            before = connection.execute(sa.select(schema.jobs.c.status).where(here).with_for_update()).scalar()
            changed = connection.execute(sa.update(schema.jobs).where(where).values(values)).rowcount if values else 1
            row = connection.execute(sa.select(schema.jobs).where(here)).one_or_none()
            if row is not None and changed and before != row.status and _rests(row.status):
                events = told or [end_event(JobStatus(row.status), row.message)]
                insert_events(connection, job_id, row.tenant, events)
                enter_job_end(connection, row.tenant, job_id, JobStatus(row.status))
        if row is None:
            raise job_not_found(job_id)
        if not changed and attempt not in (None, row.attempt):
            raise ConflictError(f"job '{job_id}' is at attempt {row.attempt}, past {attempt}", param="attempt")
        if not changed:
            raise ConflictError(f"job '{job_id}' is {row.status} and cannot become {status}", param="status")
        return job_record(row)

    def expect_end(self, job_id: str, at: float) -> None:
        """Enter when the steps of a job that runs should be done."""
        running = sa.and_(schema.jobs.c.id == job_id, schema.jobs.c.status == JobStatus.RUNNING.value)
        with self._database.writing() as connection:
            connection.execute(sa.update(schema.jobs).where(running).values(estimated_finish=at))

    def get_job(self, job_id: str, tenant: str | None = None) -> JobRecord:
        """Raises NotFoundError, the same for an unknown job and for one of another tenant than the one named."""
        with self._database.reading() as connection:
            query = sa.select(schema.jobs).where(schema.jobs.c.id == job_id)
            row = connection.execute(query).one_or_none() if "\0" not in job_id else None  # PostgreSQL takes none
        if row is None or (tenant is not None and row.tenant != tenant):
            raise job_not_found(job_id)
        return job_record(row)

    def list_jobs(
        self,
        tenant: str | None = None,
        *,
        adapter: str | None = None,
        status: JobStatus | str | None = None,
        ended_since: float | None = None,
        limit: int | None = None,
        offset: int = 0,
        after: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[JobRecord]:
        """Jobs, newest first; `limit` of them after the first `offset`, or behind the job `after`. Raises NotFoundError
        for an `after` that is none of the tenant's."""
        table = schema.jobs
        query = (
            sa.select(schema.jobs)
            .order_by(schema.jobs.c.created.desc(), schema.jobs.c.id.desc())
            .limit(limit)
            .offset(offset)
        )
        if tenant is not None:
            query = query.where(schema.jobs.c.tenant == tenant)
        if adapter is not None:
            query = query.where(schema.jobs.c.adapter == adapter)
        if status is not None:
            query = query.where(schema.jobs.c.status == _job_status(status).value)
        if ended_since is not None:
            query = query.where(schema.jobs.c.finished >= ended_since)
        if after is not None:
            last = self.get_job(after, tenant)
            here = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
            query = query.where(sa.tuple_(table.c.created, table.c.id) < here)
        for name, value in (labels or {}).items():
            query = query.where(self._has_label(name, value))
        with self._database.reading() as connection:
            return [job_record(row) for row in connection.execute(query)]

    def _has_label(self, name: str, value: str) -> sa.ColumnElement[bool]:
        """By the keys of the object themselves: a path to one cannot name a key that has quotes in it, in sqlite."""
        each = sa.func.json_each if self._database.is_sqlite else sa.func.json_each_text
        pair = each(schema.jobs.c.labels).table_valued("key", "value")
        return sa.exists().where(pair.c.key == name, pair.c.value == value)

    def count_jobs(self, tenant: str | None = None, *, adapter: str | None = None) -> dict[tuple[str, JobStatus], int]:
        """How many jobs each tenant has in each status, of one adapter or all; what it has none of is left out."""
        table = schema.jobs
        query = sa.select(table.c.tenant, table.c.status, sa.func.count()).group_by(table.c.tenant, table.c.status)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        if adapter is not None:
            query = query.where(table.c.adapter == adapter)
        with self._database.reading() as connection:
            return {(owner, JobStatus(status)): count for owner, status, count in connection.execute(query)}

    def list_trained(self) -> list[tuple[str, str]]:
        """Tenant and adapter of every job, each pair once, in order."""
        table = schema.jobs
        query = sa.select(table.c.tenant, table.c.adapter).distinct().order_by(table.c.tenant, table.c.adapter)
        with self._database.reading() as connection:
            return [(tenant, adapter) for tenant, adapter in connection.execute(query)]


def _asked_before(connection: sa.Connection, tenant: str, asked: Idempotency) -> JobRecord | None:
    if asked.key is None:
        return None
    table = schema.jobs
    of_key = sa.and_(table.c.tenant == tenant, table.c.idempotency_key == asked.key)
    row = connection.execute(sa.select(table).where(of_key)).one_or_none()
    if row is not None and row.request_digest != asked.request_digest:
        message = f"Idempotency-Key: {asked.key!r} was used for another job, {row.id}; use a new one"
        raise ConflictError(message, param="Idempotency-Key")
    return None if row is None else job_record(row)


def _check_open(connection: sa.Connection, tenant: str, most: int | None) -> None:
    jobs = schema.jobs.c
    unended = sa.select(sa.func.count()).where(jobs.tenant == tenant, jobs.status.in_(UNENDED))
    if most is not None and connection.execute(unended).scalar_one() >= most:
        error = RateLimitError(
            f"{most} of your fine-tuning jobs have not ended, which is the most; wait for one, or cancel one."
        )
        error.retry_after_s = None
        raise error


def _new_job(tenant: str, adapter: str, spec: dict[str, Any]) -> JobRecord:
    return JobRecord(
        id=f"ftjob-{uuid.uuid4().hex[:24]}",
        tenant=tenant,
        adapter=adapter,
        spec=spec,
        status=JobStatus.QUEUED,
        submission_id=None,
        created=time.time(),
        finished=None,
        result=None,
        message="",
    )


def _row(job: JobRecord) -> dict[str, Any]:
    return {**job.__dict__, "status": job.status.value}


def _rests(status: str) -> bool:
    return JobStatus(status).final or status == JobStatus.PAUSED


def _job_status(status: JobStatus | str) -> JobStatus:
    try:
        return JobStatus(status)
    except ValueError:
        known = ", ".join(known.value for known in JobStatus)
        raise ConfigError(f"status: expected one of {known}, got {status!r}", param="status") from None


def job_record(row: sa.Row[Any]) -> JobRecord:
    """A row as others see it."""
    values = {field.name: getattr(row, field.name) for field in fields(JobRecord)}
    wanted = JobStatus(row.wanted) if row.wanted else None
    return JobRecord(**{**values, "status": JobStatus(row.status), "wanted": wanted})


def job_not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"job '{job_id}' does not exist or you do not have access to it", param="job")
