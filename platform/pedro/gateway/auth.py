"""Authenticates a caller by its bearer key and checks the key's scope.

Keys are looked up once, by the hash of their secret, and then kept current by the store's change feed (`KeyCache`): a
request does not query the database if the feed was read recently. A revoked key is refused once the feed is read again,
an expired one at once, since its expiry is cached with it. Every key is still looked up again after `FRESH_S`, because
processes of earlier releases write no feed. While the database is away, keys that were used before are accepted for
`AWAY_S`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request

from pedro.errors import AuthenticationError, PedroError, ScopeError, UnavailableError
from pedro.gateway.allow_list import AllowedBackend
from pedro.gateway.backend import ALL_TENANTS, Backend
from pedro.gateway.edge import note, request_id_of
from pedro.gateway.quotas import admit
from pedro.refs import ModelRef
from pedro.store import (
    ADMIN,
    KEY,
    NO_QUOTA,
    QUOTA,
    Actor,
    KeyRecord,
    Position,
    Quota,
    Store,
    hash_secret,
    unknown_key,
)

CALLER = "pedro.caller"  # scope key of in-process requests: their caller; servers never set it
AWAY_S = 600.0
PATIENCE_S = 0.25  # how long a request waits for the feed before it uses cached data
AGAIN_AFTER_S = 1.0  # delay before a failed read of the feed is retried
FRESH_S = 30.0  # how long a lookup is valid by itself
MAX_LOOKUPS, MAX_RENEWALS = 48, 16  # concurrent, of unknown keys and of cached ones
MAX_KEYS, MAX_UNKNOWN = 20_000, 20_000
WRITE_EVERY_S = 60.0
log = logging.getLogger("pedro.gateway")
Known = tuple[KeyRecord, Quota]
T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Principal:
    """The caller: a key's tenant, scopes, allowed models and quotas."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    key_quota: Quota = NO_QUOTA
    tenant_quota: Quota = NO_QUOTA
    models: frozenset[str] | None = None
    """The only models that this caller may name, as `tenant.adapter`; None: all in its view, and the backbone."""

    @classmethod
    def of(cls, key: KeyRecord, tenant_quota: Quota) -> Principal:
        """The holder of a key."""
        models = None
        if key.adapters is not None:
            models = frozenset(ModelRef(key.tenant, adapter).name for adapter in key.adapters)
        return cls(key.id, key.tenant, frozenset(key.scopes), key.quota, tenant_quota, models)

    @property
    def is_admin(self) -> bool:
        """Whether this is an operator of all tenants."""
        return ADMIN in self.scopes

    @property
    def view(self) -> str:
        """Whose models this caller may see: its tenant's, or everybody's for an admin key."""
        return ALL_TENANTS if self.is_admin else self.tenant


class Authenticator:
    def __init__(self, store: Store, follow_every_s: float) -> None:
        self._keys = KeyCache(store, follow_every_s)
        self._last_used = LastUsed(store)

    async def __call__(self, authorization: str | None) -> Principal:
        """Raises AuthenticationError if the key is missing, unknown, expired or revoked."""
        key, tenant_quota = await self._keys.find(_bearer(authorization))
        self._last_used.note(key.id)
        return Principal.of(key, tenant_quota)

    def close(self) -> None:
        self._keys.close()
        self._last_used.close()


def require(*scopes: str) -> Callable[[Request], Awaitable[Principal]]:
    """A FastAPI dependency: the caller, whose key must have one of `scopes`; admin keys have every scope.

    Runs before the body is read, so that no body is read without a valid key, and counts the request for its tenant.
    """

    async def caller(request: Request) -> Principal:
        principal: Principal | None = request.scope.get(CALLER)
        if principal is None:
            principal = await request.app.state.authenticator(request.headers.get("authorization"))
        if not principal.scopes & {*scopes, ADMIN}:
            named = " or ".join(f"'{scope}'" for scope in scopes)
            raise ScopeError(f"This API key lacks the scope {named}; use a key that was created with it.")
        note(request.scope, tenant=principal.tenant)
        request.app.state.open_requests.enter(principal.tenant, request.scope)
        return principal

    return caller


def counted(*scopes: str) -> Callable[[Request], Awaitable[Principal]]:
    """As `require`, and also counts the call against the tenant's request quota. Operators have none."""
    required = require(*scopes)

    async def caller(request: Request) -> Principal:
        principal = await required(request)
        if not principal.is_admin:
            await admit(request, principal)
        return principal

    return caller


def backend_for(request: Request, caller: Principal) -> Backend:
    """The backend restricted to this caller: used by every route that names or lists models."""
    return backend_of(request.app, caller)


def backend_of(app: FastAPI, caller: Principal) -> Backend:
    """The same, outside a request."""
    backend: Backend = app.state.backend()
    return backend if caller.models is None else AllowedBackend(backend, caller.models)


def actor_of(request: Request, caller: Principal) -> Actor:
    """The actor of a change, for the audit."""
    return Actor.of_key(caller.tenant, caller.key_id, request_id_of(request.scope))


@dataclass
class _Held:
    """A valid key as of a time (`time.monotonic`)."""

    known: Known
    at: float


class KeyCache:
    """For one event loop; the database is queried on separate threads, so that a slow one blocks nothing else."""

    def __init__(self, store: Store, follow_every_s: float) -> None:
        self._store = store
        self._follow_every_s = follow_every_s
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pedro-auth")
        # guessed keys must delay neither of these: separate threads
        self._renewal_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pedro-renew")
        self._feed_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-keys")
        self._lookups = 0
        self._keys: OrderedDict[str, _Held] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._renewing: dict[str, asyncio.Task[Known]] = {}
        self._position: Position | None = None
        self._read_at: float | None = None
        self._due_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Known:
        """The valid key with this secret, and its tenant's quota.

        Raises AuthenticationError, the same for unknown, expired and revoked keys, and UnavailableError if the database
        does not answer.
        """
        await self._follow()
        hashed = hash_secret(secret)
        held = self._keys.get(hashed)
        if held is not None and not _fresh(held.at):
            await self._renew(hashed, secret)
            held = self._keys.get(hashed)
        if held is not None:
            if held.known[0].has_expired(time.time()):
                raise unknown_key()
            self._keys.move_to_end(hashed)
            return held.known
        if hashed in self._unknown and _fresh(self._unknown[hashed]):
            raise unknown_key()
        if self._lookups >= MAX_LOOKUPS:
            raise UnavailableError("Too many keys are being checked; try again.", code="overloaded")
        self._lookups += 1
        try:
            return await self._look_up(hashed, secret, self._threads)
        finally:
            self._lookups -= 1

    def close(self) -> None:
        for threads in (self._threads, self._renewal_threads, self._feed_thread):
            threads.shutdown(wait=False)

    async def _look_up(self, hashed: str, secret: str, threads: ThreadPoolExecutor) -> Known:
        """Look up a key in the database, and cache the result if nothing changed meanwhile."""
        asked_at, now = self._position, time.monotonic()
        try:
            known = await _on(threads, lambda: self._store.authenticate(secret))
        except AuthenticationError:
            self._keys.pop(hashed, None)
            if asked_at == self._position:  # no change was read from the feed meanwhile
                _remember(self._unknown, hashed, now, MAX_UNKNOWN)
            raise
        if asked_at == self._position:
            _remember(self._keys, hashed, _Held(known, now), MAX_KEYS)
        return known

    async def _renew(self, hashed: str, secret: str) -> None:
        """Look up a cached key again. If the database is slow, away or busy, the cached data are kept and the key's
        next request tries again."""
        if hashed not in self._renewing:
            if len(self._renewing) >= MAX_RENEWALS:
                return
            looking = self._look_up(hashed, secret, self._renewal_threads)
            self._renewing[hashed] = renewal = asyncio.create_task(looking)
            renewal.add_done_callback(_retrieve)
            renewal.add_done_callback(lambda _: self._renewing.pop(hashed, None))
        await asyncio.wait({self._renewing[hashed]}, timeout=PATIENCE_S)

    async def _follow(self) -> None:
        """Read the feed if due; concurrent callers wait for the same read."""
        now = time.monotonic()
        if now < self._due_at:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(_retrieve)
        await asyncio.wait({self._reading}, timeout=None if self._read_at is None else PATIENCE_S)
        error = self._reading.exception() if self._reading.done() and not self._reading.cancelled() else None
        if self._reading.done() and error is None:
            return
        if self._read_at is None or now - self._read_at > AWAY_S:
            raise UnavailableError("The platform's database does not answer; try again.", code="database") from error
        self._due_at = now + AGAIN_AFTER_S

    async def _read(self) -> None:
        began = time.monotonic()
        here = await _on(self._feed_thread, self._store.position)
        since = self._position
        if since is None:
            self._position = here
        elif here != since:
            delta = await _on(self._feed_thread, lambda: self._store.changes(since))
            self._position = delta.position  # results of earlier lookups are no longer cached
            if delta.complete:
                await self._ask_again(
                    {subject for kind, subject in delta.changed if kind == KEY},
                    {subject for kind, subject in delta.changed if kind == QUOTA},
                )
            else:
                self._keys.clear()
                self._unknown.clear()
        self._read_at, self._due_at = began, began + self._follow_every_s

    async def _ask_again(self, keys: set[str], quotas: set[str]) -> None:
        """Look up changed keys that are cached."""
        if not keys and not quotas:  # only adapters changed: no need to search thousands of keys
            return
        if keys:
            self._unknown.clear()
        changed = [
            hashed
            for hashed, held in self._keys.items()
            if (record := held.known[0]).id in keys
            or f"key:{record.id}" in quotas
            or f"tenant:{record.tenant}" in quotas
        ]
        found: dict[str, Known] = {}
        now = time.monotonic()
        try:
            if changed:
                found = await _on(self._feed_thread, lambda: self._store.find_keys(changed))
        finally:  # on failure drop them: a revoked key must not stay valid
            for hashed in changed:
                if hashed in found:
                    self._keys[hashed] = _Held(found[hashed], now)
                else:
                    self._keys.pop(hashed, None)


class LastUsed:
    """Records when keys were last used: collected in memory and written in batches, without delaying requests.

    A gateway that dies loses at most the last minute.

    For one event loop; with several gateways the store accepts one time per minute and key.
    """

    def __init__(self, store: Store, write_every_s: float = WRITE_EVERY_S) -> None:
        self._store = store
        self._write_every_s = write_every_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-used")
        self._waiting: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def note(self, key_id: str) -> None:
        """Note that the key was used now."""
        if len(self._waiting) < MAX_KEYS or key_id in self._waiting:
            self._waiting[key_id] = time.time()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._write_every_s, self._write_soon)

    def close(self) -> None:
        """Write what is pending, and stop."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.submit(self._write, self._taken())
        self._thread.shutdown(wait=True)

    def _write_soon(self) -> None:
        self._timer = None
        self._thread.submit(self._write, self._taken())

    def _taken(self) -> dict[str, float]:
        taken, self._waiting = self._waiting, {}
        return taken

    def _write(self, at: dict[str, float]) -> None:
        if not at:
            return
        try:
            self._store.mark_used(at)
        except PedroError as error:  # the next minute's times supersede these
            log.warning("could not write when keys were last used: %s", error)


def _bearer(authorization: str | None) -> str:
    kind, _, secret = (authorization or "").strip().partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise AuthenticationError(
            "You did not provide an API key. Send it as 'Authorization: Bearer sk-pedro-...'.", code="missing_api_key"
        )
    return secret.strip()


async def _on(threads: ThreadPoolExecutor, question: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, question)


def _fresh(at: float) -> bool:
    return time.monotonic() - at <= FRESH_S


def _retrieve(reading: asyncio.Task[Any]) -> None:
    """Retrieve a result that may no longer be awaited."""
    if not reading.cancelled():
        reading.exception()


def _remember(held: OrderedDict[str, V], key: str, value: V, most: int) -> None:
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)
