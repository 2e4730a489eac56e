"""Counts what passes the gateway, for Prometheus. Knows nothing of engines, tenants or of what is asked.

Labels are route templates and status classes: their number does not grow with tenants, adapters or stray URLs.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UNKNOWN_ROUTE = "unknown"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class GatewayMetrics:
    """The gateway's own figures, in a registry of its own: several gateways may live in one process."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        by_route = ("method", "route", "status")
        self._requests = Counter("pedro_gateway_requests", "Requests answered.", by_route, registry=self.registry)
        self._refused = Counter(
            "pedro_gateway_too_many_requests",
            "Requests answered 429: over a quota a minute, or over the tenant's own queue.",
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
        return generate_latest(self.registry).decode()

    async def measure(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request and counts it, with whatever status it got; a client that left early is a 499."""
        status, streaming, begun = 499, False, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status, streaming
            if message["type"] == "http.response.start":
                status = message["status"]
                streaming = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
                self._open_streams.inc(streaming)
            await send(message)

        self._open_requests.inc()
        try:
            await app(scope, receive, watched)
        finally:
            self._open_requests.dec()
            self._open_streams.dec(streaming)
            route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
            method = scope["method"] if scope["method"] in METHODS else UNKNOWN_ROUTE
            self._requests.labels(method, route, f"{status // 100}xx").inc()
            if status == 429:
                self._refused.labels("quota" if scope["state"].get("over_quota") else "queue").inc()
            self._seconds.labels(route).observe(time.monotonic() - begun)


class Measured:
    """The ASGI layer around everything else, so that it sees the status that the client sees."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._metrics.measure(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)
