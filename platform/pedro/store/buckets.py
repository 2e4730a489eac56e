"""Quotas that several gateways share: how much of each limit is used, of which a gateway takes leases.

A row's `available` is what is left less the limit itself: 0 where nothing is used, -30 where 30 is. So a limit that is
changed counts at once, and the row needs no word of it. The clock is the callers'; of two that differ the later counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.windows import used_by

if TYPE_CHECKING:
    from pedro.store.database import Database

ROWS = 200  # in one statement
ROUNDING = 1e-6  # of what refills by itself


@dataclass(frozen=True)
class LeaseRequest:
    """What one gateway wants of one bucket."""

    subject: str  # "tenant:acme" or "key:key_..."
    what: str  # the limit, as a column of the quotas
    limit: int
    back: float = 0.0  # given back; below zero: what was used beyond all leases
    needs: tuple[int, ...] = ()  # of single requests, each whole or not at all, in their order
    ahead: int = 0  # at most so much more, ahead of need
    share: float = 1.0  # and of what is left at most this part


@dataclass(frozen=True)
class LeaseGrant:
    """What it gets, and how much of the limit is used after that."""

    granted: tuple[bool, ...]  # of each need
    ahead: int
    used: float


class BucketTable:
    """Reads and writes buckets."""

    _database: Database

    def exchange(self, wanted: Sequence[LeaseRequest], now: float) -> list[LeaseGrant]:
        """Give back and take leases, all in one transaction; each bucket at most once. Raises UnavailableError."""
        table = schema.buckets
        ordered = sorted(wanted, key=lambda asked: (asked.subject, asked.what))  # so that no two wait for each other
        grants: dict[tuple[str, str], LeaseGrant] = {}
        with self._database.writing() as connection:
            for first in range(0, len(ordered), ROWS):
                some = ordered[first : first + ROWS]
                keys = [(asked.subject, asked.what) for asked in some]
                connection.execute(self._database.insert_missing(table), [_row(*key, 0.0, now) for key in keys])
                held = sa.select(table).where(sa.tuple_(table.c.subject, table.c.what).in_(keys))
                held = held.order_by(table.c.subject, table.c.what).with_for_update()
                rows = {(row.subject, row.what): row for row in connection.execute(held)}
                changed = []
                for asked, key in zip(some, keys, strict=True):
                    row = rows[key]
                    used = used_by(asked.what, asked.limit, -row.available, row.updated, now)
                    grants[key] = grant = _grant(asked, used)
                    changed.append({f"to_{name}": value for name, value in _row(*key, -grant.used, now).items()})
                    changed[-1]["to_updated"] = max(now, row.updated)
                connection.execute(_UPDATE, changed)
        return [grants[asked.subject, asked.what] for asked in wanted]


def _grant(asked: LeaseRequest, used: float) -> LeaseGrant:
    used = max(0.0, used - asked.back)
    granted = []
    for need in asked.needs:
        granted.append(used + need <= asked.limit + ROUNDING)
        used += need if granted[-1] else 0
    ahead = max(0, int(min(asked.ahead, (asked.limit - used) * asked.share)))
    return LeaseGrant(tuple(granted), ahead, used + ahead)


def _row(subject: str, what: str, available: float, updated: float) -> dict[str, Any]:
    return {"subject": subject, "what": what, "available": available, "updated": updated}


_UPDATE = (
    sa.update(schema.buckets)
    .where(schema.buckets.c.subject == sa.bindparam("to_subject"), schema.buckets.c.what == sa.bindparam("to_what"))
    .values(available=sa.bindparam("to_available"), updated=sa.bindparam("to_updated"))
)
