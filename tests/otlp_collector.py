"""A small OpenTelemetry collector on loopback (OTLP over HTTP): what it was sent, and the ways in which it can fail."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class ReceivedSpan:
    """One span, and the process that it came from."""

    service: str
    instance: str
    name: str
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    begun: int
    ended: int
    told: dict[str, Any]
    events: list[dict[str, Any]]


@dataclass
class Collector:
    """`goes_on` cleared: it answers nobody until that is set. `status` is what it answers with."""

    url: str = ""
    status: int = 200
    goes_on: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    bodies: list[bytes] = field(default_factory=list)

    def spans(self) -> list[ReceivedSpan]:
        """All that it was sent, in order."""
        found = []
        for body in list(self.bodies):
            for process in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = _told(process.resource.attributes)
                found += [_span(named, span) for scope in process.scope_spans for span in scope.spans]
        return found

    def take(self, body: bytes) -> None:
        self.asked.set()
        self.goes_on.wait(300)
        self.bodies.append(body)


@contextmanager
def collector() -> Iterator[Collector]:
    """One that answers at once."""
    collecting = Collector()
    collecting.goes_on.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            collecting.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(collecting.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collecting.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield collecting
        finally:
            collecting.goes_on.set()
            server.shutdown()


def _span(process: dict[str, Any], span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        process["service.name"],
        process["service.instance.id"],
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.status.code == 2,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _told(span.attributes),
        [_told(event.attributes) for event in span.events],
    )


def _told(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
