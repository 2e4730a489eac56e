"""Authenticates a caller by its bearer key and checks the key's scope.

A key is known once it was asked for, and a revoked one fails once the gateway has heard of it (`key_cache.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request

from pedro.errors import AuthenticationError, ScopeError
from pedro.gateway.backend import ALL_TENANTS
from pedro.gateway.key_cache import KeyCache
from pedro.gateway.observability import note
from pedro.store import ADMIN, NO_QUOTA, Quota, Store


@dataclass(frozen=True)
class Principal:
    """The caller: a key's tenant and scopes, and what both may use in a minute."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    key_quota: Quota = NO_QUOTA
    tenant_quota: Quota = NO_QUOTA

    @property
    def view(self) -> str:
        """Whose models this caller may see: its tenant's, or everybody's for an admin key."""
        return ALL_TENANTS if ADMIN in self.scopes else self.tenant


class Authenticator:
    def __init__(self, store: Store, follow_every_s: float) -> None:
        self._keys = KeyCache(store, follow_every_s)

    async def __call__(self, authorization: str | None) -> Principal:
        """Raises AuthenticationError for no key, an unknown one or a revoked one."""
        key, tenant_quota = await self._keys.find(_bearer(authorization))
        return Principal(key.id, key.tenant, frozenset(key.scopes), key.quota, tenant_quota)

    def close(self) -> None:
        self._keys.close()


def require(scope: str) -> Callable[[Request], Awaitable[Principal]]:
    """A FastAPI dependency: the caller, whose key must have `scope`; admin keys have every scope.

    It comes before the body is read, so that a stranger's never is, and counts the request as one of its tenant's.
    """

    async def caller(request: Request) -> Principal:
        principal: Principal = await request.app.state.authenticator(request.headers.get("authorization"))
        if not principal.scopes & {scope, ADMIN}:
            raise ScopeError(f"This API key lacks the scope '{scope}'; use a key that was created with it.")
        note(request.scope, tenant=principal.tenant)
        request.app.state.open_requests.enter(principal.tenant, request.scope)
        return principal

    return caller


def _bearer(authorization: str | None) -> str:
    kind, _, secret = (authorization or "").strip().partition(" ")
    if kind.lower() != "bearer" or not secret.strip():
        raise AuthenticationError(
            "You did not provide an API key. Send it as 'Authorization: Bearer sk-pedro-...'.", code="missing_api_key"
        )
    return secret.strip()
