"""Quotas of tenants and keys: limits a minute, budgets of a day and a month. What they are held to is the gateway's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.config import check_name
from pedro.errors import ConfigError, NotFoundError
from pedro.store import schema
from pedro.store.changes import QUOTA, announce, audited, next_generation
from pedro.store.erasing import refuse_erased
from pedro.store.records import LIMITS, NO_QUOTA, TRAINING_LIMITS, By, Quota

if TYPE_CHECKING:
    from pedro.store.database import Database

MOST_A_MINUTE, MOST = 10**9, 10**14


class QuotaTable:
    """Reads and writes quotas."""

    _database: Database

    def set_quota(
        self,
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        actor: By = None,
        **limits: int | None,
    ) -> Quota:
        """Sets the limits that are given (the fields of `Quota`), of one tenant or of one key; 0 takes a limit away,
        None leaves it.

        Holds from the next request on. Raises ConfigError, also for hours of training of a key, or NotFoundError for an
        unknown key.
        """
        assert (tenant is None) != (key_id is None), "a quota belongs to a tenant or to a key"
        assert limits.keys() <= set(LIMITS), f"a quota has the limits {', '.join(LIMITS)}"
        check_limits(limits)
        for name in TRAINING_LIMITS:
            if key_id is not None and limits.get(name) is not None:
                raise ConfigError(f"{name}: is a limit of tenants, for all their keys together", param=name)
        if tenant is not None:
            check_name("tenant", tenant)
        values = {name: value or None for name, value in limits.items() if value is not None}
        subject = f"tenant:{tenant}" if tenant is not None else f"key:{key_id}"
        with self._database.writing() as connection:
            generation = next_generation(connection)
            if key_id is not None:
                found = connection.execute(sa.select(schema.keys.c.tenant).where(schema.keys.c.id == key_id))
                tenant = found.scalar_one_or_none()
            if tenant is None:
                raise key_not_found(str(key_id))
            refuse_erased(connection, tenant)
            before = _quota_of(connection, subject)
            if values:
                row = {**values, "generation": generation}
                connection.execute(self._database.upsert(schema.quotas, {"subject": subject}, row))
                announce(connection, generation, QUOTA, subject)
            after = _quota_of(connection, subject)
            if before != after:
                states = {"before": shown(before), "after": shown(after)}
                audited(connection, actor, "quota.set", tenant, subject, **states)
        return after

    def list_quotas(self) -> dict[str, Quota]:
        """The quota of every tenant that has a key or a quota, by name."""
        with self._database.reading() as connection:
            quotas = {tenant: Quota() for (tenant,) in connection.execute(sa.select(schema.keys.c.tenant).distinct())}
            for row in connection.execute(
                sa.select(schema.quotas).where(schema.quotas.c.subject.startswith("tenant:"))
            ):
                quotas[row.subject.removeprefix("tenant:")] = read_quota(row)
        return dict(sorted(quotas.items()))

    def training_budgets(self) -> dict[str, Quota]:
        """The quotas of tenants that have a budget of training."""
        table = schema.quotas
        limited = sa.or_(*(table.c[name].is_not(None) for name in TRAINING_LIMITS))
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(table).where(table.c.subject.startswith("tenant:"), limited))
            return {row.subject.removeprefix("tenant:"): read_quota(row) for row in rows}


def limit_columns(table: sa.FromClause, prefix: str) -> list[sa.Label[Any]]:
    """The limits of a row of quotas, to be selected beside another one."""
    return [table.c[name].label(prefix + name) for name in LIMITS]


def read_quota(row: sa.Row[Any], prefix: str = "") -> Quota:
    """The quota in the columns of that prefix; of a row that was not there, none."""
    return Quota(**{name: row._mapping[prefix + name] for name in LIMITS})


def shown(quota: Quota) -> dict[str, int]:
    """The limits that there are, for the audit."""
    return {name: value for name, value in quota.__dict__.items() if value is not None}


def check_limits(limits: Mapping[str, int | None]) -> None:
    """Raises ConfigError for a limit that is none."""
    for name, value in limits.items():
        most = MOST_A_MINUTE if name.endswith("_minute") else MOST
        if value is not None and not 0 <= value <= most:
            raise ConfigError(f"{name}: expected 0 (no limit) to {most:,}, got {value}", param=name)


def key_not_found(key_id: str) -> NotFoundError:
    """There is no key of that id."""
    return NotFoundError(f"key '{key_id}' does not exist; list keys to see their ids", param="key")


def _quota_of(connection: sa.Connection, subject: str) -> Quota:
    row = connection.execute(sa.select(schema.quotas).where(schema.quotas.c.subject == subject)).one_or_none()
    return NO_QUOTA if row is None else read_quota(row)
