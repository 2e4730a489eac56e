"""The Serving page: Prometheus figures as rates and percentiles, and the page over a real engine."""

from __future__ import annotations

import math
import time

import dashboard_gateway
import httpx
import numpy as np
import pytest
from dashboard_app import DASHBOARD, healthy, opener, words

from pedro.engine.sequence import Output, Timing
from pedro.refs import ModelRef
from pedro.serving.metrics import ReplicaMetrics, merged
from sources import serving
from sources.gateway import GatewayClient
from sources.metrics import Histogram, SeriesSource, Traffic, gained, increase, parse_metrics
from sources.serving import ChampionSwap, History, Interval

INF = math.inf
STATS = {
    "running": 3, "waiting": 2, "slots": 8, "slots_free": 5, "kv_cache_bytes": 1024, "steps": 7,
    "adapters": {
        "resident": 4, "pinned": 1, "bytes": 99, "budget_bytes": 100, "loads": 6, "failed_loads": 0, "evictions": 2,
    },
}  # fmt: skip


def replica(name="r1", **stats):
    adapters = {**STATS["adapters"], **stats.pop("adapters", {})}
    return ReplicaMetrics(name, "stories", lambda: {**STATS, **stats, "adapters": adapters})


def end(metrics, adapter="acme.faq", reason="stop", tokens=5, first_s=0.2, total_s=0.6):
    timing = Timing(0.01, first_s, total_s)
    ref = None if adapter is None else ModelRef.parse(f"{adapter}:1#sha256:1")
    metrics.finished(
        ref, Output("r", 0, finish_reason=reason, prompt_tokens=10, completion_tokens=tokens, timing=timing)
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = dashboard_gateway.make_adapters(tmp_path_factory.mktemp("serving"))
    with dashboard_gateway.running(settings) as gateway:
        yield gateway


# percentiles, as histogram_quantile computes them


@pytest.mark.parametrize(
    ("q", "counts", "value"),
    [
        (0.5, (1, 3, 4, 4), 0.3),  # rank 2 lies halfway between the 1st and the 3rd: 0.1 + 0.4 / 2
        (0.25, (1, 3, 4, 4), 0.1),  # rank 1 is the last of the first bucket, whose lower bound is 0
        (0.125, (1, 3, 4, 4), 0.05),  # rank 0.5 is half of it
        (1.0, (1, 3, 4, 4), 1.0),
        (0.99, (1, 1, 1, 2), 1.0),  # in the infinite bucket: the largest finite bound
        (0.5, (0, 0, 8, 8), 0.75),  # empty buckets before it
        (0.95, (95, 95, 100, 100), 0.1),
        (0.95, (90, 95, 100, 100), 0.5),
        (0.99, (90, 95, 100, 100), 0.9),  # 4 of the 5 in the third bucket: 0.5 + 0.5 * 4 / 5
    ],
)
def test_a_percentile_is_interpolated_in_the_bucket_that_holds_its_rank(q, counts, value):
    assert Histogram((0.1, 0.5, 1.0, INF), counts).quantile(q) == pytest.approx(value)


def test_without_observations_or_finite_bounds_there_is_no_percentile():
    assert Histogram().quantile(0.5) is None
    assert Histogram((0.1, INF), (0, 0)).quantile(0.5) is None
    assert Histogram((INF,), (3,)).quantile(0.5) is None
    assert Histogram((0.1, 0.5), (1, 1)).quantile(0.5) is None


def test_counts_that_fall_by_a_rounding_are_taken_as_level():
    assert Histogram((0.1, 0.5, INF), (2, 1, 4)).quantile(0.25) == pytest.approx(0.05)


def test_percentiles_of_many_values_lie_within_their_bucket_of_the_true_ones():
    values = np.random.default_rng(0).exponential(0.2, 5000)
    upper = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, INF)
    held = Histogram(upper, tuple(float((values <= bound).sum()) for bound in upper))
    for q in (0.5, 0.95, 0.99):
        true, found = float(np.quantile(values, q)), held.quantile(q)
        at = next(i for i, bound in enumerate(upper) if true <= bound)
        assert (upper[at - 1] if at else 0) <= found <= upper[at]


def test_histograms_of_other_bounds_are_added_on_the_bounds_that_both_have():
    both = Histogram((0.1, 0.5, INF), (1, 2, 3)) + Histogram((0.5, 1.0, INF), (4, 5, 6))
    assert both == Histogram((0.5, INF), (6, 9))


# increases


def test_an_increase_is_a_difference_and_after_a_restart_all_there_is():
    assert increase({"": 10}, {"": 12}) == {"": 2}
    assert increase({"": 10}, {"": 3}) == {"": 3}
    assert increase({}, {"": 3}) == {"": 3}
    assert increase({"stop": 5}, {"stop": 5, "length": 2}) == {"stop": 0, "length": 2}
    # Only one bucket fell, but a restart sets a histogram back as a whole.
    assert increase({"0.1": 4, "+Inf": 4}, {"0.1": 3, "+Inf": 5}) == {"0.1": 3, "+Inf": 5}


def test_what_replicas_tell_is_read_and_added_by_adapter():
    one, two = replica("r1"), replica("r2", running=1)
    end(one), end(one, reason="error"), end(two), end(two, None, reason="length")
    scrape = parse_metrics(merged([one.text(), two.text()]))
    assert scrape.gauges["running"] == 4
    assert scrape.gauges["resident"] == 8
    assert scrape.gauges["kv_cache_usage"] == pytest.approx(3 / 8)
    found = gained(scrape.totals)
    assert found["acme.faq"].counts["requests"] == 3
    assert found["acme.faq"].counts["failed"] == 1
    assert found["acme.faq"].counts["completion_tokens"] == 15
    assert found["acme.faq"].histograms["first"].total == 2, "an answer that failed has no first token"
    assert found["stories"].counts["requests"] == 1
    assert found[""].counts["evictions"] == 4


@pytest.mark.parametrize("text", ["<html>", "pedro_running{", 'pedro_running{replica="r"} many', "\x00"])
def test_what_is_no_prometheus_text_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".*"):
        parse_metrics(f"# TYPE pedro_running gauge\n{text}\n")


# history


def add(history, at, *replicas):
    history.add(at, parse_metrics(merged(one.text() for one in replicas)))


def window(history, now=1e9, seconds=1e9):
    return history.window(now, seconds)[0]


def test_rates_come_from_differences_and_survive_a_restart():
    history, first = History(), replica("r1")
    end(first), end(first)
    add(history, 100, first)
    assert window(history) == [], "nothing to compare with yet"
    for _ in range(4):
        end(first)
    add(history, 110, first)
    again = replica("r1")  # the same name, counting from 0
    end(again)
    add(history, 120, again)
    rows = serving.rate_rows(window(history), ["acme.faq"])
    assert [row["value"] for row in rows] == [2.0, 0.5]  # 20 tokens in 10 s, then 5 in 10 s


def test_a_replica_met_later_does_not_bring_its_past_along():
    history, one, two = History(), replica("r1"), replica("r2")
    for _ in range(100):
        end(two)
    add(history, 100, one)
    add(history, 105, one, two)
    end(two), end(one, "globex.faq")
    add(history, 110, one, two)
    traffic = [interval.traffic for interval in window(history)]
    assert "acme.faq" not in traffic[0]
    assert traffic[1]["acme.faq"].counts["requests"] == 1
    assert traffic[1]["globex.faq"].counts["requests"] == 1, "a known replica's new adapter counts from 0"


def test_a_scrape_without_the_engine_breaks_nothing():
    history, one = History(), replica("r1")
    end(one)
    add(history, 100, one)
    history.add(105, parse_metrics("# TYPE pedro_gateway_open_requests gauge\npedro_gateway_open_requests 0\n"))
    end(one)
    add(history, 110, one)
    assert [interval.traffic.get("acme.faq", Traffic()).counts.get("requests", 0) for interval in window(history)] == [
        0,
        1,
    ]


def test_the_history_is_bounded_and_looked_at_by_time():
    history, one = History(kept=10), replica("r1")
    for at in range(100):
        add(history, at, one)
    kept = window(history)
    assert [interval.end for interval in kept] == list(range(90, 100))
    assert [interval.end for interval in window(history, 99, 3)] == [97, 98, 99]


def test_one_of_many_sessions_scrapes():
    history = History()
    assert [history.due(100.0, 5), history.due(100.1, 5), history.due(103.0, 5), history.due(104.9, 5)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_champion_that_moves_is_a_swap():
    history, asked = History(), []

    def earlier():
        asked.append(1)
        return [ChampionSwap(50.0, "globex.faq", 3)]

    history.follow(100, {"acme.faq": 1, "globex.faq": 3}, earlier)
    history.follow(105, {"acme.faq": 1, "globex.faq": 3}, earlier)
    history.follow(110, {"acme.faq": 2, "globex.faq": 3}, earlier)
    history.follow(115, {"acme.faq": 1, "initech.tone": 1}, earlier)
    _, swaps = history.window(1e9, 1e9)
    assert [(swap.at, swap.name, swap.old, swap.new) for swap in swaps] == [
        (50.0, "globex.faq", None, 3),
        (110, "acme.faq", 1, 2),
        (115, "acme.faq", 2, 1),
        (115, "initech.tone", None, 1),
    ]
    assert len(asked) == 1
    assert [row["text"] for row in serving.marks([], swaps)][1] == "acme.faq: v1 → v2"


def test_a_registry_that_did_not_change_is_not_read_again(served, monkeypatch):
    history, readings = History(), []
    read_champions = serving.read_champions

    def counted(settings, since):
        readings.append(read_champions(settings, since))
        return readings[-1]

    monkeypatch.setattr(serving, "read_champions", counted)
    now = time.time()
    for seconds in (0, 5, 10):
        serving.follow_registry(history, served.settings, now + seconds)
    assert len(readings) == 1
    served.registry.set_gate(served.registry.get("globex.faq", 1), "passed: looked at again")
    serving.follow_registry(history, served.settings, now + 15)
    assert len(readings) == 2
    assert (readings[0].names, readings[1].names) == (None, {"globex.faq"}), "only what changed is read again"
    assert readings[1].champions == {"globex.faq": readings[0].champions["globex.faq"]}


def test_of_adapters_that_are_gone_no_champion_stays_known():
    history = History()
    history.follow(100, {"acme.faq": 1, "globex.faq": 3}, list)
    history.follow(105, {}, list, {"acme.faq"})
    history.follow(110, {"acme.faq": 1}, list, {"acme.faq"})
    assert [(swap.name, swap.old, swap.new) for swap in history.window(1e9, 1e9)[1]] == [("acme.faq", None, 1)]


def test_coarser_intervals_hold_the_same_in_all():
    traffic = {"a": Traffic({"requests": 1.0, "completion_tokens": 2.0}, {"first": Histogram((0.1, INF), (1, 1))})}
    fine = [Interval(5.0 * i, 5.0 * i + 5, {"running": float(i)}, traffic) for i in range(720)]
    coarse = serving.coarser(fine, 90)
    assert 80 <= len(coarse) <= 92
    assert sum(interval.traffic["a"].counts["requests"] for interval in coarse) == 720
    assert sum(interval.traffic["a"].histograms["first"].total for interval in coarse) == 720
    assert (coarse[0].start, coarse[-1].end) == (0, 3600)
    assert coarse[-1].gauges["running"] == 719, "a peak is not lost"


def test_the_table_has_rates_over_the_whole_time_and_percentiles_in_milliseconds():
    history, one = History(), replica("r1")
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
    history = History()
    add(history, 100, replica("r1"))
    add(history, 105, replica("r1", adapters={"evictions": 5, "failed_loads": 1}))
    assert [(row["event"], row["text"]) for row in serving.marks(window(history), [])] == [
        ("Eviction", "3 in 5 s"),
        ("Failed load", "1 in 5 s"),
    ]


def test_a_hundred_adapters_are_read_and_kept_at_little_cost():
    one = replica("r1")
    for i in range(100):
        end(one, f"acme.a{i}")
    text = one.text()
    began = time.process_time()
    history = History()
    for at in range(3):
        history.add(at, parse_metrics(text))
    assert (time.process_time() - began) / 3 < 1.0, "a reading a few seconds apart must not fill a core"


def test_a_gateway_that_does_not_answer_is_words():
    assert "does not answer" in serving.scrape_into(History(), GatewayClient("http://127.0.0.1:9"), 1.0)


def test_sources_of_the_text_are_told_apart_by_metric_replica_and_adapter():
    one = replica("r1")
    end(one)
    assert parse_metrics(one.text()).totals[SeriesSource("pedro_requests_total", "r1", "acme.faq")] == {"stop": 1.0}


# the page


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(History, "due", lambda self, now, every_s=0: True)  # no waiting between two looks
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
    shown = page(served.settings.home)
    assert "The first figures come with the second reading" in words(shown.caption)
    ask(served, "acme.faq", 2), ask(served, "stories260K")
    healthy(shown.run())
    figures = {metric.label: metric.value for metric in shown.metric}
    assert figures["Running"] == "0"
    assert figures["Adapters resident"] == "1"
    assert figures["First token, p95"].endswith("ms")
    table = shown.dataframe[-1].value.set_index("adapter")
    assert dict(table["requests"]) == {"acme.faq": 2, "stories260K": 1}
    assert table.loc["acme.faq", "first_p99"] > 0
    served.registry.promote("acme.faq", 1)
    ask(served, "globex.faq")
    healthy(shown.run())
    happened = shown.dataframe[0].value
    assert next(iter(happened["text"])) == "acme.faq: v2 → v1"
    assert shown.metric[4].value == "2"
    assert len(shown.get("vega_lite_chart")) == 5
    shown.multiselect[0].set_value(["globex.faq"]).run()
    assert list(healthy(shown).dataframe[-1].value["adapter"]) == ["globex.faq"]
    for span in ("5 minutes", "1 hour"):
        shown.button_group[0].select(span).run()
        healthy(shown)


def test_a_page_opened_later_sees_what_was_read_before(page, served, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    monkeypatch.setenv("PEDRO_ADMIN_KEY", served.admin)
    page(served.settings.home)
    ask(served, "acme.faq")
    again = AppTest.from_file(str(DASHBOARD / "app.py"), default_timeout=600)
    again = healthy(again.switch_page("views/serving.py").run())
    assert list(again.dataframe[-1].value["adapter"]) == ["acme.faq"]


def test_without_a_gateway_the_page_says_which_command_starts_it(page, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    shown = page(tmp_path / "nothing")
    assert "pedro serve" in words(shown.info)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_each_of_several_gateways_counts_for_itself_whichever_a_scrape_meets():
    history = History()
    for at, name, refused in ((100, "a", 5), (105, "b", 40), (110, "a", 7), (115, "b", 41)):
        text = f'pedro_gateway_too_many_requests_total{{gateway="{name}",reason="quota"}} {refused}\n'
        history.add(at, parse_metrics(f"# TYPE pedro_gateway_too_many_requests counter\n{text}"))
    gains = [interval.traffic.get("", Traffic()).counts.get("refused", 0.0) for interval in window(history)]
    assert gains[-2:] == [2.0, 1.0]


def test_an_engine_that_is_away_leaves_the_gateways_own_figures(page, tmp_path, monkeypatch):
    from gateway_server import serve

    with serve(tmp_path) as gateway:
        gateway.backend.engine_answers = False
        monkeypatch.setenv("PEDRO_GATEWAY_URL", gateway.url)
        monkeypatch.setenv("PEDRO_ADMIN_KEY", gateway.key("ops", ("admin",)))
        shown = page(tmp_path / "nothing")
        healthy(shown.run())
    assert {metric.label: metric.value for metric in shown.metric}["Running"] == "0"
