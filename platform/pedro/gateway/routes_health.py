"""/health and /ready, for probes: no key, and nothing said beyond yes or no."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

READY_TIMEOUT_S = 5.0

log = logging.getLogger("pedro.gateway")
router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """A request would be answered now."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            is_ready = await request.app.state.backend().ready()
    except Exception as error:  # noqa: BLE001 (whatever it is, the answer to the probe is no)
        log.warning("not ready: %r", error)
        is_ready = False
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, status_code=200 if is_ready else 503)
