"""The usage ledger: what tenants used, summed by day (UTC), model and key.

Sums cannot be told from sums that were added twice, so whoever adds names what it adds, and how far it has come: the
same again adds nothing. The marks are counters: `usage.…` of a gateway's batches, `trained.…` of a job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from pedro.errors import ConfigError
from pedro.store import schema
from pedro.store.erasing import is_marked
from pedro.store.records import Usage

if TYPE_CHECKING:
    from pedro.store.database import Database

USAGE_GROUPS = ("tenant", "model", "key", "day")
BATCHES = "usage."
COUNTED = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "training_tokens", "training_seconds")
_KEY = ("day", "tenant", "model", "key_id")
_COLUMNS = {name: schema.usage.c["key_id" if name == "key" else name] for name in USAGE_GROUPS}


class UsageTable:
    """Adds to the ledger and reads it."""

    _database: Database

    def add_usage(self, rows: Iterable[Usage], writer: str, batch: int) -> bool:
        """Add a batch of a writer's, whose batches count up; False if that one, or a later one, was added before.

        Raises UnavailableError; then it may be there all the same, and is to be added again as the same batch.
        """
        with self._database.writing() as connection:
            if self._raise_mark(connection, f"{BATCHES}{_short(writer)}", batch) >= batch:
                return False
            self._add(connection, rows)
        return True

    def add_training(self, job_id: str, so_far: Usage) -> None:
        """Add what a job has trained since this was called for it last; `so_far` is all that it has."""
        of_tokens, of_time = training_marks(job_id)
        with self._database.writing() as connection:
            tokens = self._raise_mark(connection, of_tokens, so_far.training_tokens)
            milliseconds = self._raise_mark(connection, of_time, round(1000 * so_far.training_seconds))
            new_tokens = max(0, so_far.training_tokens - tokens)
            new_seconds = max(0.0, so_far.training_seconds - milliseconds / 1000)
            new = {"training_tokens": new_tokens, "training_seconds": new_seconds}
            if any(new.values()):
                self._add(connection, [Usage(**{**so_far.__dict__, **new})])

    def usage(
        self,
        tenant: str | None = None,
        *,
        since: str | None = None,
        until: str | None = None,
        by: Sequence[str] = USAGE_GROUPS,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[Usage]:
        """Sums of the days from `since` to `until`, both included, by what `by` names (of `USAGE_GROUPS`), in order.

        What it does not name is empty in the records. Nothing used: no records. Raises ConfigError.
        """
        check_usage_groups("by", by)
        since, until = check_period(since, until, ("since", "until"))
        table = schema.usage
        columns = [_COLUMNS[name] for name in dict.fromkeys(by)]
        sums = [sa.func.sum(table.c[name]).label(name) for name in COUNTED]
        query = sa.select(*columns, *sums).group_by(*columns).order_by(*columns).limit(limit).offset(offset)
        for clause in (
            None if tenant is None else table.c.tenant == tenant,
            None if since is None else table.c.day >= since,
            None if until is None else table.c.day <= until,
        ):
            query = query if clause is None else query.where(clause)
        with self._database.reading() as connection:
            return [_usage(row) for row in connection.execute(query) if row.requests is not None]

    def forget_batches(self, before: int) -> int:
        """Delete the marks of writers whose last batch is older: they are gone. Batches are numbered by their time."""
        counters = schema.counters
        old = sa.and_(counters.c.name.like(f"{BATCHES}%"), counters.c.value < before)
        with self._database.reading() as connection:
            if connection.execute(sa.select(counters.c.name).where(old).limit(1)).first() is None:
                return 0
        with self._database.writing() as connection:
            return connection.execute(sa.delete(counters).where(old)).rowcount

    def _add(self, connection: sa.Connection, rows: Iterable[Usage]) -> None:
        """One row at a time, in one order for all writers, so that no two wait for each other. Of a tenant being
        erased nothing is added: it would be left behind."""
        given = list(rows)
        erased = {tenant for tenant in {row.tenant for row in given} if is_marked(connection, tenant)}
        summed = sorted(
            (row.__dict__ for row in given if row.tenant not in erased), key=lambda row: [row[name] for name in _KEY]
        )
        if not summed:
            return
        dialect: Any = sqlite if self._database.is_sqlite else postgresql
        insert = dialect.insert(schema.usage)
        more = {name: schema.usage.c[name] + insert.excluded[name] for name in COUNTED}
        connection.execute(insert.on_conflict_do_update(index_elements=list(_KEY), set_=more), summed)

    def _raise_mark(self, connection: sa.Connection, name: str, value: int) -> int:
        """Raise a mark to `value`; where it stood, 0 for a new one. Who comes meanwhile waits for this transaction."""
        counters = schema.counters
        connection.execute(self._database.insert_missing(counters).values(name=name, value=0))
        where = counters.c.name == name
        before: int = connection.execute(sa.select(counters.c.value).where(where).with_for_update()).scalar_one()
        if value > before:
            connection.execute(sa.update(counters).where(where).values(value=value))
        return before


def training_marks(job_id: str) -> tuple[str, str]:
    """The counters that say how far a job's tokens, and its time, were added."""
    mark = f"trained.{_short(job_id)}"
    return mark, f"{mark}.ms"


def check_usage_groups(field: str, by: Sequence[str]) -> None:
    """Raises ConfigError for what usage is not summed by."""
    unknown = next((name for name in by if name not in USAGE_GROUPS), None)
    if unknown is not None:
        raise ConfigError(f"{field}: expected some of {', '.join(USAGE_GROUPS)}, got {unknown[:40]!r}", param=field)


def check_period(first: str | None, last: str | None, fields: tuple[str, str]) -> tuple[str | None, str | None]:
    """Two days as the ledger writes them. Raises ConfigError where one is none, or they are in the wrong order."""
    since, until = _day(fields[0], first), _day(fields[1], last)
    if since is not None and until is not None and since > until:
        raise ConfigError(f"{fields[0]}: {since} is after {fields[1]}, {until}; exchange them", param=fields[0])
    return since, until


def usage_row(used: Usage, by: Sequence[str]) -> dict[str, Any]:
    """A record as tables, CSV and JSON show it: what it was summed by, then the counts."""
    named = {_COLUMNS[name].name: getattr(used, _COLUMNS[name].name) for name in by}
    return named | {name: getattr(used, name) for name in COUNTED}


def _day(field: str, text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ConfigError(f"{field}: expected a day (UTC) such as 2026-03-31, got {text[:40]!r}", param=field) from None


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _usage(row: sa.Row[Any]) -> Usage:
    named = {name: value for name, value in row._mapping.items() if name not in COUNTED}
    counts: dict[str, Any] = {name: int(getattr(row, name)) for name in COUNTED[:-1]}  # PostgreSQL sums to decimals
    return Usage(**named, **counts, training_seconds=float(row.training_seconds))
