"""Requests of this process to its own gateway: through every layer of a client's request, except the network.

So they are admitted, counted, logged and refused like any other.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from pedro.gateway.auth import CALLER
from pedro.gateway.edge import REQUEST_ID_HEADER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

    from pedro.gateway.auth import Principal


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    headers: Headers
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


async def post(app: ASGIApp, path: str, content: bytes, caller: Principal, request_id: str) -> Reply:
    """Post JSON as `caller`. Cancelling the task ends the request, like a client's disconnect."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (REQUEST_ID_HEADER.encode(), request_id.encode()),
        ],
        "client": None,
        "server": None,
        CALLER: caller,
    }
    sent = False
    begun: list[Message] = []
    body = bytearray()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # never disconnects
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            begun.append(message)
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return Reply(begun[0]["status"], Headers(raw=begun[0]["headers"]), bytes(body))
