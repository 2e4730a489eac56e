"""Spans of a request and of a job: what they tell, and that nothing is made of them unless a collector is named."""

from __future__ import annotations

import json
import logging
import sys

import httpx
import pytest
from gateway_engine import served_engine
from gateway_server import serve
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families

from pedro import tracing
from pedro.config import Settings
from pedro.gateway import access_log
from pedro.gateway.app import GatewaySettings
from pedro.log_lines import trace_of_job
from pedro.store import Store
from pedro.training import job

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "only the client knows this sentence"


@pytest.fixture
def sent():
    """The spans that this process sent, by name, once it has stopped."""
    exporter = InMemorySpanExporter()
    tracing.start("test", "t0", exporter)

    def stopped():
        tracing.stop()
        return {span.name: span for span in exporter.get_finished_spans()}

    yield stopped
    tracing.stop()


def test_a_request_is_traced_from_the_client_to_the_steps_of_the_engine(sent, shared_replica, tmp_path, monkeypatch):
    for name in ("handlers", "propagate"):  # put back afterwards
        monkeypatch.setattr(access_log.access, name, getattr(access_log.access, name))
    monkeypatch.setattr(access_log.access, "handlers", [])
    access_log.write_to(tmp_path / "requests.log", "json")
    with served_engine(shared_replica, tmp_path, f"sqlite:///{tmp_path}/pedro.db") as (address, store):
        headers = {"authorization": f"Bearer {store.create_key('acme', ('infer',))[1]}", "traceparent": CLIENT}
        body = {"model": "acme.faq", "prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            assert client.get("/health").status_code == 200
            request_id = client.post("/v1/completions", json=body).raise_for_status().headers["x-request-id"]
    spans = sent()
    assert spans.keys() == {"POST /v1/completions", "engine", "queue", "prefill", "decode"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {CLIENT.split("-")[1]}
    request, engine = spans["POST /v1/completions"], spans["engine"]
    assert f"{request.parent.span_id:016x}" == CLIENT.split("-")[2]
    assert engine.parent.span_id == request.context.span_id
    assert all(spans[part].parent.span_id == engine.context.span_id for part in ("queue", "prefill", "decode"))
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert sum(event.attributes["tokens"] for event in spans["decode"].events) == 5
    told = request.attributes
    assert (told["pedro.tenant"], told["pedro.model"], told["http.response.status_code"]) == ("acme", "acme.faq", 200)
    assert told["pedro.request_id"] == request_id
    assert engine.attributes["pedro.model"].startswith("acme.faq:")
    assert SECRET not in "".join(span.to_json() for span in spans.values())
    (line,) = [json.loads(line) for line in (tmp_path / "requests.log").read_text().splitlines()]
    assert line["trace_id"] == CLIENT.split("-")[1]


@pytest.mark.parametrize("traced", [True, False])
def test_the_latency_histogram_has_traced_requests_as_examples_and_none_while_tracing_is_off(traced, tmp_path, request):
    if traced:
        request.getfixturevalue("sent")
    with serve(tmp_path, settings=GatewaySettings(name="g1")) as gateway:
        with gateway.http(gateway.key()) as client:
            body = {"model": "words-1", "prompt": "how are you", "max_tokens": 1}
            client.post("/v1/completions", json=body, headers={"traceparent": CLIENT}).raise_for_status()
        with gateway.http(gateway.key("ops", ("admin",))) as operator:
            plain = operator.get("/metrics")
            reply = operator.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.5"})
    assert plain.headers["content-type"].startswith("text/plain")
    assert "trace_id" not in plain.text
    if not traced:
        assert reply.headers["content-type"].startswith("text/plain")
        return
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in open_metrics_families(reply.text)}
    assert families["pedro_gateway_requests"].type == "counter"
    assert families["pedro_engine_running"].type == "gauge", "the engine's figures are there, too"
    known = [one for one in families["pedro_gateway_request_seconds"].samples if one.exemplar is not None]
    (ours,) = (one for one in known if one.labels["route"] == "/v1/completions")
    assert ours.exemplar.labels == {"trace_id": CLIENT.split("-")[1]}


def test_a_job_is_a_trace_that_its_id_names_whatever_process_it_is_in(sent, tmp_path, monkeypatch):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    for name, value in settings.env().items():
        monkeypatch.setenv(name, value)
    store = Store(settings.database_url)
    made = store.create_job("acme", "colours", {})
    monkeypatch.setattr(tracing, "start", lambda *_: None)  # the one of this test is there

    def broken(*_):
        with tracing.span("check data"):
            raise ValueError("broken on purpose")

    monkeypatch.setattr(job, "read_spec", broken)
    assert job.main(["--spec", "spec.json", "--job-id", made.id]) == 1
    assert store.get_job(made.id).status == "failed"
    store.close()
    spans = sent()
    assert spans.keys() == {"job", "driver", "check data"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace_of_job(made.id)}
    assert spans["job"].parent is None
    assert spans["driver"].parent.span_id == spans["job"].context.span_id
    assert spans["check data"].parent.span_id == spans["driver"].context.span_id
    assert spans["job"].start_time <= spans["driver"].start_time
    assert not spans["job"].status.is_ok
    assert not spans["check data"].status.is_ok


def test_tracing_is_off_unless_it_is_asked_for_and_can_be_had(monkeypatch, caplog):
    for name in tracing.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    tracing.start("test")
    assert tracing.TRACER is None
    with tracing.span("nothing"):
        assert tracing.TRACEPARENT.get() == ""
    monkeypatch.setenv(tracing.ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("pedro").addHandler(caplog.handler)
        tracing.start("test")
        logging.getLogger("pedro").removeHandler(caplog.handler)
    assert tracing.TRACER is None
    assert "pip install 'pedro-platform[otel]'" in caplog.text
