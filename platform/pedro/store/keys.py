"""API keys: made, rotated, ended, found by the hash of their secret, which is shown once and kept nowhere."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.config import check_name
from pedro.errors import AuthenticationError, ConfigError, ConflictError
from pedro.store import schema
from pedro.store.changes import KEY, announce, audited, next_generation
from pedro.store.erasing import refuse_erased
from pedro.store.quotas import check_limits, key_not_found, limit_columns, read_quota, shown
from pedro.store.records import ADMIN, INFER, NO_QUOTA, SCOPES, By, KeyRecord, Quota, hash_secret

if TYPE_CHECKING:
    from pedro.store.database import Database

KEY_PREFIX = "sk-pedro-"
MAX_NAME, MAX_SHOWN = 200, 10
MAX_OVERLAP_S = 90 * 24 * 3600.0
USED_AGAIN_S = 60.0  # how often it is written that a key was used
MARKED_TOGETHER = 500  # keys in one transaction


class KeyTable:
    """Reads and writes keys."""

    _database: Database

    def create_key(
        self,
        tenant: str,
        scopes: Iterable[str] = (INFER,),
        name: str = "",
        quota: Quota = NO_QUOTA,
        *,
        expires: float | None = None,
        adapters: Iterable[str] | None = None,
        actor: By = None,
    ) -> tuple[KeyRecord, str]:
        """A new key and its secret, which is not kept and cannot be shown again.

        `expires` is when it ends, `adapters` are the only ones of its tenant that it may name. Raises ConfigError.
        """
        check_name("tenant", tenant)
        now, wanted = time.time(), set(scopes)
        unknown = sorted(wanted - set(SCOPES))
        if unknown or not wanted:
            got = ", ".join(map(repr, unknown)) or "none"
            raise ConfigError(f"scopes: expected some of {', '.join(SCOPES)}, got {got}", param="scopes")
        if len(name) > MAX_NAME or not name.isprintable():
            raise ConfigError(
                f"name: expected at most {MAX_NAME} printable characters, got {name[:80]!r}", param="name"
            )
        if expires is not None and expires <= now:
            raise ConfigError("expires: expected a time to come, got one that is over", param="expires")
        check_limits(quota.__dict__)
        only = None if adapters is None else _plain_names(tenant, adapters)
        if only is not None and ADMIN in wanted:
            raise ConfigError(
                "adapters: a key with the scope admin may name every tenant's; leave out the one or the other",
                param="adapters",
            )
        key, secret = _new_key(tenant, tuple(scope for scope in SCOPES if scope in wanted), now)
        record = replace(key, name=name, quota=quota, expires=expires, adapters=only)
        with self._database.writing() as connection:
            generation = next_generation(connection)
            refuse_erased(connection, tenant)
            if only is not None:
                _check_adapters(connection, tenant, only)
            _insert(connection, generation, record, secret)
            audited(connection, actor, "key.create", tenant, record.id, after=_shown(record))
        return record, secret

    def rotate_key(self, key_id: str, overlap_s: float, *, actor: By = None) -> tuple[KeyRecord, str]:
        """A new key with the rights of `key_id`, and its secret; the old one ends after `overlap_s`.

        A key that expires is replaced by one that lives as long from now on as that one did. Of two rotations at once
        one gets the ConflictError, as does one of a key that ended. Raises NotFoundError, ConfigError.
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise ConfigError(
                f"overlap: expected at least 0 and at most {MAX_OVERLAP_S / 86400:g} days, got {overlap_s:g} s",
                param="overlap",
            )
        with self._database.writing() as connection:
            generation, now = next_generation(connection), time.time()
            old = _get(connection, key_id)
            if old.state(now) != "active":
                raise ConflictError(f"key '{key_id}' is {old.state(now)} and cannot be rotated; create a new one")
            query = _KEYS_WITH_QUOTAS.where(schema.keys.c.replaces == key_id).order_by(schema.keys.c.created)
            made = [_key_record(row) for row in connection.execute(query)]
            for successor in made:
                if successor.revoked is None:
                    raise ConflictError(f"key '{key_id}' was rotated: '{successor.id}' replaces it; rotate that one")
            pattern = made[-1] if made else old  # whose end is not that of an overlap
            key, secret = _new_key(old.tenant, old.scopes, now)
            record = replace(
                key,
                name=old.name,
                quota=old.quota,
                expires=None if pattern.expires is None else now + (pattern.expires - pattern.created),
                adapters=old.adapters,
                replaces=key_id,
            )
            _insert(connection, generation, record, secret)
            ends = now + overlap_s if old.expires is None else min(old.expires, now + overlap_s)
            row = sa.update(schema.keys).where(schema.keys.c.id == key_id)
            connection.execute(row.values(expires=ends, generation=generation))
            announce(connection, generation, KEY, key_id)
            audited(connection, actor, "key.create", old.tenant, record.id, after=_shown(record))
            before, after = {"expires": old.expires}, {"expires": ends, "replaced_by": record.id}
            audited(connection, actor, "key.rotate", old.tenant, key_id, before=before, after=after)
        return record, secret

    def authenticate(self, secret: str) -> tuple[KeyRecord, Quota]:
        """The live key with this secret, and its tenant's quota. Raises AuthenticationError, the same for unknown,
        expired and revoked."""
        digest = hash_secret(secret)
        found = self.find_keys([digest])  # compares hashes, whose prefixes a caller cannot steer
        if digest not in found:
            raise unknown_key()
        return found[digest]

    def find_keys(self, digests: Collection[str]) -> dict[str, tuple[KeyRecord, Quota]]:
        """The live keys among those whose secrets have these hashes, each with its tenant's quota."""
        keys = schema.keys.c
        in_time = sa.or_(keys.expires.is_(None), keys.expires > time.time())
        live = sa.and_(keys.digest.in_(digests), keys.revoked.is_(None), in_time)
        with self._database.reading() as connection:
            rows = connection.execute(_KEYS_WITH_QUOTAS.where(live)).all()
        return {row.digest: (_key_record(row), read_quota(row, "tenant_")) for row in rows}

    def revoke_key(self, key_id: str, *, actor: By = None) -> KeyRecord:
        """Ends a key; doing so again changes nothing. Raises NotFoundError."""
        live = sa.and_(schema.keys.c.id == key_id, schema.keys.c.revoked.is_(None))
        with self._database.writing() as connection:
            generation = next_generation(connection)
            revoke = sa.update(schema.keys).where(live).values(revoked=time.time(), generation=generation)
            ended = connection.execute(revoke).rowcount
            record = _get(connection, key_id)
            if ended:
                announce(connection, generation, KEY, key_id)
                audited(connection, actor, "key.revoke", record.tenant, key_id, after={"revoked": record.revoked})
        return record

    def get_key(self, key_id: str) -> KeyRecord:
        """One key by its id. Raises NotFoundError."""
        with self._database.reading() as connection:
            return _get(connection, key_id)

    def find_key(self, key_id: str) -> tuple[KeyRecord, Quota] | None:
        """A live key by its id, with its tenant's quota; None where it has ended."""
        with self._database.reading() as connection:
            row = connection.execute(_KEYS_WITH_QUOTAS.where(schema.keys.c.id == key_id)).one_or_none()
        if row is None or _key_record(row).state(time.time()) != "active":
            return None
        return _key_record(row), read_quota(row, "tenant_")

    def list_keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """Keys, revoked ones included, oldest first; of every tenant if none is named."""
        query = _KEYS_WITH_QUOTAS.order_by(schema.keys.c.created, schema.keys.c.id)
        if tenant is not None:
            query = query.where(schema.keys.c.tenant == tenant)
        with self._database.reading() as connection:
            return [_key_record(row) for row in connection.execute(query)]

    def mark_used(self, at: Mapping[str, float]) -> None:
        """Write when keys were used last, by id; at most once in `USED_AGAIN_S` a key, whoever else writes it too.

        No change that anybody must hear of, so it takes no number. Rows are touched in one order, and nobody waits.
        """
        keys, times, when = schema.keys.c, sorted(at.items()), sa.bindparam("at", type_=sa.Float)
        due = sa.or_(keys.last_used.is_(None), keys.last_used <= when - USED_AGAIN_S)
        used = sa.update(schema.keys).where(keys.id == sa.bindparam("key"), due).values(last_used=when)
        for start in range(0, len(times), MARKED_TOGETHER):
            rows = [{"key": key, "at": moment} for key, moment in times[start : start + MARKED_TOGETHER]]
            with self._database.writing() as connection:
                connection.execute(used, rows)


def unknown_key() -> AuthenticationError:
    """The one 401 for a key, the same for an unknown, an expired and a revoked one."""
    return AuthenticationError("Incorrect API key provided. It is unknown, has expired or has been revoked.")


def _keys_with_quotas() -> sa.Select[Any]:
    of_key, of_tenant = schema.quotas.alias(), schema.quotas.alias()
    joined = schema.keys.outerjoin(of_key, of_key.c.subject == "key:" + schema.keys.c.id)
    joined = joined.outerjoin(of_tenant, of_tenant.c.subject == "tenant:" + schema.keys.c.tenant)
    limits = [*limit_columns(of_key, "key_"), *limit_columns(of_tenant, "tenant_")]
    return sa.select(schema.keys, *limits).select_from(joined)


_KEYS_WITH_QUOTAS = _keys_with_quotas()


def _get(connection: sa.Connection, key_id: str) -> KeyRecord:
    row = connection.execute(_KEYS_WITH_QUOTAS.where(schema.keys.c.id == key_id)).one_or_none()
    if row is None:
        raise key_not_found(key_id)
    return _key_record(row)


def _key_record(row: sa.Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id,
        row.tenant,
        row.name,
        tuple(row.scopes.split(",")),
        row.hint,
        row.created,
        row.revoked,
        read_quota(row, "key_"),
        row.expires,
        row.last_used,
        None if row.adapters is None else tuple(row.adapters),
        row.replaces,
    )


def _new_key(tenant: str, scopes: tuple[str, ...], now: float) -> tuple[KeyRecord, str]:
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    return KeyRecord(f"key_{uuid.uuid4().hex}", tenant, "", scopes, secret[-4:], now, None), secret


def _insert(connection: sa.Connection, generation: int, record: KeyRecord, secret: str) -> None:
    values = {
        **record.__dict__,
        "scopes": ",".join(record.scopes),
        "adapters": None if record.adapters is None else list(record.adapters),
        "digest": hash_secret(secret),
        "generation": generation,
    }
    del values["quota"]
    connection.execute(sa.insert(schema.keys).values(values))
    if record.quota != NO_QUOTA:
        quota = {"subject": f"key:{record.id}", **record.quota.__dict__, "generation": generation}
        connection.execute(sa.insert(schema.quotas).values(quota))
    announce(connection, generation, KEY, record.id)


def _plain_names(tenant: str, adapters: Iterable[str]) -> tuple[str, ...]:
    """The adapters' own names, once each, of `voice` and `acme.voice` alike."""
    names = tuple(dict.fromkeys(name.removeprefix(f"{tenant}.") for name in adapters))
    if not names:
        raise ConfigError("adapters: expected some of the tenant's adapters, got none", param="adapters")
    return names


def _check_adapters(connection: sa.Connection, tenant: str, names: Collection[str]) -> None:
    table = schema.adapters
    alive = sa.select(table.c.adapter).where(table.c.tenant == tenant, table.c.deleted.is_(None))
    there = connection.execute(alive.order_by(table.c.adapter)).scalars().all()
    for name in names:
        if name not in there:
            some = f"it has {', '.join(there[:MAX_SHOWN])}{', …' if len(there) > MAX_SHOWN else ''}"
            raise ConfigError(
                f"adapters: {tenant} has no adapter {name[:80]!r}; {some if there else 'it has none yet'}",
                param="adapters",
            )


def _shown(record: KeyRecord) -> dict[str, Any]:
    """What the audit keeps of a key: its rights."""
    rights = {
        "name": record.name,
        "scopes": list(record.scopes),
        "quota": shown(record.quota),
        "expires": record.expires,
        "adapters": None if record.adapters is None else list(record.adapters),
        "replaces": record.replaces,
    }
    return {name: value for name, value in rights.items() if value not in (None, {}, "")}
