"""Authenticates a caller by its bearer key and checks the key's scope.

A key is known once it was asked for, and a revoked one fails once the gateway has heard of it (`key_cache.py`).
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

CALLER = "pedro.caller"  # in the scope of a request that this process makes: who asks; a server puts nothing there


@dataclass(frozen=True)
class Principal:
    """The caller: a key's tenant and scopes, the models that it may name, and how much both may use."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    key_quota: Quota = NO_QUOTA
    tenant_quota: Quota = NO_QUOTA
    models: frozenset[str] | None = None
    """The only ones that this caller may name, as `tenant.adapter`; None: what its view has, and the backbone."""

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
        """Raises AuthenticationError for no key, an unknown one, an expired or a revoked one."""
        key, tenant_quota = await self._keys.find(_bearer(authorization))
        self._last_used.note(key.id)
        return Principal.of(key, tenant_quota)

    def close(self) -> None:
        self._keys.close()
        self._last_used.close()


def require(*scopes: str) -> Callable[[Request], Awaitable[Principal]]:
    """A FastAPI dependency: the caller, whose key must have one of `scopes`; admin keys have every scope.

    It comes before the body is read, so that a stranger's never is, and counts the request as one of its tenant's.
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
    """As `require`; besides, a tenant's call is a request of its quota. An operator is not held up."""
    required = require(*scopes)

    async def caller(request: Request) -> Principal:
        principal = await required(request)
        if not principal.is_admin:
            await admit(request, principal)
        return principal

    return caller


def backend_for(request: Request, caller: Principal) -> Backend:
    """The backend as this caller may see it: every route that names or lists models asks here for it."""
    return backend_of(request.app, caller)


def backend_of(app: FastAPI, caller: Principal) -> Backend:
    """The same, for who is not in a request."""
    backend: Backend = app.state.backend()
    return backend if caller.models is None else AllowedBackend(backend, caller.models)


def actor_of(request: Request, caller: Principal) -> Actor:
    """Who changes something, as the audit names it."""
    return Actor.of_key(caller.tenant, caller.key_id, request_id_of(request.scope))


def _bearer(authorization: str | None) -> str:
    kind, _, secret = (authorization or "").strip().partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise AuthenticationError(
            "You did not provide an API key. Send it as 'Authorization: Bearer sk-pedro-...'.", code="missing_api_key"
        )
    return secret.strip()
