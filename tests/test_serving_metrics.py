"""What a replica tells Prometheus: read back by Prometheus's own parser."""

import threading

from prometheus_client.parser import text_string_to_metric_families as parsed

from pedro.engine.sequence import Output, Timing
from pedro.refs import ModelRef
from pedro.serving.metrics import OTHER, Labels, ReplicaMetrics, merged

STATS = {
    "running": 3, "waiting": 2, "slots": 8, "slots_free": 2, "kv_cache_bytes": 1024, "steps": 7,
    "kv_blocks": 8, "kv_blocks_used": 3,
    "speculation": {"drafts": 4, "draft_tokens": 20, "accepted_tokens": 9},
    "prefixes": {
        "budget_bytes": 1000, "evictions": 3,
        "bytes_by_adapter": {None: 5, "acme.faq:1#sha256:1": 7, "acme.faq:2#sha256:2": 8, "acme.rare:1#sha256:3": 9},
    },
    "adapters": {
        "resident": 4, "pinned": 1, "bytes": 99, "budget_bytes": 100, "loads": 6, "failed_loads": 0, "evictions": 2,
    },
}  # fmt: skip


def ended(reason="stop", index=0):
    prompt_tokens = 0 if index else 10
    timing = Timing(0.1, 0.2, 0.6)
    fields = {"prompt_tokens": prompt_tokens, "cached_tokens": prompt_tokens // 2, "completion_tokens": 5}
    return Output("r", index, finish_reason=reason, timing=timing, **fields)


def values(text):
    """Every sample by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def test_an_answer_counts_under_its_adapter_whatever_the_version():
    metrics = ReplicaMetrics("r1", "stories", lambda: STATS)
    metrics.finished(ModelRef.parse("acme.faq:1#sha256:1"), ended())
    metrics.finished(ModelRef.parse("acme.faq:2#sha256:2"), ended("length"))
    metrics.finished(ModelRef.parse("acme.faq:2#sha256:2"), ended("length", index=1))
    metrics.finished(None, ended("cancelled"))
    found = values(metrics.text())
    at = ("adapter", "acme.faq"), ("replica", "r1")
    assert found["pedro_requests_total", at[0], ("finish_reason", "length"), at[1]] == 2
    assert found["pedro_prompt_tokens_total", *at] == 20, "the choices of a call share its prompt"
    assert found["pedro_completion_tokens_total", *at] == 15
    assert found["pedro_prefix_cache_queries_total", *at] == 20
    assert found["pedro_prefix_cache_hits_total", *at] == 10
    assert found["pedro_prefix_cache_bytes", *at] == 15, "of all its versions"
    assert found["pedro_prefix_cache_bytes", ("adapter", "stories"), at[1]] == 5
    assert found["pedro_prefix_cache_bytes", ("adapter", OTHER), at[1]] == 9, "it has no series yet"
    assert found["pedro_prefix_cache_evictions_total", at[1]] == 3
    assert found["pedro_spec_decode_num_drafts_total", at[1]] == 4
    assert found["pedro_spec_decode_num_draft_tokens_total", at[1]] == 20
    assert found["pedro_spec_decode_num_accepted_tokens_total", at[1]] == 9
    assert found["pedro_time_to_first_token_seconds_count", *at] == 3
    assert abs(found["pedro_time_per_token_seconds_sum", *at] - 0.3) < 1e-9
    assert found["pedro_requests_total", ("adapter", "stories"), ("finish_reason", "cancelled"), at[1]] == 1
    assert ("pedro_queue_seconds_count", ("adapter", "stories"), at[1]) not in found, "it was not answered"
    assert found["pedro_running", at[1]] == 3
    assert found["pedro_kv_cache_usage_ratio", at[1]] == 3 / 8
    assert (found["pedro_slots", at[1]], found["pedro_slots_used", at[1]]) == (8, 6)
    assert (found["pedro_kv_blocks", at[1]], found["pedro_kv_blocks_used", at[1]]) == (8, 3)
    assert found["pedro_adapter_evictions_total", at[1]] == 2


def test_a_reader_of_the_figures_holds_up_no_engine():
    def stats():
        engine = threading.Thread(target=metrics.finished, args=(None, ended()))  # ends an answer while it is read
        engine.start()
        engine.join(60)
        waited.append(engine.is_alive())
        return STATS

    waited = []
    metrics = ReplicaMetrics("r1", "stories", stats)
    metrics.text()
    assert waited == [False]


def test_ten_thousand_adapters_make_no_more_series_than_a_hundred():
    metrics = ReplicaMetrics("r1", "stories", lambda: STATS)
    for i in range(10_000):
        metrics.finished(ModelRef.parse(f"acme.a{i}:1#sha256:1"), ended())
    adapters = {dict(key[1:]).get("adapter") for key in values(metrics.text())} - {None}
    assert len(adapters) <= 101
    total = sum(value for key, value in values(metrics.text()).items() if key[0] == "pedro_requests_total")
    assert total == 10_000


def test_an_adapter_that_becomes_busy_takes_the_place_of_the_least_busy_one():
    dropped = []
    labels = Labels(3, dropped.append)
    for name in ("a", "a", "a", "b", "b", "c", "d"):
        labels(name)
    assert (labels("e"), dropped) == (OTHER, [])
    assert (labels("d"), dropped) == ("d", ["c"])
    assert [labels(name) for name in ("a", "b", "d")] == ["a", "b", "d"]


def test_the_texts_of_several_replicas_are_one_text_with_each_heading_once():
    replicas = [ReplicaMetrics(name, "stories", lambda: STATS) for name in ("r1", "r2")]
    replicas[1].finished(ModelRef.parse("acme.faq:1#sha256:1"), ended())
    text = merged(replica.text() for replica in replicas)
    assert text.count("# TYPE pedro_running gauge") == 1
    assert values(text).keys() == values(replicas[0].text()).keys() | values(replicas[1].text()).keys()
    assert text.endswith("\n")
