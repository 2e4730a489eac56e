"""The usage ledger's rows: summed once, whoever writes them and however often, on sqlite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pedro.errors import ConfigError
from pedro.store import Store, Usage

DAY, NEXT = "2026-03-30", "2026-03-31"


def row(tenant="acme", model="acme.faq", key="key_1", day=DAY, requests=1, prompt=10, completion=5):
    return Usage(day, tenant, model, key, requests, prompt, 0, completion)


def test_what_is_added_is_summed_by_day_tenant_model_and_key(store):
    store.add_usage([row(), row(key="key_2"), row("globex", "globex.faq")], "gateway", 1)
    store.add_usage([row(requests=2, prompt=20), row(day=NEXT)], "gateway", 2)
    assert store.usage() == [
        row(requests=3, prompt=30, completion=10),
        row(day=NEXT),
        row(key="key_2"),
        row("globex", "globex.faq"),
    ]
    assert store.usage("globex") == [row("globex", "globex.faq")]
    by_day = store.usage("acme", by=["day"], since=DAY, until=DAY)
    assert by_day == [Usage(DAY, requests=4, prompt_tokens=40, completion_tokens=15)]
    assert store.usage(by=[]) == [Usage(requests=6, prompt_tokens=60, completion_tokens=25)]
    assert [used.key_id for used in store.usage(by=["key"], limit=1, offset=1)] == ["key_2"]


def test_nothing_used_is_no_rows_and_no_total(store):
    assert store.usage() == store.usage(by=[]) == []


def test_a_batch_that_is_written_again_counts_once_and_writers_have_their_own(store):
    for _ in range(3):
        store.add_usage([row()], "one", 7)
    store.add_usage([row()], "one", 6)
    store.add_usage([row()], "other", 7)
    store.add_usage([row()], "one", 8)
    assert store.usage(by=[])[0].requests == 3


def test_the_marks_of_writers_that_are_gone_are_forgotten_and_the_sums_stay(store):
    store.add_usage([row()], "old", 1_000)
    store.add_usage([row()], "new", 2_000)
    store.add_training("ftjob-1", Usage(DAY, "acme", "acme.faq", training_tokens=1))
    assert (store.forget_batches(2_000), store.forget_batches(2_000)) == (1, 0)
    store.add_usage([row()], "new", 2_000)
    store.add_training("ftjob-1", Usage(DAY, "acme", "acme.faq", training_tokens=1))
    total = store.usage(by=[])[0]
    assert (total.requests, total.training_tokens) == (2, 1)


def test_a_job_is_counted_once_and_goes_on_from_where_it_was(store):
    def reached(tokens, seconds, day=DAY):
        store.add_training("ftjob-1", Usage(day, "acme", "acme.faq", training_tokens=tokens, training_seconds=seconds))

    reached(100, 1.5)
    reached(100, 1.5)
    reached(250, 4.0, NEXT)
    reached(90, 1.0, NEXT)
    days = {used.day: (used.training_tokens, used.training_seconds) for used in store.usage(by=["day"])}
    assert days == {DAY: (100, 1.5), NEXT: (150, 2.5)}


def test_writers_that_race_for_the_same_rows_lose_nothing(url, store):
    def write(writer):
        other = Store(url)
        for batch in range(1, 11):
            rows = [row(model=f"acme.a{i}", key=f"key_{i}") for i in range(5)]
            other.add_usage(rows if batch % 2 else rows[::-1], f"gateway-{writer}", batch)
            other.add_usage(rows, f"gateway-{writer}", batch)
        other.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    assert store.usage(by=[]) == [Usage(requests=200, prompt_tokens=2000, completion_tokens=1000)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"by": ["week"]}, "by: expected some of tenant, model, key, day, got 'week'"),
        ({"since": "yesterday"}, "since: expected a day (UTC) such as 2026-03-31, got 'yesterday'"),
        ({"since": NEXT, "until": DAY}, f"since: {NEXT} is after until, {DAY}; exchange them"),
    ],
)
def test_a_wrong_question_is_told_with_its_field_its_value_and_the_remedy(store, asked, message):
    with pytest.raises(ConfigError) as caught:
        store.usage(**asked)
    assert caught.value.message == message


def test_what_a_tenant_used_is_not_added_while_it_is_being_erased(store):
    ours, theirs = Usage(DAY, "acme", "acme.faq", "key_1", requests=1), Usage(DAY, "globex", "globex.faq", "key_2", 1)
    store.begin_erasure("acme")
    assert store.add_usage([ours, theirs], "w", 1)
    store.add_training("ftjob-1", Usage(DAY, "acme", "acme.faq", "", training_tokens=5))
    assert store.usage("acme") == []
    assert [used.tenant for used in store.usage()] == ["globex"]
    store.end_erasure("acme", "erased-1", {})
    assert store.add_usage([ours], "w", 2)
    assert [used.requests for used in store.usage("acme")] == [1]
