"""Traffic over time: Prometheus text as numbers, increases, percentiles, and the bounded history of them."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from traffic_scrapes import add, end, replica, window

from pedro.serving.metrics import merged
from pedro.traffic.history import COARSE_S, Interval, TrafficHistory, coarser
from pedro.traffic.scrape import Histogram, SeriesSource, Traffic, gained, increase, parse_metrics

INF = math.inf


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


def test_rates_come_from_differences_and_survive_a_restart():
    history, first = TrafficHistory(), replica("r1")
    end(first), end(first)
    add(history, 100, first)
    assert window(history) == [], "nothing to compare with yet"
    for _ in range(4):
        end(first)
    add(history, 110, first)
    again = replica("r1")  # the same name, counting from 0
    end(again)
    add(history, 120, again)
    gained = [interval.traffic["acme.faq"].counts["completion_tokens"] for interval in window(history)]
    assert gained == [20, 5]


def test_a_replica_met_later_does_not_bring_its_past_along():
    history, one, two = TrafficHistory(), replica("r1"), replica("r2")
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
    history, one = TrafficHistory(), replica("r1")
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
    history, one = TrafficHistory(most_fine=10), replica("r1")
    for at in range(100):
        add(history, at, one)
    kept = window(history)
    assert [interval.end for interval in kept] == list(range(90, 100))
    assert [interval.end for interval in window(history, 99, 3)] == [97, 98, 99]


def test_coarser_intervals_hold_the_same_in_all():
    traffic = {"a": Traffic({"requests": 1.0, "completion_tokens": 2.0}, {"first": Histogram((0.1, INF), (1, 1))})}
    fine = [Interval(5.0 * i, 5.0 * i + 5, {"running": float(i)}, traffic) for i in range(720)]
    coarse = coarser(fine, 90)
    assert 80 <= len(coarse) <= 92
    assert sum(interval.traffic["a"].counts["requests"] for interval in coarse) == 720
    assert sum(interval.traffic["a"].histograms["first"].total for interval in coarse) == 720
    assert (coarse[0].start, coarse[-1].end) == (0, 3600)
    assert coarse[-1].gauges["running"] == 719, "a peak is not lost"


def test_a_hundred_adapters_are_read_and_kept_at_little_cost():
    one = replica("r1")
    for i in range(100):
        end(one, f"acme.a{i}")
    text = one.text()
    began = time.process_time()
    history = TrafficHistory()
    for at in range(3):
        history.add(at, parse_metrics(text))
    assert (time.process_time() - began) / 3 < 1.0, "a reading a few seconds apart must not fill a core"


def test_sources_of_the_text_are_told_apart_by_metric_replica_and_adapter():
    one = replica("r1")
    end(one)
    assert parse_metrics(one.text()).totals[SeriesSource("pedro_requests_total", "r1", "acme.faq")] == {"stop": 1.0}


def test_each_of_several_gateways_counts_for_itself_whichever_a_scrape_meets():
    history = TrafficHistory()
    for at, name, refused in ((100, "a", 5), (105, "b", 40), (110, "a", 7), (115, "b", 41)):
        text = f'pedro_gateway_too_many_requests_total{{gateway="{name}",reason="quota"}} {refused}\n'
        history.add(at, parse_metrics(f"# TYPE pedro_gateway_too_many_requests counter\n{text}"))
    gains = [interval.traffic.get("", Traffic()).counts.get("refused", 0.0) for interval in window(history)]
    assert gains[-2:] == [2.0, 1.0]


def test_what_was_not_scraped_for_a_while_is_no_interval():
    history, one = TrafficHistory(), replica("r1")
    for at in (0, 15, 30, 130, 145):
        end(one)
        add(history, at, one)
    assert [(interval.start, interval.end) for interval in window(history)] == [(0, 15), (15, 30), (130, 145)]
    fine = window(history)
    assert [(interval.start, interval.end) for interval in coarser(fine, 1)] == [(0, 30), (130, 145)]


def test_beyond_an_hour_intervals_are_of_five_minutes_and_hold_the_same_in_all():
    history, one = TrafficHistory(most_fine=10), replica("r1")
    for at in range(0, 7215, 15):
        end(one)
        add(history, at, one)
    kept = window(history, 7200.0, 6 * 3600.0)
    assert {round(interval.seconds) for interval in kept[:-1]} == {int(COARSE_S)}
    assert (kept[0].start, kept[-1].end) == (0, 7200)
    assert sum(interval.traffic["acme.faq"].counts["requests"] for interval in kept) == 480
    assert sum(interval.traffic["acme.faq"].histograms["first"].total for interval in kept) == 480
    assert len(window(history, 7200.0, 3600.0)) == 10, "the fine ones are bounded"


def test_only_what_is_new_is_told_to_one_who_knows_the_rest():
    history, one = TrafficHistory(), replica("r1")
    for at in (0, 15, 30):
        add(history, at, one)
    told = history.window(30.0, 3600.0, after=15.0)
    assert [each["end"] for each in json.loads(told.to_json())["data"]] == [30]
    assert (told.began, told.read_at, told.gauges["running"]) == (0, 30, 3)
    assert told.id == history.id != TrafficHistory().id


def test_a_day_of_a_hundred_busy_adapters_takes_little_memory():
    history, one = TrafficHistory(), replica("r1")
    for at in range(20):
        for i in range(100):
            end(one, f"acme.a{i}")
        add(history, at, one)
    packed = [len(kept) for _, kept in history._fine]
    assert max(packed) * (720 + 576) < 32 * 2**20
