"""Which old records may be removed: listed first, then removed by a statement that checks again.

So a row that changed between the look and the removal stays.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import NotFoundError
from pedro.refs import ModelRef
from pedro.store import schema
from pedro.store.records import NEXT, JobStatus, checkpoint_of
from pedro.store.usage import training_marks

if TYPE_CHECKING:
    from pedro.store.database import Database

BATCH = 400  # runs in one question
ENDED = [status.value for status in JobStatus if not NEXT[status]]


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file, as far as its end is concerned."""

    id: str
    tenant: str
    bytes: int
    location: str
    expires: float | None


@dataclass(frozen=True)
class OldVersion:
    """What decides whether a version may go."""

    ref: ModelRef
    version: int
    digest: str
    run_id: str
    created: float
    promoted: float | None
    bytes: int
    named_by: tuple[str, ...]
    """Aliases, "canary" and "shadow"."""
    checkpoint_of: str = ""
    """The job that it is a checkpoint of; empty for a version that a job ended with, or that was imported."""


class RetentionTable:
    """Finds old rows and removes them."""

    _database: Database

    def version_ages(self) -> list[OldVersion]:
        """Every version, by adapter, the newest first."""
        adapters, table = schema.adapters, schema.versions
        query = sa.select(table).where(table.c.deleted.is_(None))
        with self._database.reading() as connection:
            alive = sa.select(adapters).where(adapters.c.deleted.is_(None))
            standing = {(row.tenant, row.adapter): row for row in connection.execute(alive)}
            rows = connection.execute(query.order_by(table.c.tenant, table.c.adapter, table.c.version.desc())).all()
        return [
            OldVersion(
                ModelRef(row.tenant, row.adapter),
                row.version,
                row.digest,
                row.run_id,
                row.created,
                row.promoted,
                row.size_bytes or 0,
                _named_by(standing[row.tenant, row.adapter], row.version),
                of.job_id if (of := checkpoint_of(row.gate)) else "",
            )
            for row in rows
            if (row.tenant, row.adapter) in standing
        ]

    def content_in_use(self, runs: Collection[str] | None = None) -> set[tuple[str, str]]:
        """(digest, run) of every version, or of those that come from these runs: what caches may hold."""
        table = schema.versions
        query = sa.select(table.c.digest, table.c.run_id).where(table.c.deleted.is_(None))
        wanted = None if runs is None else sorted(runs)
        found: set[tuple[str, str]] = set()
        with self._database.reading() as connection:
            for start in range(0, 1 if wanted is None else len(wanted), BATCH):
                some = query if wanted is None else query.where(table.c.run_id.in_(wanted[start : start + BATCH]))
                found |= {(row.digest, row.run_id) for row in connection.execute(some)}
        return found

    def version_specs(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(tenant, name, spec) of every version, those of adapters that are being erased included."""
        table = schema.versions
        query = sa.select(table.c.tenant, table.c.adapter, table.c.version, table.c.spec)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [(row.tenant, str(ModelRef(row.tenant, row.adapter, version=row.version)), row.spec) for row in rows]

    def stored_files(self, tenant: str | None = None) -> list[StoredFile]:
        """The uploaded files, of one tenant or of all."""
        table = schema.files
        query = sa.select(table.c.id, table.c.tenant, table.c.bytes, table.c.location, table.c.expires)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        with self._database.reading() as connection:
            return [StoredFile(**row._mapping) for row in connection.execute(query.order_by(table.c.id))]

    def forget_file(self, file_id: str, expired_before: float) -> str | None:
        """Delete the row of an uploaded file whose time is over; its location if no other row has it, else None.

        Raises NotFoundError where it is not, or not any more, to be deleted.
        """
        table = schema.files
        with self._database.writing() as connection:
            over = sa.and_(table.c.id == file_id, table.c.expires < expired_before)
            location = connection.execute(sa.delete(table).where(over).returning(table.c.location)).scalar_one_or_none()
            if location is None:
                raise NotFoundError(f"file '{file_id}' does not exist or has not expired", param="file")
            shared = connection.execute(sa.select(table.c.id).where(table.c.location == location).limit(1)).first()
        return None if shared else str(location)

    def forget_job(self, job_id: str, ended_before: float) -> bool:
        """Delete the row of a job that ended before a time; False where it stays."""
        table = schema.jobs
        old = sa.and_(table.c.id == job_id, table.c.status.in_(ENDED), table.c.finished < ended_before)
        with self._database.writing() as connection:
            gone = connection.execute(sa.delete(table).where(old)).rowcount > 0
            if gone:
                forget_marks(connection, [job_id])
                events = schema.job_events
                connection.execute(sa.delete(events).where(events.c.job_id == job_id))
        return gone

    def count_old(self, revoked_before: float, usage_before: float) -> dict[str, int]:
        """How many keys and days of usage `forget_keys` and `forget_usage` would delete."""
        with self._database.reading() as connection:
            return {
                "keys": connection.execute(_count(schema.keys, _ended_keys(revoked_before))).scalar_one(),
                "usage": connection.execute(_count(schema.usage, _old_usage(usage_before))).scalar_one(),
            }

    def forget_keys(self, before: float) -> int:
        """Delete keys that were revoked, or had expired, before a time, with their quotas; how many."""
        with self._database.writing() as connection:
            gone = sa.delete(schema.keys).where(_ended_keys(before)).returning(schema.keys.c.id)
            ids = [row.id for row in connection.execute(gone)]
            forget_subjects(connection, [f"key:{key_id}" for key_id in ids])
        return len(ids)

    def forget_usage(self, before: float) -> int:
        """Delete usage of days before a time; how many rows."""
        with self._database.writing() as connection:
            return connection.execute(sa.delete(schema.usage).where(_old_usage(before))).rowcount


def forget_marks(connection: sa.Connection, job_ids: Collection[str]) -> None:
    """Delete what says how far the usage of jobs was added."""
    name, marks = schema.counters.c.name, [mark for job_id in job_ids for mark in training_marks(job_id)]
    for start in range(0, len(marks), BATCH):
        connection.execute(sa.delete(schema.counters).where(name.in_(marks[start : start + BATCH])))


def forget_subjects(connection: sa.Connection, subjects: list[str]) -> None:
    """Delete quotas, and what is left of them, of tenants or keys."""
    for table in (schema.quotas, schema.buckets):
        connection.execute(sa.delete(table).where(table.c.subject.in_(subjects)))


def _named_by(adapter: sa.Row[Any], version: int) -> tuple[str, ...]:
    aliases = tuple(sorted(alias for alias, number in adapter.aliases.items() if number == version))
    splits = {"canary": adapter.canary, "shadow": adapter.shadow}
    return (*aliases, *(what for what, one in splits.items() if one and one["version"] == version))


def _count(table: sa.Table, where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(table).where(where)


def _ended_keys(before: float) -> sa.ColumnElement[bool]:
    return sa.or_(schema.keys.c.revoked < before, schema.keys.c.expires < before)


def _old_usage(before: float) -> sa.ColumnElement[bool]:
    return schema.usage.c.day < time.strftime("%Y-%m-%d", time.gmtime(before))
