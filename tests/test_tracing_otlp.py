"""Spans as an OpenTelemetry collector gets them: who belongs to whom, no text of a tenant, no harm where it fails."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
from gateway_engine import served_engine
from otlp_collector import collector

from pedro import tracing
from pedro.cluster import free_port
from pedro.errors import DataError

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "only the client knows this sentence"
SERVER = 2  # the kind of a span, as OTLP numbers it
GUARD_S = 120


@pytest.fixture
def collecting(monkeypatch):
    """A collector, which this process sends its spans to once `tracing.start` was called."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running
    tracing.stop()


@pytest.fixture
def engine(shared_replica, tmp_path):
    """A client of a gateway with an engine, whose key may ask."""
    with served_engine(shared_replica, tmp_path, f"sqlite:///{tmp_path}/pedro.db") as (address, store):
        headers = {"authorization": f"Bearer {store.create_key('acme', ('infer',))[1]}", "traceparent": CLIENT}
        with httpx.Client(base_url=address, headers=headers, timeout=GUARD_S) as client:
            yield client


def until(condition):
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_collector_gets_each_request_as_one_tree_from_the_client_to_the_engines_steps(collecting, engine):
    tracing.start("pedro-test", "r0")
    body = {"model": "acme.faq", "prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "n": 2}
    reply = engine.post("/v1/completions", json=body).raise_for_status()
    until(lambda: sum(span.name == "engine" for span in collecting.spans()) == 2)
    until(lambda: any(span.parent == CLIENT.split("-")[2] for span in collecting.spans()))
    spans = collecting.spans()
    assert {span.trace for span in spans} == {CLIENT.split("-")[1]}
    assert {(span.service, span.instance) for span in spans} == {("pedro-test", "r0")}
    (request,) = (span for span in spans if span.parent == CLIENT.split("-")[2])
    assert (request.name, request.kind, request.failed) == ("POST /v1/completions", SERVER, False)
    told = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "pedro.tenant": "acme",
        "pedro.model": "acme.faq",
        "pedro.request_id": reply.headers["x-request-id"],
    }
    assert told.items() <= request.told.items()
    engines = [span for span in spans if span.name == "engine"]
    assert {span.parent for span in engines} == {request.id}
    for whole in engines:
        parts = {span.name: span for span in spans if span.parent == whole.id}
        assert parts.keys() == {"queue", "prefill", "decode"}
        assert whole.told["pedro.model"].startswith("acme.faq:")
        assert whole.told["pedro.completion_tokens"] == sum(event["tokens"] for event in parts["decode"].events) == 5
        assert request.begun <= whole.begun <= parts["queue"].begun <= parts["prefill"].begun <= parts["decode"].begun
        assert parts["queue"].ended == parts["prefill"].begun
        assert parts["decode"].ended == whole.ended


def test_no_text_of_a_tenant_reaches_a_collector(collecting, engine):
    tracing.start("pedro-test")
    few = {"max_tokens": 24, "ignore_eos": True}
    chat = {"model": "acme.faq", "messages": [{"role": "user", "content": SECRET}], "user": SECRET, **few}
    whole = engine.post("/v1/completions", json={"model": "stories260K", "prompt": SECRET, **few}).json()
    streamed = engine.post("/v1/chat/completions", json={**chat, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    wrong = {"temperature": SECRET}, {SECRET: 1}, {"stop": [[SECRET]]}, {"messages": SECRET}, {"tools": [SECRET]}
    for change in wrong:
        assert engine.post("/v1/chat/completions", json={**chat, **change}).status_code == 400
    assert engine.post(f"/v1/{SECRET}").status_code == 404
    assert engine.get("/v1/models", params={"q": SECRET}, headers={"x-request-id": SECRET}).status_code == 200
    with pytest.raises(DataError), tracing.span("check data"):
        raise DataError(f"data.train: line 7: {SECRET}")
    tracing.stop()
    assert {"check data", "POST /v1/chat/completions", "engine"} <= {span.name for span in collecting.spans()}
    sent = b"".join(collecting.bodies)
    said = "".join(one["choices"][0]["delta"].get("content") or "" for one in events)
    for text in (SECRET, whole["choices"][0]["text"], said):
        assert len(text) > 10
        assert text.encode() not in sent


@pytest.mark.parametrize("fault", ["away", "holds", "refuses"])
def test_a_collector_that_fails_costs_no_request_anything(fault, collecting, engine, monkeypatch):
    """Nor does it keep more spans than it may: those that find no room are lost."""
    for name, value in (("MAX_QUEUE_SIZE", 8), ("MAX_EXPORT_BATCH_SIZE", 4)):
        monkeypatch.setenv(f"OTEL_BSP_{name}", str(value))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "300")
    monkeypatch.setattr(tracing, "LAST_S", 0.05)
    if fault == "away":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    elif fault == "holds":
        collecting.goes_on.clear()
    else:
        collecting.status = 503
    tracing.start("pedro-test")
    for number in range(12):
        body = {"model": "stories260K", "prompt": f"{number}", "max_tokens": 1, "stream": bool(number % 2)}
        assert engine.post("/v1/completions", json=body).status_code == 200
        if fault != "away":
            assert collecting.asked.wait(GUARD_S), "it is in the middle of it"
    assert not (fault == "holds" and collecting.bodies), "nobody waited for it"
    tracing.stop()
    assert any(thread.name == tracing.LAST for thread in threading.enumerate()), "nor does who ends wait"
    assert tracing.TRACER is None
