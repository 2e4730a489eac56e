"""Holds requests while Ray Serve's proxy does not know the application yet. It would answer everything with 404, which
clients do not retry. When the proxy starts, also after its own or the head's death, requests wait here instead.

Runs in the proxy. Distinguishes Serve's 404 from the application's by its text. Independent of routes.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_S, PATIENCE_S = 0.2, 60.0
SERVES = (b"Path '", b"Ping http://.../-/routes for available routes.")  # beginning and end of its 404; ours is JSON
NOT_SERVED = json.dumps(
    {
        "error": {
            "message": "Nothing is served here now; try again.",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }
).encode()


class NotYet:
    """ASGI middleware around Serve's own application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        until = time.monotonic() + PATIENCE_S
        while not await self._answered(scope, receive, send):
            if time.monotonic() > until:
                await _absent(send)
                return
            await asyncio.sleep(LOOK_S)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the application answered; if not, nothing was read or sent."""
        absent = False
        held: Message | None = None  # the start of a response that may be Serve's

        async def passed(message: Message) -> None:
            nonlocal absent, held
            if message["type"] == "http.response.start" and message["status"] == 404:
                held = message
                return
            if held is not None:
                body = message.get("body", b"")
                absent = body.startswith(SERVES[0]) and body.endswith(SERVES[1])
                if not absent:
                    await send(held)
                held = None
            if not absent:
                await send(message)

        await self._app(dict(scope), receive, passed)
        return not absent


async def _absent(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(NOT_SERVED)).encode())]
    headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": NOT_SERVED})
