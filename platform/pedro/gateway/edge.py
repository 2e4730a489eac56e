"""Wraps every route: limits the headers, adds the request id to every response and turns uncaught errors into a 500.

If a request is answered before its body was read, its connection is closed: nothing reads the rest.

Pure ASGI, so that disconnects and streams pass through untouched.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from pedro.gateway.carried_bodies import CARRIED
from pedro.gateway.errors import HeadersTooLargeError, error_response, internal_error_body
from pedro.log_lines import ABOUT

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 * 2**10  # of a request: their number, and names and values together
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("pedro.gateway")


def choose_request_id(offered: str | None) -> str:
    """The client's id if it is safe in a header and a log line, else a new one."""
    if offered is not None and _SANE_ID.fullmatch(offered):
        return offered
    return f"req_{uuid.uuid4().hex}"


def request_id_of(scope: Scope) -> str:
    request_id: str = scope["state"]["request_id"]
    return request_id


def response_headers(scope: Scope) -> dict[str, str]:
    """Headers that any response to this request will have."""
    headers: dict[str, str] = scope["state"]["response_headers"]
    return headers


def at_end(scope: Scope, leave: Callable[[], None]) -> None:
    """Call `leave` once this request has ended in any way."""
    scope["state"]["at_end"].append(leave)


class Edge:
    """`send_request_id`: add the id to the response; off if a server in front does so."""

    def __init__(self, app: ASGIApp, *, send_request_id: bool = True) -> None:
        self._app = app
        self._send_request_id = send_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        extra: dict[str, str] = {}
        leaving: list[Callable[[], None]] = []
        scope["state"] = {
            **scope.get("state", {}),
            "request_id": request_id,
            "response_headers": extra,
            "at_end": leaving,
        }
        ABOUT.set({"request_id": request_id, "trace_id": scope["state"].get("trace_id")})
        started, unread = False, _has_body(Headers(scope=scope))
        carried: bytes | None = scope.pop(CARRIED, None)

        async def receive_body() -> Message:
            nonlocal unread
            if carried is not None and unread:
                unread = False
                return {"type": "http.request", "body": carried, "more_body": False}
            message = await receive()
            while carried is not None and message["type"] == "http.request":
                message = await receive()  # the same body once more
            if message["type"] == "http.request" and not message.get("more_body", False):
                unread = False
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(extra)
                if self._send_request_id:
                    headers[REQUEST_ID_HEADER] = request_id
                if unread:
                    headers["connection"] = "close"
            await send(message)

        if _too_large(scope["headers"]):
            error = HeadersTooLargeError(
                f"The request has more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them."
            )
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive_body, send_with_id)
        except ClientDisconnect:
            log.info("request %s: the client disconnected", request_id)
        except Exception:  # the HTTP edge: no internal error may pass it
            log.exception("request %s failed", request_id)
            if started:
                raise  # the server closes the connection: a truncated body must not look complete
            await JSONResponse(internal_error_body(request_id), status_code=500)(scope, receive, send_with_id)
        finally:
            for leave in leaving:
                leave()


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _too_large(headers: list[tuple[bytes, bytes]]) -> bool:
    return len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES
