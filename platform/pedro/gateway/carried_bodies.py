"""Carries a small body along with its request from Ray Serve's proxy to the gateway, which would otherwise have to ask
the proxy for it first: a message there and one back before any request can begin.

Runs in the proxy, which reads every body at once in any case, and hands it on as before, too, for applications that do
not know of this. A body that is large, or not there soon, is not carried. Independent of routes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CARRIED = "pedro.body"  # scope key, which no client can set
MOST = 64 * 2**10  # bytes
SOON_S = 0.01  # after the headers


class CarriedBodies:
    """ASGI middleware around everything in the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_small(Headers(scope=scope).get("content-length", "")):
            await self._app(scope, receive, send)
            return
        read: list[Message] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                while not read or read[-1].get("more_body", False):
                    read.append(await receive())
        if read and read[-1]["type"] == "http.request" and not read[-1].get("more_body", False):
            scope[CARRIED] = b"".join(part.get("body", b"") for part in read)

        async def read_again() -> Message:
            return read.pop(0) if read else await receive()

        await self._app(scope, read_again, send)


def _is_small(length: str) -> bool:
    return length.isascii() and length.isdigit() and len(length) < 9 and 0 < int(length) <= MOST
