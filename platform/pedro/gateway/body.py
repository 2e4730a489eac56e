"""Reads a request body within bounds of size and time. Knows nothing of what is in it."""

from __future__ import annotations

import asyncio

from fastapi import Request

from pedro.gateway.errors import PayloadTooLargeError, RequestTimeoutError


async def read_body(request: Request) -> bytes:
    """Raises PayloadTooLargeError as soon as the limit is passed, RequestTimeoutError for a body that trickles."""
    settings = request.app.state.settings
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeoutError(f"The request body did not arrive within {settings.body_timeout_s:g} s.") from None
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {limit} bytes.")
