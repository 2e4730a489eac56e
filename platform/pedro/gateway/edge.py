"""What wraps every route, in two layers of pure ASGI, through which disconnects and streams pass untouched.

`Observed`, the outermost, sees the status that the client sees: it writes one line per request to the access log and
counts the request in the gateway's Prometheus metrics. A line contains the caller, model, token counts and times; never
the prompt or the answer. Metrics are labelled by route template and status class, so that cardinality does not grow
with tenants, adapters or stray URLs.

`Edge` limits the headers, adds the request id to every response and turns uncaught errors into a 500. If a request is
answered before its body was read, its connection is closed: nothing reads the rest.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from pedro import tracing
from pedro.gateway import open_metrics
from pedro.gateway.carried_bodies import CARRIED
from pedro.gateway.errors import HeadersTooLargeError, error_response, internal_error_body
from pedro.log_lines import ABOUT

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = "x-request-id"
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 * 2**10  # of a request: their number, and names and values together
PROBES = frozenset({"/health", "/ready"})
MAX_MODEL = 120  # characters of a client-supplied name
UNKNOWN_ROUTE = "unknown"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SAMPLE = re.compile(r"^(pedro_\w+)(\{?)", re.MULTILINE)  # up to its labels
LEFT_EARLY = 499  # the status of a request whose client left before an answer began
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger("pedro.gateway")
access = logging.getLogger("pedro.access")


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


def note(scope: Scope, **facts: Any) -> None:
    """Add `facts` to this request's log line."""
    scope["state"].setdefault("access", {}).update(facts)
    if "tenant" in facts and (about := ABOUT.get()) is not None:
        about["tenant"] = facts["tenant"]


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


class Observed:
    """The outermost ASGI layer, which sees the status that the client sees."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, streaming, begun = LEFT_EARLY, False, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status, streaming
            if message["type"] == "http.response.start":
                status = message["status"]
                streaming = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
                self._metrics.streaming(streaming)
            await send(message)

        self._metrics.opened()
        span = None
        if tracing.TRACER is not None and scope["path"] not in PROBES:
            span = tracing.TRACER.begin_request(scope["headers"])
            scope["state"] = {**scope.get("state", {}), "trace_id": tracing.trace_id(span)}
        try:
            await self._app(scope, receive, watched)
        finally:
            total_s = time.monotonic() - begun
            self._metrics.streaming(-streaming)
            self._metrics.answered(scope, status, total_s)
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            if route not in PROBES or status >= 400:
                noted = {**scope["state"].get("access", {}), "total": total_s}
                head = {
                    "request_id": scope["state"]["request_id"],
                    "tenant": noted.pop("tenant", None),
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                }
                if span is not None and tracing.TRACER is not None:
                    tracing.TRACER.end_request(span, head, _named(noted))
                    noted["trace_id"] = scope["state"]["trace_id"]
                access.info("%s", _line(head, noted), extra={"facts": {**head, **_named(noted)}})


class GatewayMetrics:
    """The gateway's metrics, in a separate registry: several gateways may run in one process.

    `gateway`: its name, as a label of all metrics, if there are several and a scrape reaches any one.
    """

    def __init__(self, gateway: str = "") -> None:
        disable_created_metrics()
        self._gateway = gateway
        self.registry = CollectorRegistry()
        by_route = ("method", "route", "status")
        self._requests = Counter("pedro_gateway_requests", "Requests answered.", by_route, registry=self.registry)
        self._refused = Counter(
            "pedro_gateway_too_many_requests",
            "Requests answered 429: over a quota, or over the tenant's own queue.",
            ("reason",),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "pedro_gateway_request_seconds",
            "From a request's headers to the last byte of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._open_requests = Gauge("pedro_gateway_open_requests", "Requests being answered.", registry=self.registry)
        self._open_streams = Gauge("pedro_gateway_open_streams", "Event streams being sent.", registry=self.registry)
        for reason in ("quota", "queue"):
            self._refused.labels(reason)

    def text(self) -> str:
        """Prometheus's text format."""
        return of_gateway(generate_latest(self.registry).decode(), self._gateway)

    def open_text(self) -> str:
        """The same as OpenMetrics, without its end, with traced requests as exemplars."""
        return of_gateway(open_metrics.of_registry(self.registry), self._gateway)

    def opened(self) -> None:
        """A request came."""
        self._open_requests.inc()

    def streaming(self, change: int) -> None:
        """`change` more event streams are being sent."""
        self._open_streams.inc(change)

    def answered(self, scope: Scope, status: int, total_s: float) -> None:
        """Count a request answered with `status` after `total_s`."""
        self._open_requests.dec()
        route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
        method = scope["method"] if scope["method"] in METHODS else UNKNOWN_ROUTE
        self._requests.labels(method, route, f"{status // 100}xx").inc()
        if status == 429:
            self._refused.labels("quota" if scope["state"].get("over_quota") else "queue").inc()
        trace = scope["state"].get("trace_id")
        self._seconds.labels(route).observe(total_s, {"trace_id": trace} if trace else None)


def of_gateway(text: str, gateway: str) -> str:
    """Prometheus text with the gateway's name as a label of each metric; unchanged if there is only one gateway."""
    if not gateway:
        return text
    label = f'gateway="{gateway}"'
    return SAMPLE.sub(lambda found: f"{found[1]}{{{label}{',' if found[2] else '}'}", text)


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _too_large(headers: list[tuple[bytes, bytes]]) -> bool:
    return len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES


def _line(head: dict[str, Any], noted: dict[str, Any]) -> str:
    """As text: the fixed fields in order, then the others by name."""
    fields = ["-" if value is None else str(value) for value in head.values()]
    for name, value in noted.items():
        if isinstance(value, float):
            fields.append(f"{name}={value:.3f}s")
        elif value is not None:  # quoted, so that a name cannot break the line
            fields.append(f"{name}={json.dumps(value[:MAX_MODEL]) if isinstance(value, str) else value}")
    return " ".join(fields)


def _named(noted: dict[str, Any]) -> dict[str, Any]:
    """The same for JSON: names of times end in `_s`."""
    facts: dict[str, Any] = {}
    for name, value in noted.items():
        if isinstance(value, float):
            facts[f"{name}_s"] = round(value, 6)
        else:
            facts[name] = value[:MAX_MODEL] if isinstance(value, str) else value
    return facts
