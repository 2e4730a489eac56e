"""Spans of requests and jobs for an OpenTelemetry collector; off unless `OTEL_EXPORTER_OTLP_ENDPOINT` names one.

`TRACER` is None while it is off: whoever would make a span looks at that first, so nothing here is entered then. Spans
hold who asked for which model, how much and how long it took; never what was asked or answered. OpenTelemetry's own
variables (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/) say the rest.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pedro.log_lines import trace_of_job

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
"""The span that what is done now belongs to, as https://www.w3.org/TR/trace-context/ writes it."""
MAX_STEPS = 128  # of an answer: as many events as OpenTelemetry keeps of a span
MAX_TEXT = 200
LAST, LAST_S = "last spans", 3.0  # so long who ends waits for a collector
TRACER: Tracer | None = None
log = logging.getLogger("pedro")


def start(service: str, instance: str = "", exporter: SpanExporter | None = None) -> None:
    """Have this process send spans as `service`, if the environment names a collector or an `exporter` is given."""
    global TRACER
    if exporter is None:
        if not any(os.environ.get(name) for name in ENDPOINTS):
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            log.warning("%s is set, but nothing sends spans; pip install 'pedro-platform[otel]'", ENDPOINTS[0])
            return
        exporter = OTLPSpanExporter()
    TRACER = Tracer(service, instance, exporter)
    atexit.register(stop)


def stop() -> None:
    """Send what is left, as far as the collector takes it soon, and make no more."""
    global TRACER
    tracer, TRACER = TRACER, None
    if tracer is not None:
        tracer.close()


@contextmanager
def span(name: str, parent: str = "", **facts: Any) -> Iterator[None]:
    """What is done in the `with` as a span, and whatever it makes as its parts; nothing while tracing is off."""
    if TRACER is None:
        yield
        return
    begun = TRACER.begin(name, parent or TRACEPARENT.get(), facts)
    token = TRACEPARENT.set(_written(begun))
    try:
        yield
    except BaseException as error:
        _fail(begun, type(error).__name__)
        raise
    finally:
        TRACEPARENT.reset(token)
        begun.end()


def of_job(job_id: str) -> str:
    """The whole of a job, as the parent of its parts: whoever knows the job's id knows its trace."""
    return f"00-{trace_of_job(job_id)}-{_span_of_job(job_id)}-01"


class Tracer:
    """Makes the spans of one process."""

    def __init__(self, service: str, instance: str, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Ids(RandomIdGenerator):
            """Those of a job are not by chance."""

            given: tuple[int, int] | None = None

            def generate_trace_id(self) -> int:
                return super().generate_trace_id() if self.given is None else self.given[0]

            def generate_span_id(self) -> int:
                return super().generate_span_id() if self.given is None else self.given[1]

        named = {"service.name": service, "service.instance.id": instance or str(os.getpid())}
        self._ids = Ids()
        resource = Resource.create(named)
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pedro")
        self._over = threading.Event()
        self._sending = threading.Thread(target=self._send_last, name=LAST, daemon=True)  # none can begin at exit
        self._sending.start()

    def close(self) -> None:
        """Send what is left. The exporter tries for half a minute where nobody answers, which nobody waits for."""
        self._over.set()
        self._sending.join(LAST_S)

    def _send_last(self) -> None:
        self._over.wait()
        self._provider.shutdown()

    def begin(self, name: str, parent: str, facts: Mapping[str, Any], begun_ns: int | None = None) -> Span:
        """A span that whoever began it ends."""
        return self._tracer.start_span(name, _context(parent), attributes=_told(facts), start_time=begun_ns)

    def begin_request(self, headers: Sequence[tuple[bytes, bytes]]) -> Span:
        """The span of a request, part of the client's where that says so; what is done from now on is a part of it."""
        from opentelemetry.trace import SpanKind

        given = next((value.decode("latin-1") for name, value in headers if name.lower() == b"traceparent"), "")
        begun = self._tracer.start_span("request", _context(given), kind=SpanKind.SERVER)
        TRACEPARENT.set(_written(begun))
        return begun

    def end_request(self, begun: Span, head: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """It was answered; `head` and `facts` are those of its line in the log."""
        begun.update_name(f"{head['method']} {head['route']}")
        begun.set_attributes(
            {
                "http.request.method": head["method"],
                "http.route": head["route"],
                "http.response.status_code": head["status"],
                **_told({"request_id": head["request_id"], "tenant": head["tenant"], **facts}),
            }
        )
        if head["status"] >= 500:
            _fail(begun, str(head["status"]))
        if "job" in facts:
            begun.add_link(_span_context(of_job(facts["job"])))
        begun.end()

    def answered(self, parent: str, timing: Any, steps: Iterable[tuple[int, int]], facts: Mapping[str, Any]) -> None:
        """One answer of an engine ended now: its `queue`, `prefill` and `decode`, with an event a step that made tokens
        of it (nanoseconds of Unix time, tokens)."""
        end = time.time_ns()
        came = end - _ns(timing.total_s)
        began, first = came + _ns(timing.queue_s), came + _ns(timing.first_token_s)
        whole = self.begin("engine", parent, facts, came)
        for name, since, until in (("queue", came, began), ("prefill", began, first), ("decode", first, end)):
            if until > since:
                part = self.begin(name, _written(whole), {}, since)
                for at, tokens in steps if name == "decode" else ():
                    part.add_event("step", {"tokens": tokens}, at)
                part.end(until)
        if facts.get("finish_reason") == "error":
            _fail(whole, "error")
        whole.end(end)

    def end_job(self, job_id: str, created: float, facts: Mapping[str, Any], failed: bool) -> None:
        """The whole of a job, from when it was asked for until now."""
        self._ids.given = (int(trace_of_job(job_id), 16), int(_span_of_job(job_id), 16))
        try:
            whole = self.begin("job", "", {"job": job_id, **facts}, int(created * 1e9))
        finally:
            self._ids.given = None
        if failed:
            _fail(whole, "failed")
        whole.end()


def trace_id(begun: Span) -> str:
    """As it stands in log lines."""
    return f"{begun.get_span_context().trace_id:032x}"


def _span_of_job(job_id: str) -> str:
    return hashlib.sha256(job_id.encode()).hexdigest()[32:48]


def _written(begun: Span) -> str:
    at = begun.get_span_context()
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"


def _context(parent: str) -> Context | None:
    if not parent:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())


def _span_context(written: str) -> Any:
    from opentelemetry.trace import get_current_span

    return get_current_span(_context(written)).get_span_context()


def _told(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As attributes: what is known, with the platform's name in front; texts that a client chose are cut."""
    return {
        f"pedro.{name}": value[:MAX_TEXT] if isinstance(value, str) else value
        for name, value in facts.items()
        if isinstance(value, (str, bool, int, float))
    }


def _fail(begun: Span, why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    begun.set_status(Status(StatusCode.ERROR, why))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
