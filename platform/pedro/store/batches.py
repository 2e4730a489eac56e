"""Batches: requests of an uploaded file, and each one's answer until they are written out.

A batch is one gateway's while that holds its lease: each new holder counts `fence` up and names it with each change, so
that one which slept through the end of its lease changes nothing any more. An answer is entered together with its
count: whatever is killed, a row has one answer or none.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import ConflictError, NotFoundError, RateLimitError
from pedro.store import schema
from pedro.store.changes import audited
from pedro.store.erasing import refuse_erased
from pedro.store.webhook_outbox import enter_event

if TYPE_CHECKING:
    from pedro.store.database import Database
    from pedro.store.records import By, FileRecord

BATCHES, ANSWERS = schema.batches.c, schema.batch_answers.c
TOGETHER = 20  # answers in one question: they may be large
OK = 200


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self.value not in OPEN


OPEN = ("validating", "in_progress", "finalizing", "cancelling")
RUNNING = ("validating", "in_progress")  # what can be cancelled


@dataclass(frozen=True)
class BatchRecord:
    """A tenant's batch. `moments` says when it came into each state."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created: float
    expires: float
    labels: dict[str, str] | None = None  # the API's metadata
    output_expiry_s: int | None = None  # how long its files are kept; None: as other files of batches
    moments: dict[str, float] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] | None = None
    fence: int = 0


class BatchTable:
    """Enters batches, leases them, keeps their answers and ends them."""

    _database: Database

    def create_batch(self, record: BatchRecord, most_open: int, *, actor: By = None) -> None:
        """Raises RateLimitError where its tenant has `most_open` that have not ended."""
        with self._database.writing() as connection:
            refuse_erased(connection, record.tenant)
            opened = sa.select(sa.func.count()).where(BATCHES.tenant == record.tenant, BATCHES.status.in_(OPEN))
            if connection.execute(opened).scalar_one() >= most_open:
                error = RateLimitError(f"{most_open} of your batches have not ended, which is the most; wait for one.")
                error.retry_after_s = None
                raise error
            connection.execute(sa.insert(schema.batches).values({**record.__dict__, "status": record.status.value}))
            after = {"endpoint": record.endpoint, "input_file_id": record.input_file_id}
            audited(connection, actor, "batch.create", record.tenant, record.id, after=after)

    def get_batch(self, batch_id: str, tenant: str) -> BatchRecord:
        """Raises NotFoundError, the same for an unknown batch and for one of another tenant."""
        with self._database.reading() as connection:
            return _batch_record(_found(connection, batch_id, tenant))

    def list_batches(self, tenant: str, *, after: str | None = None, limit: int | None = None) -> list[BatchRecord]:
        """The newest first; `limit` of them behind `after`. Raises NotFoundError for another `after`."""
        query = sa.select(schema.batches).where(BATCHES.tenant == tenant).limit(limit)
        with self._database.reading() as connection:
            if after is not None:
                last = _found(connection, after, tenant)
                here = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
                query = query.where(sa.tuple_(BATCHES.created, BATCHES.id) < here)
            rows = connection.execute(query.order_by(BATCHES.created.desc(), BATCHES.id.desc())).all()
        return [_batch_record(row) for row in rows]

    def cancel_batch(self, batch_id: str, tenant: str, now: float, *, actor: By = None) -> BatchRecord:
        """Ask for its end; again does no harm. Raises NotFoundError, or ConflictError for one that has all answers."""
        with self._database.writing() as connection:
            _found(connection, batch_id, tenant)
            moved = self._move(connection, batch_id, BatchStatus.CANCELLING, now, BATCHES.tenant == tenant, RUNNING)
            batch = _batch_record(_found(connection, batch_id, tenant))
            if moved:
                audited(connection, actor, "batch.cancel", tenant, batch_id)
        if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            raise ConflictError(f"batch '{batch_id}' is {batch.status} and cannot be cancelled", param="batch_id")
        return batch

    def lease_batches(self, owner: str, now: float, until: float, overdue_at: float, most: int) -> list[BatchRecord]:
        """Take what is to be worked on and nobody holds, and hold it and one's own `until` then; `most` at once.

        Of each tenant that is its oldest open batch, and all that only have to be ended.
        """
        query = sa.select(schema.batches).where(BATCHES.status.in_(OPEN)).order_by(BATCHES.created, BATCHES.id)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row.tenant, row.id)
        wanted = [
            row
            for row in rows
            if first[row.tenant] == row.id or row.status == "cancelling" or row.expires <= overdue_at
        ]
        kept = [row.id for row in wanted if row.lease_owner == owner]
        free = [row.id for row in wanted if row.lease_owner != owner and (row.lease_until or 0.0) < now]
        new = free[: max(0, most - len(kept))]
        if not kept and not new:
            return []
        still_free = sa.or_(BATCHES.lease_until.is_(None), BATCHES.lease_until < now)
        mine = sa.and_(BATCHES.id.in_(kept + new), BATCHES.lease_owner == owner, BATCHES.status.in_(OPEN))
        with self._database.writing() as connection:
            taken = sa.update(schema.batches).where(BATCHES.id.in_(new), BATCHES.status.in_(OPEN), still_free)
            connection.execute(taken.values(lease_owner=owner, fence=BATCHES.fence + 1))
            connection.execute(sa.update(schema.batches).where(mine).values(lease_until=until))
            return [_batch_record(row) for row in connection.execute(sa.select(schema.batches).where(mine))]

    def release_batches(self, owner: str) -> None:
        """Give up all leases of `owner`, so that the next gateway need not wait for their end."""
        given_up = {"lease_owner": None, "lease_until": None}
        with self._database.writing() as connection:
            connection.execute(sa.update(schema.batches).where(BATCHES.lease_owner == owner).values(given_up))

    def begin_batch(self, batch: BatchRecord, total: int, now: float) -> bool:
        """It has so many good rows, and is in progress; False if it is not the holder's to begin."""
        with self._database.writing() as connection:
            held, sources = BATCHES.fence == batch.fence, (BatchStatus.VALIDATING,)
            return self._move(connection, batch.id, BatchStatus.IN_PROGRESS, now, held, sources, total=total)

    def finalize_batch(self, batch: BatchRecord, now: float) -> bool:
        """All its rows are answered; False if that is not the holder's to say."""
        with self._database.writing() as connection:
            held, sources = BATCHES.fence == batch.fence, (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING)
            return self._move(connection, batch.id, BatchStatus.FINALIZING, now, held, sources)

    def add_batch_answer(self, batch: BatchRecord, line: int, status_code: int, body: str) -> bool:
        """Keep the answer of the row at `line`, and count it; False if it is not the holder's to answer any more."""
        counted = BATCHES.completed if status_code == OK else BATCHES.failed
        held = sa.and_(
            BATCHES.id == batch.id, BATCHES.fence == batch.fence, BATCHES.status == BatchStatus.IN_PROGRESS.value
        )
        row = {"batch_id": batch.id, "tenant": batch.tenant, "line": line, "status_code": status_code, "body": body}
        with self._database.writing() as connection:
            if not connection.execute(sa.update(schema.batches).where(held).values({counted: counted + 1})).rowcount:
                return False
            connection.execute(sa.insert(schema.batch_answers).values(row))
        return True

    def answered_lines(self, batch_id: str) -> set[int]:
        """The lines whose rows have an answer."""
        with self._database.reading() as connection:
            return set(connection.execute(sa.select(ANSWERS.line).where(ANSWERS.batch_id == batch_id)).scalars())

    def answers_size(self, batch_id: str) -> int:
        """The characters of all that is kept of its answers."""
        size = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(ANSWERS.body)), 0))
        with self._database.reading() as connection:
            return int(connection.execute(size.where(ANSWERS.batch_id == batch_id)).scalar_one())

    def read_answers(self, batch_id: str, *, good: bool) -> Iterator[str]:
        """The answers by line: those of status 200, or the other ones."""
        kind = ANSWERS.status_code == OK if good else ANSWERS.status_code != OK
        query = sa.select(ANSWERS.line, ANSWERS.body).where(ANSWERS.batch_id == batch_id, kind)
        query, last = query.order_by(ANSWERS.line).limit(TOGETHER), -1
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(query.where(ANSWERS.line > last)).all()
            yield from (row.body for row in rows)
            if len(rows) < TOGETHER:
                return
            last = rows[-1].line

    def end_batch(
        self,
        batch: BatchRecord,
        status: BatchStatus,
        now: float,
        files: Sequence[FileRecord | None] = (None, None),
        errors: list[dict[str, Any]] | None = None,
    ) -> bool:
        """Enter its end with its files of answers and of errors, whose bytes are stored; its answers are in these now.

        False, and no file is entered, if it is not the holder's to end.
        """
        output, failures = files
        ids = {"output_file_id": output and output.id, "error_file_id": failures and failures.id}
        with self._database.writing() as connection:
            held, values = BATCHES.fence == batch.fence, {**ids, "errors": errors, "ended": now}
            if not self._move(connection, batch.id, status, now, held, OPEN, **values):
                return False
            refuse_erased(connection, batch.tenant)
            for record in files:
                if record is not None:
                    connection.execute(sa.insert(schema.files).values(record.__dict__))
                    after = {"filename": record.filename, "purpose": record.purpose, "bytes": record.bytes}
                    audited(connection, f"batch/{batch.id}", "file.create", batch.tenant, record.id, after=after)
            connection.execute(sa.delete(schema.batch_answers).where(ANSWERS.batch_id == batch.id))
        return True

    def count_ended_batches(self, before: float) -> int:
        """How many `forget_ended_batches` would delete."""
        query = sa.select(sa.func.count()).where(BATCHES.ended < before)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def forget_ended_batches(self, before: float) -> int:
        """Delete batches that ended before a time; how many. Their files have times of their own."""
        with self._database.writing() as connection:
            return connection.execute(sa.delete(schema.batches).where(BATCHES.ended < before)).rowcount

    @staticmethod
    def _move(
        connection: sa.Connection,
        batch_id: str,
        to: BatchStatus,
        now: float,
        held: sa.ColumnElement[bool],
        sources: Sequence[str],
        **values: Any,
    ) -> bool:
        """Bring it from one of `sources` to a state, if it is `held`; an end is told to webhooks."""
        found = sa.select(BATCHES.moments, BATCHES.tenant).where(
            BATCHES.id == batch_id, held, BATCHES.status.in_(list(sources))
        )
        row = connection.execute(found.with_for_update()).one_or_none()
        if row is None:
            return False
        moments = {**row.moments, to.value: row.moments.get(to.value, now)}
        moved = sa.update(schema.batches).where(BATCHES.id == batch_id)
        connection.execute(moved.values(status=to.value, moments=moments, **values))
        if to.final:
            enter_event(connection, row.tenant, f"batch.{to.value}", {"id": batch_id}, now)
        return True


def new_batch_id() -> str:
    return f"batch_{secrets.token_hex(12)}"


def cancel_batches_of(connection: sa.Connection, tenant: str, now: float) -> None:
    """End a tenant's batches where they stand: whoever works on one enters nothing more."""
    opened = sa.and_(BATCHES.tenant == tenant, BATCHES.status.in_(OPEN))
    over = {"status": BatchStatus.CANCELLED.value, "ended": now, "fence": BATCHES.fence + 1}
    connection.execute(sa.update(schema.batches).where(opened).values(over))


def _found(connection: sa.Connection, batch_id: str, tenant: str) -> sa.Row[Any]:
    query = sa.select(schema.batches).where(BATCHES.id == batch_id, BATCHES.tenant == tenant)
    row = connection.execute(query).one_or_none() if "\0" not in batch_id else None
    if row is None:
        raise NotFoundError(f"No such Batch object: {batch_id[:64]}", param="batch_id")
    return row


def _batch_record(row: sa.Row[Any]) -> BatchRecord:
    values = {one.name: getattr(row, one.name) for one in fields(BatchRecord)}
    return BatchRecord(**{**values, "status": BatchStatus(row.status)})
