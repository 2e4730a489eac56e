"""The Serving page: intervals as rates and percentiles, and the page over a real engine."""

from __future__ import annotations

import time

import altair as alt
import dashboard_gateway
import httpx
import pytest
from dashboard_app import healthy, opener, words
from traffic_scrapes import add, end, replica, window

from components import timeline
from pedro.gateway import traffic_sampler
from pedro.traffic.history import Interval, TrafficHistory
from pedro.traffic.scrape import Traffic
from sources import serving
from sources.gateway import GatewayClient
from sources.serving import History


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = dashboard_gateway.make_adapters(tmp_path_factory.mktemp("serving"))
    with dashboard_gateway.running(settings) as gateway:
        yield gateway


def test_one_of_many_sessions_scrapes():
    history = History()
    assert [history.due(100.0, 5), history.due(100.1, 5), history.due(103.0, 5), history.due(104.9, 5)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_champion_that_moved_is_a_swap_whether_or_not_anybody_looked(served):
    since = time.time()
    served.registry.promote("globex.faq", 1)  # it is the champion already
    served.registry.promote("acme.faq", 3)
    served.registry.promote("acme.faq", 2)
    swaps = serving.read_swaps(served.settings, since)
    assert [(swap.name, swap.old, swap.new) for swap in swaps] == [("acme.faq", 2, 3), ("acme.faq", 3, 2)]
    assert [row["text"] for row in serving.marks([], swaps)] == ["acme.faq: v2 → v3", "acme.faq: v3 → v2"]


def test_what_no_interval_covers_was_not_observed():
    seen = [Interval(at, at + 15.0, {}, {}) for at in (300.0, 315.0, 500.0)]
    assert serving.gaps(seen, 0.0, 600.0) == [(0.0, 300.0), (330.0, 500.0), (515.0, 600.0)]
    assert serving.gaps(seen, 290.0, 520.0) == [(330.0, 500.0)], "the time of a reading or two is no gap"
    assert serving.gaps([], 0.0, 600.0) == [(0.0, 600.0)]


def test_a_chart_has_its_band_also_where_all_was_observed():
    """In Chromium, lines alone were all drawn at one moment."""
    x = alt.X("at:T")
    for observed in (timeline.Shown(100.0, 200.0, []), timeline.Shown(100.0, 200.0, [(100.0, 120.0)])):
        (band,) = timeline.unobserved(observed, x)
        begun, ended = observed.gaps[0] if observed.gaps else (200.0, 200.0)
        assert (band.data["at"][0], band.data["to"][0]) == (1000 * begun, 1000 * ended)


def test_rates_are_of_the_time_and_what_has_no_line_of_its_own_is_added():
    traffic = {name: Traffic({"completion_tokens": 30.0}) for name in ("a", "b", "c")}
    rows = serving.rate_rows([Interval(0.0, 15.0, {}, traffic)], ["a"])
    assert [(row["adapter"], row["value"]) for row in rows] == [("a", 2.0), (serving.REST, 4.0)]


def test_the_table_has_rates_over_the_whole_time_and_percentiles_in_milliseconds():
    history, one = TrafficHistory(), replica("r1")
    add(history, 100, one)
    end(one), end(one, "globex.faq", tokens=50, reason="error")
    add(history, 105, one)
    add(history, 110, one)
    busy, quiet = serving.adapter_table(window(history))
    assert (busy["adapter"], quiet["adapter"]) == ("globex.faq", "acme.faq")
    assert (quiet["tokens_per_s"], busy["tokens_per_s"], busy["failed"]) == (0.5, 5.0, 1)
    assert 100 < quiet["first_p50"] <= 250, "0.2 s lies in the bucket up to 0.25 s"
    assert busy["first_p50"] is None


def test_evictions_and_refusals_are_marks():
    history = TrafficHistory()
    add(history, 100, replica("r1"))
    add(history, 105, replica("r1", adapters={"evictions": 5, "failed_loads": 1}))
    assert [(row["event"], row["text"]) for row in serving.marks(window(history), [])] == [
        ("Eviction", "3 in 5 s"),
        ("Failed load", "1 in 5 s"),
    ]


def test_a_gateway_that_does_not_answer_is_words():
    assert "does not answer" in History().refresh(GatewayClient("http://127.0.0.1:9"), 900.0)


# the page


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(History, "due", lambda self, now, every_s=0: True)  # no waiting between two looks
    monkeypatch.setattr(traffic_sampler, "FRESH_S", 0.0)  # nor is a reading of a moment ago good enough
    return opener(monkeypatch, "serving")


def ask(served, model, count=1):
    for _ in range(count):
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4}
        reply = httpx.post(
            f"{served.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {served.admin}"}, timeout=30
        )
        assert reply.status_code == 200, reply.text


def test_the_page_shows_what_an_engine_serves_and_a_swap_as_it_happens(page, served, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    monkeypatch.setenv("PEDRO_ADMIN_KEY", served.admin)
    began = GatewayClient(served.url, served.admin).metrics_history(1.0)["read_at"]
    ask(served, "acme.faq", 2), ask(served, "stories260K")  # while no page is open
    shown = page(served.settings.home)
    assert "Not observed (grey)" in words(shown.caption), "the gateway began a moment ago"
    figures = {metric.label: metric.value for metric in shown.metric}
    assert figures["Running"] == "0"
    assert figures["Adapters resident"] == "1"
    assert figures["First token, p95"].endswith("ms")
    table = shown.dataframe[-1].value.set_index("adapter")
    assert dict(table["requests"]) == {"acme.faq": 2, "stories260K": 1}, "whether or not somebody looks"
    assert table.loc["acme.faq", "first_p99"] > 0
    served.registry.promote("acme.faq", 1)
    ask(served, "globex.faq")
    healthy(shown.run())
    happened = shown.dataframe[0].value
    assert next(iter(happened["text"])) == "acme.faq: v2 → v1"
    assert next(iter(happened["at"])).timestamp() >= began - 1, "in UTC"
    assert shown.metric[4].value == "2"
    assert len(shown.get("vega_lite_chart")) == 5
    shown.multiselect[0].set_value(["globex.faq"]).run()
    assert list(healthy(shown).dataframe[-1].value["adapter"]) == ["globex.faq"]
    for span in ("5 minutes", "1 hour", "6 hours", "24 hours"):
        shown.button_group[0].select(span).run()
        healthy(shown)


def test_the_overview_counts_what_the_gateway_observed(page, served, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    monkeypatch.setenv("PEDRO_ADMIN_KEY", served.admin)
    overview = opener(monkeypatch)
    before = requests_of(overview(served.settings.home))
    ask(served, "acme.faq", 2)
    shown = overview(served.settings.home)
    assert requests_of(shown) == before + 2
    figures = {metric.label: metric for metric in shown.metric}
    assert (figures["Errors"].value, figures["Errors"].delta) == ("0", "0.0% of the answers; 0 refused (429)")
    assert figures["Time to first token"].value.endswith(" ms")
    assert "min observed of the last hour" in figures["Requests"].delta, "the gateway began a moment ago"
    assert words(shown.subheader).count("Requests a minute") == 1


def requests_of(shown) -> int:
    return next(int(metric.value) for metric in shown.metric if metric.label == "Requests")


def test_without_a_gateway_the_page_says_which_command_starts_it(page, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    shown = page(tmp_path / "nothing")
    assert "pedro serve" in words(shown.info)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_an_engine_that_is_away_leaves_the_gateways_own_figures(page, tmp_path, monkeypatch):
    from gateway_server import serve

    with serve(tmp_path) as gateway:
        gateway.backend.engine_answers = False
        monkeypatch.setenv("PEDRO_GATEWAY_URL", gateway.url)
        monkeypatch.setenv("PEDRO_ADMIN_KEY", gateway.key("ops", ("admin",)))
        shown = page(tmp_path / "nothing")
        healthy(shown.run())
    figures = {metric.label: metric for metric in shown.metric}
    assert (figures["Running"].value, figures["Running"].delta) == ("–", "no engine answers"), "which is no zero"
    assert figures["Evicted"].value == "0"


def test_a_gateway_that_was_started_anew_is_asked_for_its_own_history():
    told = {"a": [(0, 15), (15, 30)], "b": [(100, 115)]}
    asked = []

    class Gateway:
        url, now = "http://gateway", "a"

        def metrics_history(self, seconds, after=0.0):
            asked.append(after)
            data = [Interval(*ends, {}, {}).to_dict() for ends in told[self.now] if ends[1] > after]
            return {"id": self.now, "began": 0, "read_at": 200.0, "gauges": {}, "data": data}

    history, gateway = History(), Gateway()
    assert history.refresh(gateway, 900.0) == ""
    told["a"].append((30, 45))
    assert history.refresh(gateway, 900.0) == ""
    assert [interval.end for interval in history.window(200.0, 900.0)] == [15, 30, 45]
    gateway.now = "b"
    assert history.refresh(gateway, 900.0) == ""
    assert [interval.end for interval in history.window(200.0, 900.0)] == [115]
    assert asked == [0.0, 30.0, 45.0, 0.0]
