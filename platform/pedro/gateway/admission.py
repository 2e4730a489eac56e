"""Holds a request to its caller's quotas and tells the caller what is left of them. Knows nothing of request bodies."""

from __future__ import annotations

from fastapi import Request

from pedro.errors import RateLimitError
from pedro.gateway.auth import Principal
from pedro.gateway.edge import response_headers
from pedro.gateway.quotas import Quotas, Ticket


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
