"""/metrics: the gateway's and the engines' figures in Prometheus's text format. Knows nothing of what is measured.

They show every tenant: a caller on this machine needs no key, any other an admin key.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from pedro.gateway.auth import require
from pedro.store import ADMIN

BACKEND_TIMEOUT_S = 5.0
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")  # set by proxies: the caller is not who connects

log = logging.getLogger("pedro.gateway")
router = APIRouter()
_require_admin = require(ADMIN)


@router.get("/metrics")
async def metrics(request: Request) -> PlainTextResponse:
    if "authorization" in request.headers or not _from_this_machine(request):
        await _require_admin(request)
    text = request.app.state.metrics.text()
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            text += await request.app.state.backend().metrics()
    except Exception as error:  # noqa: BLE001 (the gateway's own figures matter most when the engine is away)
        log.warning("the engine's metrics are missing: %r", error)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


def _from_this_machine(request: Request) -> bool:
    """Whether the connection and the name it asks for are loopback, with no proxy in between."""
    if request.client is None or any(name in request.headers for name in FORWARDED):
        return False
    return _loopback(request.client.host) and _loopback(request.url.hostname or "")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
