"""Reads the audit, and enters what was done outside of the database: a backup, a clean-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import NotFoundError
from pedro.store import schema
from pedro.store.changes import audited, next_generation

if TYPE_CHECKING:
    from pedro.store.database import Database
    from pedro.store.records import By


@dataclass(frozen=True)
class AuditEntry:
    """Who changed what, and how it was before and is after.

    `id` counts the entries of all tenants; a tenant is shown `public_id`, which is by chance.
    """

    id: int
    public_id: str
    at: float
    actor: str
    tenant: str
    action: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    request_id: str | None = None


@dataclass(frozen=True)
class AuditQuery:
    """Which entries of the audit; a field that is left empty asks for nothing."""

    tenants: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()  # "key.create", or "key" for all that is done with keys
    actors: tuple[str, ...] = ()  # as the audit calls them, or the id of a key
    subjects: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    above: int | None = None  # only entries that came after the one with this id; the oldest of them first
    before: str | None = None  # only entries that came before the one with this public id


class AuditTable:
    """Who changed what. Ids grow in the order in which entries are committed, so that a reader who goes on from the
    last one that it saw misses none."""

    _database: Database

    def audit(
        self,
        action: str,
        tenant: str,
        subject: str,
        *,
        before: dict[str, Any] | None = None,
        after: dict[str, Any] | None = None,
        actor: By = None,
    ) -> None:
        """Enter what was done, in a transaction of its own; `tenant` is `PLATFORM` for what concerns all of them.

        A change of the database itself calls `changes.audited` in its own transaction instead.
        """
        with self._database.writing() as connection:
            next_generation(connection)  # in its turn, as every other entry
            audited(connection, actor, action, tenant, subject, before=before, after=after)

    def find_audit(self, query: AuditQuery, limit: int = 100) -> list[AuditEntry]:
        """The last entries that `query` asks for, newest first; with `above` the first ones, oldest first.

        Raises NotFoundError where `before` is none of these tenants' entries.
        """
        table = schema.audit
        conditions = _conditions(query)
        with self._database.reading() as connection:
            if query.before is not None:
                conditions.append(table.c.id < _id_of(connection, query.before, query.tenants))
            found = sa.select(table).where(*conditions).limit(limit)
            found = found.order_by(table.c.id.desc() if query.above is None else table.c.id)
            return [
                AuditEntry(
                    row.id,
                    row.public_id,
                    row.at,
                    row.actor,
                    row.tenant,
                    row.action,
                    row.subject,
                    row.before,
                    row.after,
                    row.request_id,
                )
                for row in connection.execute(found)
            ]

    def forget_audit(self, before: float) -> int:
        """Delete entries of the audit older than a time; how many."""
        old = schema.audit.c.at < before
        with self._database.reading() as connection:
            if connection.execute(sa.select(schema.audit.c.id).where(old).limit(1)).first() is None:
                return 0
        with self._database.writing() as connection:
            return connection.execute(sa.delete(schema.audit).where(old)).rowcount


def _conditions(query: AuditQuery) -> list[sa.ColumnElement[bool]]:
    columns = schema.audit.c
    found: list[sa.ColumnElement[bool]] = []
    if query.tenants:
        found.append(columns.tenant.in_(query.tenants))
    if query.subjects:
        found.append(columns.subject.in_(query.subjects))
    if query.actions:
        kinds = [columns.action.startswith(f"{action}.", autoescape=True) for action in query.actions]
        found.append(sa.or_(columns.action.in_(query.actions), *kinds))
    if query.actors:
        keys = [columns.actor.endswith(f"/{actor}", autoescape=True) for actor in query.actors]
        found.append(sa.or_(columns.actor.in_(query.actors), *keys))
    if query.since is not None:
        found.append(columns.at >= query.since)
    if query.until is not None:
        found.append(columns.at < query.until)
    if query.above is not None:
        found.append(columns.id > query.above)
    return found


def _id_of(connection: sa.Connection, public_id: str, tenants: tuple[str, ...]) -> int:
    columns = schema.audit.c
    known = [columns.public_id == public_id, *([columns.tenant.in_(tenants)] if tenants else [])]
    found: int | None = connection.scalar(sa.select(columns.id).where(*known))
    if found is None:
        raise NotFoundError(f"after: no entry {public_id[:80]!r} in the audit", param="after", code="not_found")
    return found
