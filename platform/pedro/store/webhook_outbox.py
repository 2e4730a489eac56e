"""What webhooks tell of: which events there are, and their entry in the transaction of the change that they tell of.

An event is one row for each endpoint that asks for its type: it is there if, and only if, its change is. Who sends them
is for others to know.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.store import schema

if TYPE_CHECKING:
    from pedro.refs import ModelRef
    from pedro.store.records import Canary, JobStatus, Standing

ALIAS_MOVED = "adapter.alias.moved"
CANARY_STARTED, CANARY_CHANGED = "adapter.canary.started", "adapter.canary.changed"
CANARY_WITHDRAWN, CANARY_ENDED = "adapter.canary.withdrawn", "adapter.canary.ended"
PING = "ping"  # sent by a test alone
EVENT_TYPES = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    ALIAS_MOVED,
    CANARY_STARTED,
    CANARY_CHANGED,
    CANARY_WITHDRAWN,  # by itself, because of its answers
    CANARY_ENDED,  # in any other way
)
MAX_WAITING = 1000  # events of one endpoint that were not sent yet
DELIVERIES, ENDPOINTS = schema.webhook_deliveries.c, schema.webhook_endpoints.c


def enter_event(connection: sa.Connection, tenant: str, kind: str, data: dict[str, Any], now: float) -> None:
    """Have an event sent to each endpoint of the tenant that asks for its kind. To one for which `MAX_WAITING` wait
    already it is not, as its `last_error` then says."""
    assert kind in EVENT_TYPES, f"{kind} is no event that endpoints can ask for"
    asked = sa.select(ENDPOINTS.id, ENDPOINTS.event_types).where(ENDPOINTS.tenant == tenant).order_by(ENDPOINTS.id)
    wanted = [row.id for row in connection.execute(asked) if kind in row.event_types]
    event_id = new_event_id()
    body = event_body(event_id, kind, data, now)
    for endpoint_id in wanted:
        waiting = sa.select(sa.func.count()).where(DELIVERIES.endpoint_id == endpoint_id, DELIVERIES.ended.is_(None))
        if connection.execute(waiting).scalar_one() >= MAX_WAITING:
            error = f"{event_id} ({kind}) is not sent: {MAX_WAITING} events wait for this endpoint, which is the most"
            told = sa.update(schema.webhook_endpoints).where(ENDPOINTS.id == endpoint_id)
            connection.execute(told.values(last_failed=now, last_error=error))
            continue
        row = {"event_id": event_id, "endpoint_id": endpoint_id, "tenant": tenant, "type": kind, "body": body}
        connection.execute(sa.insert(schema.webhook_deliveries).values(**row, created=now, due=now))


def enter_job_end(connection: sa.Connection, tenant: str, job_id: str, status: JobStatus) -> None:
    """The event of a job that has ended as `status`; a pause is no end."""
    if status.final:
        enter_event(connection, tenant, f"fine_tuning.job.{status.value}", {"id": job_id}, time.time())


def enter_moves(
    connection: sa.Connection, ref: ModelRef, before: Standing, after: Standing, now: float, withdrawn: str = ""
) -> None:
    """The events of one move: one for each alias that means another version now, or none, and those of the canary.

    `withdrawn` is why the canary was withdrawn by its answers.
    """
    was, means = before.aliases, after.aliases
    for alias in sorted(was.keys() | means.keys()):
        if was.get(alias) != means.get(alias):
            data = {"adapter": ref.name, "alias": alias, "version": means.get(alias)}
            enter_event(connection, ref.tenant, ALIAS_MOVED, data, now)
    for kind, canary in _canary_events(before.canary, after.canary, withdrawn):
        enter_event(connection, ref.tenant, kind, {"adapter": ref.name, **canary}, now)


def _canary_events(was: Canary | None, now: Canary | None, withdrawn: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What became of a canary; of one in whose place another version stands, its end comes first."""
    if was == now:
        return
    if was is not None and now is not None and was.version == now.version:
        yield CANARY_CHANGED, {"version": now.version, "weight": now.weight}
        return
    if was is not None and withdrawn:
        yield CANARY_WITHDRAWN, {"version": was.version, "reason": withdrawn}
    elif was is not None:
        yield CANARY_ENDED, {"version": was.version}
    if now is not None:
        yield CANARY_STARTED, {"version": now.version, "weight": now.weight}


def new_event_id() -> str:
    return f"evt_{secrets.token_hex(12)}"


def event_body(event_id: str, kind: str, data: dict[str, Any], now: float) -> str:
    """An event as it is signed and sent, in OpenAI's shape."""
    event = {"id": event_id, "object": "event", "created_at": int(now), "type": kind, "data": data}
    return json.dumps(event, separators=(",", ":"))
