"""What jobs tell whoever follows them: messages, metrics, checkpoints; in order, as long as their rows are kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import NotFoundError
from pedro.store import schema
from pedro.store.event_rows import CHECKPOINT, MESSAGE, METRICS, MOST_MESSAGE, NewEvent, insert_events
from pedro.store.records import JobEvent

if TYPE_CHECKING:
    from pedro.store.database import Database


class JobEventTable:
    """Adds events and reads them."""

    _database: Database

    def add_job_event(
        self,
        job_id: str,
        message: str,
        *,
        kind: str = MESSAGE,
        level: str = "info",
        data: dict[str, Any] | None = None,
        once: bool = False,
    ) -> None:
        """Nothing is added to a job that the records do not know; nor, `once`, where the same was said already."""
        events, jobs = schema.job_events, schema.jobs
        with self._database.writing() as connection:
            tenant = connection.execute(sa.select(jobs.c.tenant).where(jobs.c.id == job_id)).scalar_one_or_none()
            said = sa.select(events.c.id).where(events.c.job_id == job_id, events.c.message == message[:MOST_MESSAGE])
            if tenant is None or (once and connection.execute(said.limit(1)).first() is not None):
                return
            insert_events(connection, job_id, tenant, [NewEvent(message, kind, level, data)])

    def forget_checkpoint(self, job_id: str, model: str) -> None:
        """A checkpoint's version was deleted: the job tells of it no more."""
        events = schema.job_events
        of_model = events.c.data["model"].as_string() == model
        gone = sa.and_(events.c.job_id == job_id, events.c.kind == CHECKPOINT, of_model)
        with self._database.writing() as connection:
            connection.execute(sa.delete(events).where(gone))

    def list_job_events(
        self, job_id: str, kinds: Collection[str] = (MESSAGE, METRICS), *, before: str | None = None, limit: int = 20
    ) -> list[JobEvent]:
        """The newest first: `limit` of those that came before the event of that public id.

        Raises NotFoundError where the job has no such event.
        """
        events = schema.job_events
        query = sa.select(events).where(events.c.job_id == job_id, events.c.kind.in_(list(kinds)))
        with self._database.reading() as connection:
            if before is not None:
                known = sa.select(events.c.id).where(events.c.job_id == job_id, events.c.public_id == before)
                last = connection.scalar(known) if "\0" not in before else None
                if last is None:
                    message = f"after: the job has no event {before[:80]!r}"
                    raise NotFoundError(message, param="after", code="not_found")
                query = query.where(events.c.id < last)
            return [
                JobEvent(row.id, row.public_id, row.job_id, row.at, row.kind, row.level, row.message, row.data)
                for row in connection.execute(query.order_by(events.c.id.desc()).limit(limit))
            ]
