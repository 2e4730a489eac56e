"""API keys, hashed, and quotas. The secret of a key is shown once and kept nowhere."""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.config import check_name
from pedro.errors import AuthenticationError, ConfigError, NotFoundError
from pedro.store import schema
from pedro.store.changes import KEY, QUOTA, announce, audited, next_generation
from pedro.store.records import INFER, NO_QUOTA, SCOPES, KeyRecord, Quota

if TYPE_CHECKING:
    from pedro.store.database import Database

KEY_PREFIX = "sk-pedro-"
MAX_QUOTA = 10**9  # a minute


class KeyTable:
    """Reads and writes keys and quotas."""

    _database: Database

    def create_key(
        self,
        tenant: str,
        scopes: Iterable[str] = (INFER,),
        name: str = "",
        quota: Quota = NO_QUOTA,
        *,
        actor: str | None = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its secret, which is not kept and cannot be shown again. Raises ConfigError."""
        check_name("tenant", tenant)
        wanted = set(scopes)
        unknown = sorted(wanted - set(SCOPES))
        if unknown or not wanted:
            got = ", ".join(unknown) or "none"
            raise ConfigError(f"scopes: expected some of {', '.join(SCOPES)}, got {got}", param="scopes")
        _check_limits(quota.__dict__)
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(
            id=f"key_{uuid.uuid4().hex}",
            tenant=tenant,
            name=name,
            scopes=tuple(scope for scope in SCOPES if scope in wanted),
            hint=secret[-4:],
            created=time.time(),
            revoked=None,
            quota=quota,
        )
        values = {**record.__dict__, "scopes": ",".join(record.scopes), "digest": hash_secret(secret)}
        del values["quota"]
        with self._database.writing() as connection:
            values["generation"] = generation = next_generation(connection)
            connection.execute(sa.insert(schema.keys).values(values))
            announce(connection, generation, KEY, record.id)
            audited(connection, actor, "key.create", tenant, record.id, after=_shown(record))
            if quota != NO_QUOTA:
                connection.execute(
                    sa.insert(schema.quotas).values(subject=f"key:{record.id}", **quota.__dict__, generation=generation)
                )
        return record, secret

    def authenticate(self, secret: str) -> tuple[KeyRecord, Quota]:
        """The live key with this secret, and its tenant's quota. Raises AuthenticationError, the same for unknown
        and revoked."""
        digest = hash_secret(secret)
        found = self.find_keys([digest])  # compares hashes, whose prefixes a caller cannot steer
        if digest not in found:
            raise unknown_key()
        return found[digest]

    def find_keys(self, digests: Collection[str]) -> dict[str, tuple[KeyRecord, Quota]]:
        """The live keys among those whose secrets have these hashes, each with its tenant's quota."""
        live = sa.and_(schema.keys.c.digest.in_(digests), schema.keys.c.revoked.is_(None))
        with self._database.reading() as connection:
            rows = connection.execute(_KEYS_WITH_QUOTAS.where(live)).all()
        return {row.digest: (_key_record(row), Quota(row.tenant_requests, row.tenant_tokens)) for row in rows}

    def revoke_key(self, key_id: str, *, actor: str | None = None) -> KeyRecord:
        """Ends a key; doing so again changes nothing. Raises NotFoundError."""
        live = sa.and_(schema.keys.c.id == key_id, schema.keys.c.revoked.is_(None))
        with self._database.writing() as connection:
            generation = next_generation(connection)
            revoke = sa.update(schema.keys).where(live).values(revoked=time.time(), generation=generation)
            ended = connection.execute(revoke).rowcount
            row = connection.execute(_KEYS_WITH_QUOTAS.where(schema.keys.c.id == key_id)).one_or_none()
            if row is None:
                raise _key_not_found(key_id)
            if ended:
                announce(connection, generation, KEY, key_id)
                audited(connection, actor, "key.revoke", row.tenant, key_id)
        return _key_record(row)

    def list_keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """Keys, revoked ones included, oldest first; of every tenant if none is named."""
        query = _KEYS_WITH_QUOTAS.order_by(schema.keys.c.created, schema.keys.c.id)
        if tenant is not None:
            query = query.where(schema.keys.c.tenant == tenant)
        with self._database.reading() as connection:
            return [_key_record(row) for row in connection.execute(query)]

    # quotas

    def set_quota(
        self,
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        actor: str | None = None,
    ) -> Quota:
        """Sets the limits that are given, of one tenant or of one key; 0 takes a limit away, None leaves it.

        Holds from the next request on. Raises ConfigError, or NotFoundError for an unknown key.
        """
        assert (tenant is None) != (key_id is None), "a quota belongs to a tenant or to a key"
        given = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
        _check_limits(given)
        if tenant is not None:
            check_name("tenant", tenant)
        values = {name: value or None for name, value in given.items() if value is not None}
        subject = f"tenant:{tenant}" if tenant is not None else f"key:{key_id}"
        with self._database.writing() as connection:
            generation = next_generation(connection)
            if key_id is not None:
                found = connection.execute(sa.select(schema.keys.c.tenant).where(schema.keys.c.id == key_id))
                tenant = found.scalar_one_or_none()
            if tenant is None:
                raise _key_not_found(str(key_id))
            before = _quota_of(connection, subject)
            if values:
                values["generation"] = generation
                connection.execute(self._database.upsert(schema.quotas, {"subject": subject}, values))
                announce(connection, generation, QUOTA, subject)
            after = _quota_of(connection, subject)
            if before != after:
                states = {"before": before.__dict__, "after": after.__dict__}
                audited(connection, actor, "quota.set", tenant, subject, **states)
        return after

    def list_quotas(self) -> dict[str, Quota]:
        """The quota of every tenant that has a key or a quota, by name."""
        with self._database.reading() as connection:
            quotas = {tenant: Quota() for (tenant,) in connection.execute(sa.select(schema.keys.c.tenant).distinct())}
            for row in connection.execute(
                sa.select(schema.quotas).where(schema.quotas.c.subject.startswith("tenant:"))
            ):
                quotas[row.subject.removeprefix("tenant:")] = Quota(row.requests_per_minute, row.tokens_per_minute)
        return dict(sorted(quotas.items()))


def hash_secret(secret: str) -> str:
    """What is kept of a key's secret, and what it is found by."""
    return hashlib.sha256(secret.encode()).hexdigest()


def unknown_key() -> AuthenticationError:
    """The one 401 for a key, the same for an unknown and for a revoked one."""
    return AuthenticationError("Incorrect API key provided. It is unknown or has been revoked.")


def _keys_with_quotas() -> sa.Select[Any]:
    of_key, of_tenant = schema.quotas.alias(), schema.quotas.alias()
    joined = schema.keys.outerjoin(of_key, of_key.c.subject == "key:" + schema.keys.c.id)
    joined = joined.outerjoin(of_tenant, of_tenant.c.subject == "tenant:" + schema.keys.c.tenant)
    return sa.select(
        schema.keys,
        of_key.c.requests_per_minute.label("key_requests"),
        of_key.c.tokens_per_minute.label("key_tokens"),
        of_tenant.c.requests_per_minute.label("tenant_requests"),
        of_tenant.c.tokens_per_minute.label("tenant_tokens"),
    ).select_from(joined)


_KEYS_WITH_QUOTAS = _keys_with_quotas()


def _key_record(row: sa.Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id,
        row.tenant,
        row.name,
        tuple(row.scopes.split(",")),
        row.hint,
        row.created,
        row.revoked,
        Quota(row.key_requests, row.key_tokens),
    )


def _quota_of(connection: sa.Connection, subject: str) -> Quota:
    row = connection.execute(sa.select(schema.quotas).where(schema.quotas.c.subject == subject)).one_or_none()
    return NO_QUOTA if row is None else Quota(row.requests_per_minute, row.tokens_per_minute)


def _shown(record: KeyRecord) -> dict[str, Any]:
    return {"name": record.name, "scopes": list(record.scopes), "quota": record.quota.__dict__}


def _check_limits(limits: Mapping[str, int | None]) -> None:
    for name, value in limits.items():
        if value is not None and not 0 <= value <= MAX_QUOTA:
            raise ConfigError(f"{name}: expected 0 (no limit) to {MAX_QUOTA:,}, got {value}", param=name)


def _key_not_found(key_id: str) -> NotFoundError:
    return NotFoundError(f"key '{key_id}' does not exist; list keys to see their ids", param="key")
