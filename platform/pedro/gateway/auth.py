"""Authenticates a caller by its bearer key and checks the key's scope.

Keys are cached after their first lookup; a revoked key fails once the gateway has read the change feed
(`key_cache.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request

from pedro.errors import AuthenticationError, ScopeError
from pedro.gateway.allow_list import AllowedBackend
from pedro.gateway.backend import ALL_TENANTS, Backend
from pedro.gateway.edge import request_id_of
from pedro.gateway.key_cache import KeyCache, LastUsed
from pedro.gateway.observability import note
from pedro.gateway.quotas import admit
from pedro.refs import ModelRef
from pedro.store import ADMIN, NO_QUOTA, Actor, KeyRecord, Quota, Store

CALLER = "pedro.caller"  # scope key of in-process requests: their caller; servers never set it


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


def _bearer(authorization: str | None) -> str:
    kind, _, secret = (authorization or "").strip().partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise AuthenticationError(
            "You did not provide an API key. Send it as 'Authorization: Bearer sk-pedro-...'.", code="missing_api_key"
        )
    return secret.strip()
