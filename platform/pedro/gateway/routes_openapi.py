"""/openapi.json: the API's description, for operators and for clients on this machine."""

from __future__ import annotations

import ipaddress
import json
from functools import lru_cache

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from pedro.gateway.auth import require
from pedro.store import ADMIN

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")  # a proxy on this machine forwards for others
router = APIRouter()
operator = require(ADMIN)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The OpenAPI document, with an admin key, or from this machine without one."""
    if "authorization" in request.headers or not _is_local(request):
        await operator(request)
    return Response(_document(request.app), media_type="application/json")


def _is_local(request: Request) -> bool:
    try:
        is_loopback = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:  # a name, not an address
        return False
    return is_loopback and not any(name in request.headers for name in FORWARDED)


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> bytes:
    from pedro.gateway.openapi import document

    return json.dumps(document(app)).encode()
