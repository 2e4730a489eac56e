"""What is to be sent to webhook endpoints: leased by who sends it, and how each attempt ended.

A delivery is one gateway's while that holds its lease. Each new holder counts `fence` up and names it when it enters
how its attempt ended, so that one which slept through the end of its lease enters nothing any more: an event may be
sent twice, and is never lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.webhooks import WebhookEndpoint, to_endpoint

if TYPE_CHECKING:
    from pedro.store.database import Database

DELIVERIES, ENDPOINTS = schema.webhook_deliveries.c, schema.webhook_endpoints.c
DELIVERED, GIVEN_UP = "delivered", "given_up"


@dataclass(frozen=True)
class WebhookDelivery:
    """One event for one endpoint."""

    id: int
    event_id: str
    type: str
    body: str
    created: float
    attempts: int
    fence: int
    endpoint: WebhookEndpoint


class WebhookDeliveryTable:
    """Leases deliveries and enters what came of them."""

    _database: Database

    def lease_deliveries(
        self, owner: str, now: float, until: float, per_tenant: int, most: int
    ) -> list[WebhookDelivery]:
        """Take what is due and nobody holds, and hold it `until` then: `most` of all tenants, of each as many as leave
        it `per_tenant` with those that `owner` holds. A tenant's endpoints take turns, and so do tenants."""
        mine = sa.and_(DELIVERIES.lease_owner == owner, DELIVERIES.lease_until >= now)
        free = sa.or_(DELIVERIES.lease_until.is_(None), DELIVERIES.lease_until < now)
        held_first = sa.case((mine, 0), else_=1)
        in_endpoint = sa.func.row_number().over(
            partition_by=DELIVERIES.endpoint_id, order_by=(held_first, DELIVERIES.due, DELIVERIES.id)
        )
        due = (
            sa.select(
                DELIVERIES.id, DELIVERIES.tenant, DELIVERIES.due, held_first.label("new"), in_endpoint.label("turn")
            )
            .where(DELIVERIES.ended.is_(None), DELIVERIES.due <= now, sa.or_(free, mine))
            .subquery()
        ).c
        in_tenant = sa.func.row_number().over(partition_by=due.tenant, order_by=(due.new, due.turn, due.due, due.id))
        ranked = sa.select(due.id, due.due, due.new, in_tenant.label("rank")).subquery().c
        query = sa.select(ranked.id).where(ranked.new == 1, ranked.rank <= per_tenant)
        with self._database.reading() as connection:
            ids = list(connection.execute(query.order_by(ranked.rank, ranked.due, ranked.id).limit(most)).scalars())
        if not ids:
            return []
        taken = sa.update(schema.webhook_deliveries).where(DELIVERIES.id.in_(ids), DELIVERIES.ended.is_(None), free)
        leased = {"lease_owner": owner, "lease_until": until, "fence": DELIVERIES.fence + 1}
        with self._database.writing() as connection:
            got = list(connection.execute(taken.values(leased).returning(DELIVERIES.id)).scalars())
            both = sa.join(schema.webhook_deliveries, schema.webhook_endpoints, DELIVERIES.endpoint_id == ENDPOINTS.id)
            columns = [DELIVERIES[name].label(f"delivery_{name}") for name in _OWN]
            found = sa.select(*columns, schema.webhook_endpoints).select_from(both).where(DELIVERIES.id.in_(got))
            rows = connection.execute(found.order_by(DELIVERIES.due, DELIVERIES.id)).all()
        return [_delivery(row) for row in rows]

    def release_deliveries(self, owner: str) -> None:
        """Give up all leases of `owner`, so that the next gateway need not wait for their end."""
        held = sa.and_(DELIVERIES.lease_owner == owner, DELIVERIES.ended.is_(None))
        with self._database.writing() as connection:
            given_up = sa.update(schema.webhook_deliveries).where(held)
            connection.execute(given_up.values(lease_owner=None, lease_until=None))

    def webhook_delivered(self, delivery: WebhookDelivery, now: float) -> bool:
        """The endpoint took it; False if that is not the holder's to say any more."""
        ended = {"ended": now, "outcome": DELIVERED}
        return self._settle_delivery(delivery, ended, {"last_delivered": now})

    def webhook_failed(self, delivery: WebhookDelivery, now: float, error: str, again: float | None) -> bool:
        """An attempt failed; the next is at `again`, or there is none. False as above."""
        values = {"ended": now, "outcome": GIVEN_UP} if again is None else {"due": again}
        return self._settle_delivery(delivery, values, {"last_failed": now, "last_error": error})

    def count_ended_deliveries(self, before: float) -> int:
        """How many `forget_ended_deliveries` would delete."""
        with self._database.reading() as connection:
            query = sa.select(sa.func.count()).where(DELIVERIES.ended < before)
            return int(connection.execute(query).scalar_one())

    def forget_ended_deliveries(self, before: float) -> int:
        """Delete what was delivered, or given up, before a time; how many."""
        with self._database.writing() as connection:
            return connection.execute(sa.delete(schema.webhook_deliveries).where(DELIVERIES.ended < before)).rowcount

    def _settle_delivery(self, delivery: WebhookDelivery, values: dict[str, Any], told: dict[str, Any]) -> bool:
        held = sa.and_(DELIVERIES.id == delivery.id, DELIVERIES.fence == delivery.fence, DELIVERIES.ended.is_(None))
        over = {"attempts": DELIVERIES.attempts + 1, "lease_owner": None, "lease_until": None, **values}
        with self._database.writing() as connection:
            if not connection.execute(sa.update(schema.webhook_deliveries).where(held).values(over)).rowcount:
                return False
            endpoint = sa.update(schema.webhook_endpoints).where(ENDPOINTS.id == delivery.endpoint.id)
            connection.execute(endpoint.values(told))
        return True


_OWN = ("id", "event_id", "type", "body", "created", "attempts", "fence")


def _delivery(row: Any) -> WebhookDelivery:
    own = {name: getattr(row, f"delivery_{name}") for name in _OWN}
    return WebhookDelivery(**own, endpoint=to_endpoint(row))
