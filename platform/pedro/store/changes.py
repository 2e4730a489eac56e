"""The feed that gateways follow, and the audit: what each change writes beside itself, in its own transaction.

Changes are numbered by one counter, whose row a transaction holds until it ends. So they are committed in the order
of their numbers: who has read up to a number has missed none before it. Take the number first, then touch rows, and
no two transactions ever wait for each other.
"""

from __future__ import annotations

import getpass
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.database import Notifications
from pedro.store.records import Actor, By

if TYPE_CHECKING:
    from pedro.store.database import Database

CHANNEL = "pedro_changes"  # of PostgreSQL's LISTEN; a notification is the number
ADAPTER, KEY, QUOTA = "adapter", "key", "quota"
MAX_SUBJECT, MAX_REQUEST_ID = 200, 100  # characters that the audit keeps
GENERATION, CHANGES_FROM, EPOCH = "generation", "changes_from", "epoch"


@dataclass(frozen=True)
class Position:
    """A place in the feed: the number of a change, and of which life of the database, which a restored backup ends."""

    epoch: int
    generation: int


@dataclass(frozen=True)
class ChangeSet:
    """What changed after a place: ask again from `position` on."""

    position: Position
    changed: frozenset[tuple[str, str]]
    """(kind, subject): ("adapter", "acme.support"), ("key", its id), ("quota", "tenant:acme")."""
    complete: bool
    """False where it cannot be told any more: forget everything that was read, and read again."""


def next_generation(connection: sa.Connection) -> int:
    """The number of the change that this transaction makes; others wait from here until it ends."""
    counter = schema.counters
    taken = (
        sa.update(counter)
        .where(counter.c.name == GENERATION)
        .values(value=counter.c.value + 1)
        .returning(counter.c.value)
    )
    return int(connection.execute(taken).scalar_one())


def announce(connection: sa.Connection, generation: int, kind: str, *subjects: str) -> None:
    """Let gateways hear of a change once it is committed."""
    row = {"generation": generation, "kind": kind, "at": time.time()}
    if not subjects:
        return
    connection.execute(sa.insert(schema.changes), [{**row, "subject": subject} for subject in subjects])
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"SELECT pg_notify('{CHANNEL}', :number)"), {"number": str(generation)})


def audited(
    connection: sa.Connection,
    actor: By,
    action: str,
    tenant: str,
    subject: str,
    **states: dict[str, Any] | None,
) -> None:
    """Write into the audit who did what; `states` are `before` and `after`, and hold no secret nor its hash.

    Whatever changes something for people calls this in the transaction of the change, or `Store.audit` if it has none.
    """
    entry = {**_who(actor), "action": action, "tenant": tenant, "subject": subject[:MAX_SUBJECT]}
    connection.execute(sa.insert(schema.audit).values(public_id=_public_id(), **entry, **states))


def audited_all(
    connection: sa.Connection, actor: By, action: str, made: Collection[tuple[str, str, dict[str, Any]]]
) -> None:
    """Write that so many things were made: of whom, which, and how they are."""
    entry = {**_who(actor), "action": action}
    rows = [
        {**entry, "public_id": _public_id(), "tenant": tenant, "subject": subject, "after": after}
        for tenant, subject, after in made
    ]
    connection.execute(sa.insert(schema.audit), rows)


def acting(actor: By) -> Actor:
    """Who makes a change; whoever runs this process where nobody is named."""
    if isinstance(actor, Actor):
        return actor
    return Actor(actor or _person())


def _public_id() -> str:
    return f"audit_log-{secrets.token_hex(12)}"


def _person() -> str:
    try:
        return f"user:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        return "user:unknown"


def _who(actor: By) -> dict[str, Any]:
    who = acting(actor)
    return {"at": time.time(), "actor": who.name, "request_id": who.request_id and who.request_id[:MAX_REQUEST_ID]}


class ChangeTable:
    """Reads the feed."""

    _database: Database
    _notifications: Notifications | None = None

    def wait_for_change(self, timeout_s: float) -> None:
        """Return when something changed, as far as that is heard, or after `timeout_s`. For one thread at a time."""
        if self._database.is_sqlite:
            time.sleep(timeout_s)
            return
        if self._notifications is None:
            self._notifications = Notifications(self._database.url, CHANNEL)
        self._notifications.wait(timeout_s)

    def position(self) -> Position:
        """Where the feed ends now: two small rows, so that asking often costs little. Raises UnavailableError."""
        with self._database.reading() as connection:
            counters = _counters(connection)
        return Position(counters[EPOCH], counters[GENERATION])

    def changes(self, since: Position) -> ChangeSet:
        """What changed after a place that `position` or a delta before told. Raises UnavailableError."""
        table = schema.changes
        with self._database.reading() as connection:
            now = _counters(connection)
            rows = connection.execute(sa.select(table).where(table.c.generation > since.generation)).all()
            known_from = _counters(connection)[CHANGES_FROM]  # read last: what is forgotten meanwhile has been read
        here = Position(now[EPOCH], max([now[GENERATION], *(row.generation for row in rows)]))
        known = since.epoch == here.epoch and known_from <= since.generation <= here.generation
        return ChangeSet(here, frozenset((row.kind, row.subject) for row in rows), known)

    def forget_changes(self, before: float) -> int:
        """Delete changes older than a time; how many. Who has not read them by then reads everything anew."""
        table, counter = schema.changes, schema.counters
        oldest = sa.select(sa.func.max(table.c.generation)).where(table.c.at < before)
        with self._database.reading() as connection:
            last = connection.execute(oldest).scalar()
        if last is None:
            return 0
        with self._database.writing() as connection:
            behind = sa.and_(counter.c.name == CHANGES_FROM, counter.c.value < last)
            connection.execute(sa.update(counter).where(behind).values(value=last))
            return connection.execute(sa.delete(table).where(table.c.generation <= last)).rowcount


def _counters(connection: sa.Connection) -> dict[str, int]:
    return {row.name: row.value for row in connection.execute(sa.select(schema.counters))}
