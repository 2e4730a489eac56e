"""The platform's own records (API keys, quotas, jobs) in sqlite or PostgreSQL.

Rows never leave this file: callers get frozen records. Every method is one short transaction, safe from many
threads and processes at once. Times are Unix seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from pedro.config import check_name
from pedro.database import Database
from pedro.errors import AuthenticationError, ConfigError, ConflictError, NotFoundError

INFER, TRAIN, ADMIN = "infer", "train", "admin"
SCOPES = (INFER, TRAIN, ADMIN)
KEY_PREFIX = "sk-pedro-"
MAX_QUOTA = 10**9  # a minute


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not _NEXT[self]


_NEXT = {
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.RUNNING: {
        JobStatus.QUEUED,  # sent back after its cluster was lost
        JobStatus.PAUSED,
        JobStatus.SUCCEEDED,
        JobStatus.FAILED,
        JobStatus.CANCELLED,
    },
    JobStatus.PAUSED: {JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.SUCCEEDED: set(),
    JobStatus.FAILED: set(),
    JobStatus.CANCELLED: set(),
}


@dataclass(frozen=True)
class Quota:
    """The most that may be asked for in a minute; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together


NO_QUOTA = Quota()


@dataclass(frozen=True)
class KeyRecord:
    id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    hint: str  # the secret's last four characters, to tell keys apart in a list
    created: float
    revoked: float | None
    quota: Quota = NO_QUOTA  # the key's own; its tenant's holds as well


@dataclass(frozen=True)
class JobRecord:
    id: str
    tenant: str
    adapter: str
    spec: dict[str, Any]
    status: JobStatus
    submission_id: str | None
    created: float
    finished: float | None
    result: dict[str, Any] | None
    message: str


_metadata = sa.MetaData()
_keys = sa.Table(
    "pedro_keys",
    _metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("scopes", sa.String(100), nullable=False),
    sa.Column("hint", sa.String(4), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # sha256 of the secret
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
)
_quotas = sa.Table(
    "pedro_quotas",
    _metadata,
    sa.Column("subject", sa.String(80), primary_key=True),  # "tenant:acme" or "key:key_..."
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("tokens_per_minute", sa.BigInteger),
)
_jobs = sa.Table(
    "pedro_jobs",
    _metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False, index=True),
    sa.Column("adapter", sa.String(63), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("submission_id", sa.String(200)),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("message", sa.Text, nullable=False),
)


class Store:
    """The records behind one database URL. Picklable: a copy in another process opens its own connections."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that cannot be used, UnavailableError when the database does not answer."""
        self._url = url
        self._database = Database(url, _metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self._url,)

    def close(self) -> None:
        self._database.close()

    # keys

    def create_key(
        self, tenant: str, scopes: Iterable[str] = (INFER,), name: str = "", quota: Quota = NO_QUOTA
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
        values = {**record.__dict__, "scopes": ",".join(record.scopes), "digest": _digest(secret)}
        del values["quota"]
        with self._database.transaction() as connection:
            connection.execute(sa.insert(_keys).values(values))
            if quota != NO_QUOTA:
                connection.execute(sa.insert(_quotas).values(subject=f"key:{record.id}", **quota.__dict__))
        return record, secret

    def authenticate(self, secret: str) -> tuple[KeyRecord, Quota]:
        """The live key with this secret, and its tenant's quota. Raises AuthenticationError, the same for unknown
        and revoked."""
        digest = _digest(secret)
        with self._database.transaction() as connection:
            row = connection.execute(_KEYS_WITH_QUOTAS.where(_keys.c.digest == digest)).one_or_none()
        # The lookup compares hashes, whose prefixes a caller cannot steer; the final comparison is constant-time.
        if row is None or not hmac.compare_digest(row.digest, digest) or row.revoked is not None:
            raise AuthenticationError("Incorrect API key provided. It is unknown or has been revoked.")
        return _key_record(row), Quota(row.tenant_requests, row.tenant_tokens)

    def revoke_key(self, key_id: str) -> KeyRecord:
        """Ends a key; doing so again changes nothing. Raises NotFoundError."""
        live = sa.and_(_keys.c.id == key_id, _keys.c.revoked.is_(None))
        with self._database.transaction() as connection:
            connection.execute(sa.update(_keys).where(live).values(revoked=time.time()))
            row = connection.execute(_KEYS_WITH_QUOTAS.where(_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise _key_not_found(key_id)
        return _key_record(row)

    def list_keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """Keys, revoked ones included, oldest first; of every tenant if none is named."""
        query = _KEYS_WITH_QUOTAS.order_by(_keys.c.created, _keys.c.id)
        if tenant is not None:
            query = query.where(_keys.c.tenant == tenant)
        with self._database.transaction() as connection:
            return [_key_record(row) for row in connection.execute(query)]

    # quotas

    def set_quota(
        self,
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
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
        with self._database.transaction() as connection:
            if key_id is not None and not connection.execute(sa.select(_keys.c.id).where(_keys.c.id == key_id)).all():
                raise _key_not_found(key_id)
            if values:
                connection.execute(self._database.upsert(_quotas, {"subject": subject}, values))
            row = connection.execute(sa.select(_quotas).where(_quotas.c.subject == subject)).one_or_none()
        return NO_QUOTA if row is None else Quota(row.requests_per_minute, row.tokens_per_minute)

    def list_quotas(self) -> dict[str, Quota]:
        """The quota of every tenant that has a key or a quota, by name."""
        with self._database.transaction() as connection:
            quotas = {tenant: Quota() for (tenant,) in connection.execute(sa.select(_keys.c.tenant).distinct())}
            for row in connection.execute(sa.select(_quotas).where(_quotas.c.subject.startswith("tenant:"))):
                quotas[row.subject.removeprefix("tenant:")] = Quota(row.requests_per_minute, row.tokens_per_minute)
        return dict(sorted(quotas.items()))

    # jobs

    def create_job(self, tenant: str, adapter: str, spec: dict[str, Any], job_id: str | None = None) -> JobRecord:
        """A queued job. `job_id` lets a caller that needs the id beforehand bring it."""
        record = JobRecord(
            id=job_id or f"ftjob-{uuid.uuid4().hex[:24]}",
            tenant=tenant,
            adapter=adapter,
            spec=spec,
            status=JobStatus.QUEUED,
            submission_id=None,
            created=time.time(),
            finished=None,
            result=None,
            message="",
        )
        with self._database.transaction() as connection:
            connection.execute(sa.insert(_jobs).values({**record.__dict__, "status": record.status.value}))
        return record

    def update_job(
        self,
        job_id: str,
        *,
        status: JobStatus | str | None = None,
        submission_id: str | None = None,
        result: dict[str, Any] | None = None,
        message: str | None = None,
    ) -> JobRecord:
        """Changes what is given; a final status stamps `finished`. Naming the present status again is allowed.

        Raises NotFoundError, or ConflictError when the job cannot go from its status to this one: the check and the
        change are one statement, so of two processes that race for a transition one gets the error.
        """
        given = {"submission_id": submission_id, "result": result, "message": message}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        where = _jobs.c.id == job_id
        if status is not None:
            target = _job_status(status)
            sources = [source.value for source in JobStatus if target in _NEXT[source] or source == target]
            where = sa.and_(where, _jobs.c.status.in_(sources))
            values["status"] = target.value
            if target.final:
                values["finished"] = sa.func.coalesce(_jobs.c.finished, time.time())
        with self._database.transaction() as connection:
            changed = connection.execute(sa.update(_jobs).where(where).values(values)).rowcount if values else 1
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one_or_none()
        if row is None:
            raise _job_not_found(job_id)
        if not changed:
            raise ConflictError(f"job '{job_id}' is {row.status} and cannot become {status}", param="status")
        return _job_record(row)

    def get_job(self, job_id: str, tenant: str | None = None) -> JobRecord:
        """Raises NotFoundError, the same for an unknown job and for one of another tenant than the one named."""
        with self._database.transaction() as connection:
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one_or_none()
        if row is None or (tenant is not None and row.tenant != tenant):
            raise _job_not_found(job_id)
        return _job_record(row)

    def list_jobs(
        self,
        tenant: str | None = None,
        *,
        status: JobStatus | str | None = None,
        ended_since: float | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[JobRecord]:
        """Jobs, newest first; `limit` of them after the first `offset`."""
        query = sa.select(_jobs).order_by(_jobs.c.created.desc(), _jobs.c.id.desc()).limit(limit).offset(offset)
        if tenant is not None:
            query = query.where(_jobs.c.tenant == tenant)
        if status is not None:
            query = query.where(_jobs.c.status == _job_status(status).value)
        if ended_since is not None:
            query = query.where(_jobs.c.finished >= ended_since)
        with self._database.transaction() as connection:
            return [_job_record(row) for row in connection.execute(query)]

    def count_jobs(self) -> dict[tuple[str, JobStatus], int]:
        """How many jobs each tenant has in each status; what it has none of is left out."""
        query = sa.select(_jobs.c.tenant, _jobs.c.status, sa.func.count()).group_by(_jobs.c.tenant, _jobs.c.status)
        with self._database.transaction() as connection:
            return {(tenant, JobStatus(status)): count for tenant, status, count in connection.execute(query)}


def _job_status(status: JobStatus | str) -> JobStatus:
    try:
        return JobStatus(status)
    except ValueError:
        known = ", ".join(known.value for known in JobStatus)
        raise ConfigError(f"status: expected one of {known}, got {status!r}", param="status") from None


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _keys_with_quotas() -> sa.Select[Any]:
    of_key, of_tenant = _quotas.alias(), _quotas.alias()
    joined = _keys.outerjoin(of_key, of_key.c.subject == "key:" + _keys.c.id)
    joined = joined.outerjoin(of_tenant, of_tenant.c.subject == "tenant:" + _keys.c.tenant)
    return sa.select(
        _keys,
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


def _check_limits(limits: Mapping[str, int | None]) -> None:
    for name, value in limits.items():
        if value is not None and not 0 <= value <= MAX_QUOTA:
            raise ConfigError(f"{name}: expected 0 (no limit) to {MAX_QUOTA:,}, got {value}", param=name)


def _key_not_found(key_id: str) -> NotFoundError:
    return NotFoundError(f"key '{key_id}' does not exist; list keys to see their ids", param="key")


def _job_record(row: sa.Row[Any]) -> JobRecord:
    values = {column.name: getattr(row, column.name) for column in _jobs.columns}
    return JobRecord(**{**values, "status": JobStatus(row.status)})


def _job_not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"job '{job_id}' does not exist or you do not have access to it", param="job")
