"""The mark of a tenant whose erasure has begun and not ended: nothing new of it is accepted until then.

It holds no name, so that none is left where an erasure is never ended.
"""

from __future__ import annotations

import hashlib
import time

import sqlalchemy as sa

from pedro.errors import ConflictError
from pedro.store import schema

PREFIX = "erasing:"


def mark(connection: sa.Connection, tenant: str) -> None:
    """From here on nothing of the tenant is taken; again does no harm."""
    if not is_marked(connection, tenant):
        connection.execute(sa.insert(schema.counters).values(name=_name(tenant), value=int(time.time())))


def unmark(connection: sa.Connection, tenant: str) -> None:
    """The name is as good as any other."""
    connection.execute(sa.delete(schema.counters).where(schema.counters.c.name == _name(tenant)))


def is_marked(connection: sa.Connection, tenant: str) -> bool:
    query = sa.select(schema.counters.c.value).where(schema.counters.c.name == _name(tenant))
    return connection.execute(query).first() is not None


def refuse_erased(connection: sa.Connection, tenant: str) -> None:
    """For whoever enters something of a tenant. Raises ConflictError while it is being erased."""
    if is_marked(connection, tenant):
        raise ConflictError(
            f"tenant: {tenant!r} is being erased; `pedro tenants erase {tenant}` ends that, and the name is free again",
            param="tenant",
        )


def _name(tenant: str) -> str:
    return PREFIX + hashlib.sha256(tenant.encode()).hexdigest()[:32]
