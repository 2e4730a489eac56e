"""Limits on connections, for the HTTP server in front of the gateway: how many one client address may have, and how
long a request may take to arrive.

That server is uvicorn, in Ray Serve's proxy process. Serve has no settings for these limits, but calls the function
named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH when the proxy starts: `bound_connections`. It replaces uvicorn's
protocol class, which uvicorn looks up by name, by `BoundedProtocol`. Independent of keys and models.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pedro.errors import ConfigError
from pedro.gateway.passed_connections import MOST_HELD, counted_as, plain, read_line, shared_key

if TYPE_CHECKING:
    from asyncio import TimerHandle

PREFIX = "PEDRO_HTTP_"
UNTOLD = ""
"""Whom a connection is counted for that a kept port may have made, until its first line says."""


@dataclass(frozen=True)
class ConnectionLimits:
    """0 disables a limit. Each is set by an environment variable of the proxy: `PEDRO_HTTP_CONNECTIONS_PER_CLIENT`,
    …"""

    connections_per_client: int = 1024  # of an address, or a /64 of IPv6; behind a reverse proxy all come from its own
    headers_timeout_s: int = 10  # from the connection, or the first byte of a further request, to the last header
    body_timeout_s: int = 30  # between two chunks of a body

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> ConnectionLimits:
        """Raises ConfigError if a value is not a whole number."""
        limits = {}
        for field in fields(cls):
            name = PREFIX + field.name.upper()
            given = env.get(name, str(field.default))
            if not given.isascii() or not given.isdigit() or len(given) > 9:
                raise ConfigError(f"{name}: expected a whole number, 0 for no limit, got {given[:40]!r}", param=name)
            limits[field.name] = int(given)
        return cls(**limits)


def bound_connections() -> list[Any]:
    """Called by Serve when its proxy starts; returns middlewares, as Serve requires."""
    import uvicorn.config
    from starlette.middleware import Middleware

    from pedro.gateway.carried_bodies import CarriedBodies
    from pedro.gateway.not_yet import NotYet

    BoundedProtocol.limits, BoundedProtocol.key = ConnectionLimits.from_env(), shared_key()
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return [Middleware(NotYet), Middleware(CarriedBodies)]  # the last is the outermost


class BoundedProtocol(HttpToolsProtocol):
    """One connection of uvicorn's. All on one event loop."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    held: ClassVar[Counter[str]] = Counter()  # connections by client
    key: ClassVar[bytes | None] = None  # of a kept port, where there may be one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted: str | None = None  # for whom
        self._said = b""  # while it is not known who speaks
        self._timer: TimerHandle | None = None
        self._awaits_headers = False
        self._silent = True  # nothing received yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        own = self.key is not None and self.client is not None and self.client[0] == (self.server or ("",))[0]
        if self.client is not None:
            self.client = (plain(self.client[0]), self.client[1])
        # A kept port connects from the very address that it was asked at, as others on this host may.
        if self._count(UNTOLD if own else self._who()):
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._counted == UNTOLD and self.key is not None:
            self._said += data
            if (told := read_line(self._said, self.key)) is None:
                return
            address, data = told
            self._said = b""
            if address and self.client is not None:
                self.client = (plain(address), self.client[1])
            if not self._count(self._who()) or not data:  # nothing is said yet but who speaks
                return
        before, self._silent = self.cycle, False
        super().data_received(data)
        cycle = self.cycle
        if self.transport.is_closing():
            self._stop_waiting()
        elif cycle is None or (cycle is before and cycle.response_complete):
            self._await_headers()
        elif cycle.more_body:
            self._wait(self.limits.body_timeout_s)
        else:
            self._stop_waiting()

    def _who(self) -> str:
        return counted_as(self.client[0]) if self.client else "nobody"

    def _count(self, client: str) -> bool:
        """Whether it may stay, as one of this client's alone."""
        self._forget()
        most = self.limits.connections_per_client
        most = MOST_HELD if client == UNTOLD and most else most
        if most and self.held[client] >= most:
            told = f"This address holds {most} connections, which is the most; close some of them."
            self._end(503, told, "overloaded")
            return False
        self._counted = client
        self.held[client] += 1
        return True

    def _forget(self) -> None:
        if self._counted is not None:
            self.held[self._counted] -= 1
            if not self.held[self._counted]:
                del self.held[self._counted]
            self._counted = None

    def _should_upgrade_to_ws(self) -> bool:
        return False  # a web socket would not be counted, and no route uses them

    def _await_headers(self) -> None:
        """Start the timeout at the first byte; later ones do not extend it."""
        if not self._awaits_headers:
            self._wait(self.limits.headers_timeout_s)
            self._awaits_headers = True

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        if seconds:
            self._timer = self.loop.call_later(seconds, self._too_late)

    def _stop_waiting(self) -> None:
        self._awaits_headers = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if not self._awaits_headers and self.flow.read_paused:  # the missing part may be waiting unread
            self._wait(self.limits.body_timeout_s)
        elif self._silent or (self.cycle is not None and self.cycle.response_started):
            self.transport.close()
        else:
            self._end(408, "The request did not arrive in time.", "request_timeout")

    def _end(self, status: int, message: str, code: str) -> None:
        """Answer in OpenAI's form, and close."""
        self._stop_waiting()
        error = {"message": message, "type": "timeout_error" if status == 408 else "server_error", "param": None}
        body = json.dumps({"error": {**error, "code": code}}).encode()
        reason = {408: "Request Timeout", 503: "Service Unavailable"}[status]
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
