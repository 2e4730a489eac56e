"""/health and /ready, for probes: no key, and no details beyond yes or no."""

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
    """Whether requests can be answered now; `degraded` while the database is away: names that were not used before are
    unknown, and each gateway applies its share of the limits."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            backend = request.app.state.backend()
            is_ready, is_degraded = await backend.ready(), await backend.degraded()
            is_degraded = is_degraded or request.app.state.quotas.degraded
    except Exception as error:  # noqa: BLE001 (any error: not ready)
        log.warning("not ready: %r", error)
        return JSONResponse({"status": "not ready"}, status_code=503)
    if not is_ready:
        return JSONResponse({"status": "not ready"}, status_code=503)
    return JSONResponse({"status": "degraded" if is_degraded else "ready"})
