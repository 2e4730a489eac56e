"""Tenants' webhook endpoints: where events are sent, which, and what their signing secrets are made of.

A secret is not here: it is made anew, of a salt that is, by a key of a file that only gateways read.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from pedro.errors import NotFoundError, PedroError
from pedro.store import schema
from pedro.store.changes import audited, next_generation
from pedro.store.erasing import refuse_erased

if TYPE_CHECKING:
    from pedro.store.database import Database
    from pedro.store.records import By

MAX_ENDPOINTS = 10  # of a tenant
ENDPOINTS, DELIVERIES = schema.webhook_endpoints.c, schema.webhook_deliveries.c


@dataclass(frozen=True)
class SecretSource:
    """What one signing secret is made of, beside the endpoint's id and a key."""

    salt: str
    key: str
    """Which of the file's keys: the beginning of its hash."""
    until: float | None = None
    """When it ends: a secret that was rotated, and still signs for a while."""


@dataclass(frozen=True)
class WebhookEndpoint:
    """Where a tenant's events go."""

    id: str
    tenant: str
    name: str
    url: str = field(repr=False)  # tenants put tokens into theirs
    event_types: tuple[str, ...]
    secrets: tuple[SecretSource, ...] = field(repr=False)
    hint: str
    created: float
    updated: float
    last_delivered: float | None = None
    last_failed: float | None = None
    last_error: str | None = None


class WebhookTable:
    """Enters endpoints and changes them. An endpoint that is not the tenant's is a NotFoundError."""

    _database: Database

    def create_webhook(self, endpoint: WebhookEndpoint, *, actor: By = None) -> None:
        """Raises PedroError where the tenant has as many as it may have."""
        with self._database.writing() as connection:
            next_generation(connection)
            refuse_erased(connection, endpoint.tenant)
            count = sa.select(sa.func.count()).where(ENDPOINTS.tenant == endpoint.tenant)
            if connection.execute(count).scalar_one() >= MAX_ENDPOINTS:
                message = (
                    f"You have {MAX_ENDPOINTS} webhook endpoints, which is the most; delete one that you do not need."
                )
                raise PedroError(message, code="webhook_limit_exceeded")
            connection.execute(sa.insert(schema.webhook_endpoints).values(asdict(endpoint)))
            audited(connection, actor, "webhook.create", endpoint.tenant, endpoint.id, after=_told(endpoint))

    def get_webhook(self, endpoint_id: str, tenant: str | None) -> WebhookEndpoint:
        """One of a tenant's; None: of anybody's, for operators."""
        with self._database.reading() as connection:
            return to_endpoint(_found(connection, endpoint_id, tenant))

    def list_webhooks(
        self, tenant: str | None = None, *, after: str | None = None, limit: int | None = None
    ) -> list[WebhookEndpoint]:
        """Of a tenant, or of all; the newest first, `limit` of them behind `after`."""
        query = sa.select(schema.webhook_endpoints).limit(limit)
        if tenant is not None:
            query = query.where(ENDPOINTS.tenant == tenant)
        with self._database.reading() as connection:
            if after is not None:
                last = _found(connection, after, tenant)
                here = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
                query = query.where(sa.tuple_(ENDPOINTS.created, ENDPOINTS.id) < here)
            rows = connection.execute(query.order_by(ENDPOINTS.created.desc(), ENDPOINTS.id.desc())).all()
        return [to_endpoint(row) for row in rows]

    def update_webhook(
        self,
        endpoint_id: str,
        tenant: str,
        now: float,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[str] | None = None,
        actor: By = None,
    ) -> WebhookEndpoint:
        """What is not given stays. Events that wait go to the new URL."""
        given = {"name": name, "url": url, "event_types": None if event_types is None else list(event_types)}
        values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return self._change_webhook(endpoint_id, tenant, now, values, "webhook.update", actor)

    def rotate_webhook_secret(
        self,
        endpoint_id: str,
        tenant: str,
        source: SecretSource,
        hint: str,
        *,
        now: float,
        keep_until: float | None = None,
        actor: By = None,
    ) -> WebhookEndpoint:
        """Sign with another secret from now on; `keep_until`: until then with the last one, too."""
        old = self.get_webhook(endpoint_id, tenant).secrets[:1] if keep_until is not None else ()
        kept = [source, *(SecretSource(one.salt, one.key, keep_until) for one in old)]
        values = {"secrets": [asdict(one) for one in kept], "hint": hint}
        return self._change_webhook(endpoint_id, tenant, now, values, "webhook.rotate_secret", actor)

    def delete_webhook(self, endpoint_id: str, tenant: str, *, actor: By = None) -> None:
        """With all that was to be sent to it."""
        with self._database.writing() as connection:
            next_generation(connection)
            endpoint = to_endpoint(_found(connection, endpoint_id, tenant))
            connection.execute(sa.delete(schema.webhook_deliveries).where(DELIVERIES.endpoint_id == endpoint_id))
            connection.execute(sa.delete(schema.webhook_endpoints).where(ENDPOINTS.id == endpoint_id))
            audited(connection, actor, "webhook.delete", tenant, endpoint_id, before=_told(endpoint))

    def _change_webhook(
        self, endpoint_id: str, tenant: str, now: float, values: dict[str, Any], action: str, actor: By
    ) -> WebhookEndpoint:
        """Write what differs; nothing, and no entry of the audit, where nothing does."""
        with self._database.writing() as connection:
            next_generation(connection)
            row = _found(connection, endpoint_id, tenant)
            before = to_endpoint(row)
            changed = {key: value for key, value in values.items() if getattr(row, key) != value}
            if not changed:
                return before
            update = sa.update(schema.webhook_endpoints).where(ENDPOINTS.id == endpoint_id)
            connection.execute(update.values(**changed, updated=now))
            after = to_endpoint(_found(connection, endpoint_id, tenant))
            audited(connection, actor, action, tenant, endpoint_id, before=_told(before), after=_told(after))
            return after


def new_webhook_id() -> str:
    return f"we_{secrets.token_hex(12)}"


def forget_webhooks_of(connection: sa.Connection, tenant: str) -> None:
    """A tenant's endpoints and what was to be sent to them: nothing more is."""
    for table in (schema.webhook_deliveries, schema.webhook_endpoints):
        connection.execute(sa.delete(table).where(table.c.tenant == tenant))


def to_endpoint(row: sa.Row[Any]) -> WebhookEndpoint:
    """A row as others see it."""
    values = {column.name: getattr(row, column.name) for column in ENDPOINTS}
    sources = tuple(SecretSource(**one) for one in row.secrets)
    return WebhookEndpoint(**{**values, "event_types": tuple(row.event_types), "secrets": sources})


def _told(endpoint: WebhookEndpoint) -> dict[str, Any]:
    """What the audit keeps: of the URL its host alone, of the secret nothing."""
    host = urlsplit(endpoint.url).hostname
    return {"name": endpoint.name, "host": host, "event_types": list(endpoint.event_types)}


def _found(connection: sa.Connection, endpoint_id: str, tenant: str | None) -> sa.Row[Any]:
    query = sa.select(schema.webhook_endpoints).where(ENDPOINTS.id == endpoint_id)
    if tenant is not None:
        query = query.where(ENDPOINTS.tenant == tenant)
    row = connection.execute(query).one_or_none() if "\0" not in endpoint_id else None  # PostgreSQL takes none
    if row is None:
        raise NotFoundError(f"No such webhook endpoint: {endpoint_id[:64]}", param="webhook_endpoint_id")
    return row
