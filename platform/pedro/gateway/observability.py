"""The access log, one line per request, and the gateway's Prometheus metrics.

A line contains the caller, model, token counts and times; never the prompt or the answer. Lines go to the logger
`pedro.access`; `write_to` adds a file. Metrics are labelled by route template and status class, so that cardinality
does not grow with tenants, adapters or stray URLs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from pedro import tracing
from pedro.gateway import open_metrics
from pedro.log_lines import ABOUT, JSON, TEXT, JsonLines

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBES = frozenset({"/health", "/ready"})
MAX_FILE_BYTES, KEPT_FILES = 10 * 2**20, 3
MAX_MODEL = 120  # characters of a client-supplied name
UNKNOWN_ROUTE = "unknown"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SAMPLE = re.compile(r"^(pedro_\w+)(\{?)", re.MULTILINE)  # up to its labels
LEFT_EARLY = 499  # the status of a request whose client left before an answer began

log = logging.getLogger("pedro.access")


def note(scope: Scope, **facts: Any) -> None:
    """Add `facts` to this request's log line."""
    scope["state"].setdefault("access", {}).update(facts)
    if "tenant" in facts and (about := ABOUT.get()) is not None:
        about["tenant"] = facts["tenant"]


class SharedFileHandler(RotatingFileHandler):
    """A file shared by the gateways of a host: the one that finds it full renames it, and the others reopen it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._follow()
        except OSError:  # it cannot be opened: lose the line, not the request
            self.handleError(record)
        else:
            super().emit(record)

    def doRollover(self) -> None:
        with FileLock(f"{self.baseFilename}.lock"):
            self._follow()
            if os.path.getsize(self.baseFilename) > self.maxBytes / 2:  # another gateway may have rotated it
                super().doRollover()

    def _follow(self) -> None:
        stream: TextIO | None = self.stream
        if stream is None:  # closed, e.g. by a logging reconfiguration: reopened on demand
            return
        try:
            followed = os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno()))
        except OSError:  # being renamed
            followed = False
        if not followed:
            stream.close()
            none: Any = None  # while it cannot be opened
            self.stream = none
            self.stream = self._open()


def write_to(path: Path, form: str = TEXT) -> None:
    """Log to a file rotated at `MAX_FILE_BYTES`, keeping the last few; `form` is one of `log_lines.FORMATS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = SharedFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    handler.setFormatter(JsonLines() if form == JSON else logging.Formatter("%(asctime)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def of_gateway(text: str, gateway: str) -> str:
    """Prometheus text with the gateway's name as a label of each metric; unchanged if there is only one gateway."""
    if not gateway:
        return text
    label = f'gateway="{gateway}"'
    return SAMPLE.sub(lambda found: f"{found[1]}{{{label}{',' if found[2] else '}'}", text)


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
                log.info("%s", _line(head, noted), extra={"facts": {**head, **_named(noted)}})


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
