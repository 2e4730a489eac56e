"""/metrics: the gateway's and the engines' figures in Prometheus's text format.

They show every tenant, so they need an admin key, from this machine too: a proxy on it looks like any other caller.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from pedro.gateway.auth import Principal, require
from pedro.store import ADMIN

BACKEND_TIMEOUT_S = 5.0

log = logging.getLogger("pedro.gateway")
router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, _: Annotated[Principal, Depends(require(ADMIN))]) -> PlainTextResponse:
    text = request.app.state.metrics.text()
    try:
        async with asyncio.timeout(BACKEND_TIMEOUT_S):
            text += await request.app.state.backend().metrics()
    except Exception as error:  # noqa: BLE001 (the gateway's own figures matter most when the engine is away)
        log.warning("the engine's metrics are missing: %r", error)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)
