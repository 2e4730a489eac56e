"""The Serving page over a Prometheus: a small server that answers its range queries from real readings."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from dashboard_app import opener, words
from prometheus_client.parser import text_string_to_metric_families
from traffic_scrapes import end, replica

from pedro.config import Settings
from pedro.errors import ConfigError
from pedro.gateway.edge import GatewayMetrics
from pedro.serving.metrics import merged
from sources import prometheus, serving
from sources.gateway import Access, GatewayClient, GatewayStatus
from sources.prometheus import PrometheusHistory

NOBODY = GatewayClient("http://127.0.0.1:9")


class Prometheus:
    """Keeps what it is told was scraped, and answers `/api/v1/query_range` for the two queries of the page."""

    def __init__(self):
        self.scrapes, self.asked, self.broken = {}, [], None
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, document = told.answer(urlsplit(self.path))
                body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def scrape(self, at, *texts, instance="gateway:8000"):
        samples = self.scrapes.setdefault(at, {})
        for text in texts:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = {"__name__": sample.name, "instance": instance, "job": "pedro", **sample.labels}
                    samples[tuple(sorted(labels.items()))] = sample.value

    def answer(self, url):
        if self.broken:
            return self.broken
        assert url.path == "/api/v1/query_range"
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.asked.append(asked)
        start, stop, step = (float(asked[name]) for name in ("start", "end", "step"))
        times = [start + step * index for index in range(int((stop - start) / step) + 1)]
        if asked["query"] == "max(timestamp(pedro_gateway_open_streams))":
            seen = [[at, max((one for one in self.scrapes if at - 300 < one <= at), default=None)] for at in times]
            result = [{"metric": {}, "values": [[at, str(last)] for at, last in seen if last is not None]}]
        else:
            names = re.compile(re.search(r'__name__=~"(.*)"', asked["query"])[1])
            series = {}
            for at in times:
                last = max((one for one in self.scrapes if at - 300 < one <= at), default=None)
                for labels, value in self.scrapes.get(last, {}).items():
                    if names.fullmatch(dict(labels)["__name__"]):
                        series.setdefault(labels, []).append([at, f"{value:g}"])
            result = [{"metric": dict(labels), "values": values} for labels, values in series.items()]
        return 200, {"status": "success", "data": {"resultType": "matrix", "result": result}}


@pytest.fixture
def kept(monkeypatch):
    """A Prometheus with ten minutes of two replicas, scraped through two gateways, and a hole of three minutes."""
    now = time.time() // 15 * 15
    one, two, own = Prometheus(), (replica("r1"), replica("r2")), GatewayMetrics()
    for index in range(40):
        at = now - 600 + 15 * (index + 1)
        for each in two:
            end(each, tokens=5)
        end(two[0], "globex.faq", reason="error", tokens=0)
        if not now - 400 < at < now - 220:
            for instance in ("a:8000", "b:8000"):
                one.scrape(at, merged(each.text() for each in two), own.text(), instance=instance)
    yield one, now
    one.server.shutdown()
    one.server.server_close()


def test_counters_gauges_and_latencies_are_those_of_the_gateways_own_history(kept):
    server, now = kept
    history = PrometheusHistory(url=server.url, seconds=900.0)
    assert history.refresh(NOBODY, 900.0) == ""
    seen = history.window(now + 1, 900.0)
    assert {asked["step"] for asked in server.asked} == {"15.0"}
    busy = next(row for row in serving.adapter_table(seen) if row["adapter"] == "acme.faq")
    quiet = next(row for row in serving.adapter_table(seen) if row["adapter"] == "globex.faq")
    assert busy["requests"] == 2 * sum(each.seconds for each in seen) / 15 > 40, "each answer once"
    assert quiet["failed"] == quiet["requests"] > 0
    assert 100 < busy["first_p50"] <= 250
    assert history.gauges["running"] == 6, "two replicas, though two gateways tell of both"
    assert 0 < history.gauges["resident"] == 8


def test_a_time_without_a_scrape_was_not_observed(kept):
    server, now = kept
    history = PrometheusHistory(url=server.url, seconds=900.0)
    history.refresh(NOBODY, 900.0)
    before, hole = serving.gaps(history.window(now + 1, 900.0), now - 900, now)
    assert before == (now - 900, now - 585)
    assert hole == (now - 405, now - 210), "though Prometheus repeats the last value for five minutes"


def test_a_day_is_asked_for_in_steps_that_a_chart_can_show(kept):
    server, now = kept
    history = PrometheusHistory(url=server.url, seconds=86400.0)
    history.refresh(NOBODY, 86400.0)
    asked = server.asked[-1]
    assert (float(asked["end"]) - float(asked["start"])) / float(asked["step"]) == 90
    assert now - float(asked["end"]) <= 15
    assert history.due(now)
    assert not history.due(now + 10)
    assert not PrometheusHistory(url=server.url).window(now, 900.0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ((503, "<html>"), "gave no answer of its API (status 503)"),
        ((200, {"status": "success", "data": {"resultType": "vector", "result": []}}), "gave no answer of its API"),
        ((422, {"status": "error", "errorType": "execution", "error": "query timed out"}), "query timed out"),
        ((200, {"status": "success", "data": {"resultType": "matrix", "result": [{"values": [1]}]}}), "gave no series"),
    ],
)
def test_an_answer_that_is_none_is_said(kept, broken, said):
    server, _ = kept
    server.broken = broken
    assert said in PrometheusHistory(url=server.url).refresh(NOBODY, 900.0)


def test_one_that_does_not_answer_is_said_without_its_password():
    said = PrometheusHistory(url="http://ada:secret@127.0.0.1:9").refresh(NOBODY, 900.0)
    assert "127.0.0.1:9 does not answer" in said
    assert "secret" not in said


def test_the_address_is_a_setting(tmp_path):
    env = {"PEDRO_HOME": str(tmp_path), "PEDRO_PROMETHEUS_URL": "http://prometheus:9090/"}
    settings = Settings.from_env(env)
    assert settings.prometheus_url == "http://prometheus:9090"
    assert not [name for name in settings.env() if "PROMETHEUS" in name], "it is for the dashboard, not for jobs"
    for wrong in ("prometheus:9090", "http://["):
        with pytest.raises(ConfigError, match="PEDRO_PROMETHEUS_URL: expected an address"):
            Settings.from_env({**env, "PEDRO_PROMETHEUS_URL": wrong})


@pytest.fixture
def page(tmp_path, kept, monkeypatch):
    def open_page(access, url=None):
        monkeypatch.setattr(GatewayClient, "status", lambda _client: GatewayStatus(True, True, access))
        monkeypatch.setenv("PEDRO_PROMETHEUS_URL", url or kept[0].url)
        monkeypatch.setenv("PEDRO_GATEWAY_URL", NOBODY.url)
        return opener(monkeypatch, "serving")(tmp_path / "home")

    return open_page


def test_the_page_shows_what_prometheus_has(page):
    shown = page(Access.ADMIN)
    assert not shown.warning
    assert {tile.label: tile.value for tile in shown.metric}["Running"] == "6"
    assert {*shown.dataframe[-1].value["adapter"]} == {"acme.faq", "globex.faq"}
    assert "Prometheus has no figures for this time" in words(shown.caption)


def test_while_prometheus_is_away_the_page_says_so_and_asks_the_gateway(page):
    shown = page(Access.ADMIN, "http://127.0.0.1:9")
    assert "Prometheus at http://127.0.0.1:9 does not answer" in words(shown.warning)
    assert "`pedro serve` starts a gateway" in words(shown.info), "nor does the gateway here"


def test_only_an_operator_sees_what_prometheus_has(page, kept):
    for access in (Access.TENANT, Access.NONE, Access.UNKNOWN):
        shown = page(access)
        assert not kept[0].asked, "every tenant's figures are in it"
        assert not shown.dataframe
    assert prometheus.TIMEOUT_S <= 10
