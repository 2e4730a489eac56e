"""Holds a request to its caller's quotas and its tenant's share of the open ones. Knows nothing of request bodies."""

from __future__ import annotations

from collections import Counter

from fastapi import Request
from starlette.types import Scope

from pedro.errors import RateLimitError
from pedro.gateway.auth import Principal
from pedro.gateway.edge import at_end, response_headers
from pedro.gateway.quotas import Quotas, Ticket


class Places:
    """The requests that are open at once. A tenant may hold as many as are free, so there are always free ones.

    One busy tenant gets half of all, two a third each: however many there are, a newcomer finds its share.
    For one event loop: not thread-safe.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()

    def enter(self, tenant: str, scope: Scope) -> None:
        """Take a place until the request of `scope` is answered. Raises RateLimitError."""
        held = self._held[tenant]
        if held and held >= self._total - self._held.total():
            raise RateLimitError(
                f"{held} of your requests are open, which is your share of what this server keeps open; "
                "wait for some to end."
            )
        self._held[tenant] += 1
        at_end(scope, lambda: self._leave(tenant))

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]


def admit(request: Request, caller: Principal, tokens: int = 0) -> Ticket:
    """Takes one request and `tokens` from the quotas; the response has the x-ratelimit-* headers either way.

    Raises RateLimitError. The ticket must be settled once the tokens used are known.
    """
    quotas: Quotas = request.app.state.quotas
    try:
        return quotas.admit(caller, tokens)
    except RateLimitError:
        request.state.over_quota = True  # for the metrics
        raise
    finally:
        response_headers(request.scope).update(quotas.headers(caller))
