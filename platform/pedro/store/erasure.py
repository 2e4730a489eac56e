"""The rows of one tenant, counted and erased. Begun in one transaction, after which nothing of it is served or taken.

What is outside the database goes between `begin_erasure` and `end_erasure`, by what the rows that are left name; so an
erasure that was broken off is begun again, and ends.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.refs import ModelRef
from pedro.store import erasing, schema
from pedro.store.batches import cancel_batches_of
from pedro.store.changes import ADAPTER, CHANGES_FROM, KEY, QUOTA, announce, audited, next_generation
from pedro.store.records import NEXT, By, JobStatus
from pedro.store.retention import forget_marks, forget_subjects
from pedro.store.webhooks import forget_webhooks_of

if TYPE_CHECKING:
    from pedro.store.database import Database

OF_TENANT = {  # tables that have a column `tenant`, as people call what is in them
    "keys": schema.keys,
    "jobs": schema.jobs,
    "job events": schema.job_events,
    "files": schema.files,
    "batches": schema.batches,
    "batch answers": schema.batch_answers,
    "webhook deliveries": schema.webhook_deliveries,
    "webhook endpoints": schema.webhook_endpoints,
    "adapters": schema.adapters,
    "versions": schema.versions,
    "moves": schema.alias_history,
    "canaries": schema.canaries,
    "shadows": schema.shadows,
    "usage": schema.usage,
    "audit": schema.audit,
}
SUMS = [column for column in schema.usage.c if isinstance(column.type, (sa.BigInteger, sa.Float))]
OPEN = [status.value for status in JobStatus if NEXT[status]]


class ErasureTable:
    """Erases what the records hold of a tenant."""

    _database: Database

    def count_of(self, tenant: str) -> dict[str, int]:
        """How many rows of each kind a tenant has."""
        with self._database.reading() as connection:
            return {
                kind: connection.execute(
                    sa.select(sa.func.count()).select_from(table).where(table.c.tenant == tenant)
                ).scalar_one()
                for kind, table in OF_TENANT.items()
            }

    def is_being_erased(self, tenant: str) -> bool:
        """Whether an erasure of it has begun and not ended."""
        with self._database.reading() as connection:
            return erasing.is_marked(connection, tenant)

    def check_not_erased(self, tenant: str) -> None:
        """For what is begun outside the database. Raises ConflictError while the tenant is being erased."""
        with self._database.reading() as connection:
            erasing.refuse_erased(connection, tenant)

    def begin_erasure(self, tenant: str) -> None:
        """Refuse the tenant: its keys end, its adapters are gone, its jobs may not start, its webhooks hear of nothing.
        Again does no harm."""
        keys, adapters, jobs = schema.keys, schema.adapters, schema.jobs
        with self._database.writing() as connection:
            generation = next_generation(connection)
            erasing.mark(connection, tenant)
            ended = sa.delete(keys).where(keys.c.tenant == tenant).returning(keys.c.id)
            ids = [row.id for row in connection.execute(ended)]
            forget_subjects(connection, [f"tenant:{tenant}", *(f"key:{key_id}" for key_id in ids)])
            gone = sa.select(adapters.c.adapter).where(adapters.c.tenant == tenant)
            names = [ModelRef(tenant, row.adapter).name for row in connection.execute(gone)]
            over = {"deleted": time.time(), "generation": generation}
            nothing: dict[str, Any] = {
                "aliases": {},
                "canary": None,
                "shadow": None,
                "mirrored": generation,
                **over,
            }  # MLflow is not told, but emptied
            connection.execute(sa.update(adapters).where(adapters.c.tenant == tenant).values(nothing))
            connection.execute(sa.update(schema.versions).where(schema.versions.c.tenant == tenant).values(over))
            opened = sa.and_(jobs.c.tenant == tenant, jobs.c.status.in_(OPEN))
            end = {"status": JobStatus.CANCELLED.value, "finished": time.time(), "message": "stopped"}
            connection.execute(sa.update(jobs).where(opened).values(end))
            cancel_batches_of(connection, tenant, time.time())
            forget_webhooks_of(connection, tenant)
            announce(connection, generation, KEY, *ids)
            announce(connection, generation, QUOTA, f"tenant:{tenant}")
            announce(connection, generation, ADAPTER, *names)

    def erase_rows(self, tenant: str, number: str, *, keep_sums: bool = False) -> None:
        """Delete every row of the tenant. `keep_sums` keeps its usage by day, under `number`."""
        counter, changes = schema.counters, schema.changes
        with self._database.writing() as connection:
            generation = next_generation(connection)
            if keep_sums:
                _keep_sums(connection, tenant, number)
            jobs = connection.execute(sa.select(schema.jobs.c.id).where(schema.jobs.c.tenant == tenant))
            forget_marks(connection, [row.id for row in jobs])
            for table in OF_TENANT.values():
                connection.execute(sa.delete(table).where(table.c.tenant == tenant))
            forget_subjects(connection, [f"tenant:{tenant}"])
            _forget_orphans(connection)
            # The feed names what changed: who has not read so far reads everything anew
            connection.execute(sa.delete(changes).where(changes.c.generation <= generation))
            connection.execute(sa.update(counter).where(counter.c.name == CHANGES_FROM).values(value=generation))

    def end_erasure(self, tenant: str, number: str, counts: dict[str, Any], *, actor: By = None) -> None:
        """The name is free again, and the audit has that somebody was erased: `number` and counts, no name."""
        with self._database.writing() as connection:
            next_generation(connection)  # in its turn, as every other entry
            audited(connection, actor, "tenant.erase", number, "", after=counts)
            erasing.unmark(connection, tenant)

    def overwrite_free_pages(self) -> None:
        """Have the file hold nothing but the rows that there are; of a server, tell it that their space is free.

        Raises UnavailableError where others are at the database for too long.
        """
        self._database.rewrite()


def _forget_orphans(connection: sa.Connection) -> None:
    """Quotas, and what is left of them, of keys that are gone: a gateway may have written one after its key went."""
    there = sa.select("key:" + schema.keys.c.id)
    for table in (schema.quotas, schema.buckets):
        lost = sa.and_(table.c.subject.startswith("key:"), table.c.subject.not_in(there))
        connection.execute(sa.delete(table).where(lost))


def _keep_sums(connection: sa.Connection, tenant: str, number: str) -> None:
    usage = schema.usage
    summed = [sa.func.sum(column).label(column.name) for column in SUMS]
    query = sa.select(usage.c.day, *summed).where(usage.c.tenant == tenant).group_by(usage.c.day)
    kept = [{**row._mapping, "tenant": number, "model": "", "key_id": ""} for row in connection.execute(query)]
    if kept:
        connection.execute(sa.insert(usage), kept)
