"""What PostgreSQL allows the role that drivers of jobs connect as: to its job, to versions, to the ledger.

It opens neither keys, quotas, batches and their answers, nor what webhooks' secrets are made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pedro.errors import ConfigError
from pedro.store import schema

if TYPE_CHECKING:
    from pedro.store.database import Database

READ, ADD, CHANGE, REMOVE = "SELECT", "INSERT", "UPDATE", "DELETE"
RIGHTS: Mapping[sa.Table, tuple[str, ...]] = {
    schema.jobs: (READ, CHANGE),
    schema.job_events: (READ, ADD, REMOVE),
    schema.files: (READ, ADD),  # those that it trains on, and its metrics
    schema.adapters: (READ, ADD, CHANGE, REMOVE),
    schema.versions: (READ, ADD, CHANGE, REMOVE),
    schema.alias_history: (READ, ADD, REMOVE),
    schema.canaries: (READ, REMOVE),  # that end with a promotion
    schema.shadows: (READ, REMOVE),
    schema.changes: (READ, ADD),
    schema.counters: (READ, ADD, CHANGE),
    schema.usage: (READ, ADD, CHANGE),
    schema.audit: (READ, ADD),
    schema.webhook_deliveries: (READ, ADD),
}
ENDPOINTS = "SELECT (id, tenant, event_types), UPDATE (last_failed, last_error)"


def grant(database: Database, role: str) -> None:
    """Let a role that there is do this, and nothing else that it could before. Again does no harm.

    Raises ConfigError for sqlite, which has no roles, and for a role that there is not.
    """
    if database.is_sqlite:
        raise ConfigError(
            "--driver-role: PEDRO_DATABASE_URL is an sqlite file, which has no roles; leave it out, or use PostgreSQL",
            param="--driver-role",
        )
    with database.writing() as connection:
        if not connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).first():
            raise ConfigError(
                f"--driver-role: PostgreSQL has no role {role[:80]!r}; make it: CREATE ROLE … LOGIN PASSWORD …",
                param="--driver-role",
            )
        quoted = connection.dialect.identifier_preparer.quote
        to, place = quoted(role), quoted(str(connection.scalar(sa.text("SELECT current_database()"))))
        tables = ", ".join(quoted(table.name) for table in schema.metadata.tables.values())
        of_webhooks = quoted(schema.webhook_endpoints.name)
        for statement in (
            f"REVOKE ALL ON {tables} FROM {to}",
            f"GRANT CONNECT ON DATABASE {place} TO {to}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {to}",
            f"GRANT SELECT ON {quoted(schema.VERSION_TABLE)} TO {to}",
            *(f"GRANT {', '.join(rights)} ON {quoted(table.name)} TO {to}" for table, rights in RIGHTS.items()),
            f"GRANT {ENDPOINTS} ON {of_webhooks} TO {to}",
        ):
            connection.execute(sa.text(statement))
