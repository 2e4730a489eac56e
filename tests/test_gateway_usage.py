"""The gateway's usage ledger: what is entered, when it is written, and what its routes show to whom."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from datetime import UTC, datetime

import httpx
import pytest
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve
from prometheus_client import CollectorRegistry
from store_moves import fill

from pedro.errors import UnavailableError
from pedro.gateway import usage as ledgers
from pedro.gateway.app import GatewaySettings
from pedro.gateway.usage import SEVERAL, CallMeter, UsageLedger
from pedro.store import Store, Usage

QUICK = GatewaySettings(write_usage_every_s=0.01)


@pytest.fixture
def store(tmp_path):
    opened = Store(f"sqlite:///{tmp_path}/pedro.db")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("usage"), settings=QUICK) as running:
        yield running


def ledger(store, **options) -> UsageLedger:
    return UsageLedger(store, CollectorRegistry(), **{"flush_every_s": 0.01, **options})


def used(ledger, tenant="acme", key="key_1", model="acme.faq", prompt=10, completion=5) -> list[CallMeter]:
    """Enter a request of one call."""
    meter = CallMeter()
    entry = ledger.entry(tenant, key, model)
    entry.begin([meter], lambda: meter.count(prompt, completion))
    entry.end()
    return [meter]


def reaches(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# what is entered


def test_a_request_is_entered_on_the_day_of_its_end(store):
    now = datetime(2026, 3, 31, 23, 59, 59, tzinfo=UTC).timestamp()

    async def go():
        mine = ledger(store, clock=lambda: now)
        meter, entry = CallMeter(), mine.entry("acme", "key_1", "acme.faq")
        entry.begin([meter], lambda: meter.count(3, 4))
        used(mine, prompt=1)
        nonlocal_now(2.0)
        entry.end()
        await mine.close()

    def nonlocal_now(later):
        nonlocal now
        now += later

    asyncio.run(go())
    assert [(u.day, u.prompt_tokens) for u in store.usage()] == [("2026-03-31", 1), ("2026-04-01", 3)]


def test_a_request_that_was_left_is_entered_once_with_the_count_that_comes_later(store):
    async def go():
        mine = ledger(store)
        meters = [CallMeter(), CallMeter()]
        entry = mine.entry("acme", "key_1", "acme.faq")
        entry.begin(meters, lambda: meters[0].count(10, 2))
        meters[1].expect()
        entry.end()
        assert mine.unwritten == 0, "it is waited for"
        meters[1].model = "acme.other"
        meters[1].count(7, 5)
        meters[1].settled()
        entry.end()
        assert mine.unwritten == 1
        await mine.close()

    asyncio.run(go())
    (row,) = store.usage()
    assert (row.model, row.requests, row.prompt_tokens, row.completion_tokens) == ("acme.other", 1, 17, 7)


def test_what_used_no_tokens_is_not_entered(store):
    async def go():
        mine = ledger(store)
        used(mine, prompt=0, completion=0)
        await mine.close()

    asyncio.run(go())
    assert store.usage() == []


# how it is written


class Flaky(Store):
    """A store whose database is away, or loses the answer to what it has committed."""

    away = lost = 0
    asked = 0

    def add_usage(self, rows, writer, batch):
        self.asked += 1
        if self.away:
            self.away -= 1
            raise UnavailableError("away")
        added = super().add_usage(rows, writer, batch)
        if self.lost:
            self.lost -= 1
            raise UnavailableError("the connection broke after the commit")
        return added


@pytest.mark.parametrize("fault", ["away", "lost"])
def test_a_batch_that_failed_is_written_again_and_counts_once(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(ledgers, "RETRY_S", 0.01)
    store = Flaky(f"sqlite:///{tmp_path}/pedro.db")
    setattr(store, fault, 3)
    registry = CollectorRegistry()

    async def go():
        mine = UsageLedger(store, registry, 0.01)
        used(mine)
        while store.asked < 2:
            await asyncio.sleep(0.005)
        used(mine)
        assert registry.get_sample_value("pedro_gateway_usage_unwritten_requests") == 2
        while mine.unwritten:
            await asyncio.sleep(0.005)

    asyncio.run(go())
    assert registry.get_sample_value("pedro_gateway_usage_write_failures_total") == 3
    assert store.usage(by=[]) == [Usage(requests=2, prompt_tokens=20, completion_tokens=10)]
    store.close()


def test_many_requests_are_few_transactions(tmp_path):
    store = Flaky(f"sqlite:///{tmp_path}/pedro.db")

    async def go():
        mine = UsageLedger(store, CollectorRegistry(), 0.2)
        for _ in range(1000):
            used(mine)
        await mine.close()

    asyncio.run(go())
    assert store.asked == 1
    assert store.usage(by=[])[0].requests == 1000
    store.close()


def test_sums_that_would_be_too_many_are_a_tenants_as_a_whole(store, monkeypatch):
    monkeypatch.setattr(ledgers, "MAX_SUMS", 3)

    async def go():
        mine = ledger(store)
        for number in range(10):
            used(mine, key=f"key_{number}")
        assert len(mine._sums) == 4
        await mine.close()

    asyncio.run(go())
    assert store.usage("acme", by=[])[0].requests == 10
    assert {u.model: u.requests for u in store.usage(by=["model"])} == {"acme.faq": 3, SEVERAL: 7}


def test_a_gateway_that_ends_writes_what_it_has(tmp_path):
    with serve(tmp_path, token_s=0.005, settings=GatewaySettings(write_usage_every_s=3600)) as gateway:
        with gateway.http(gateway.key()) as client:
            body = {"model": BACKBONE, "prompt": "a b", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
        store = Store(gateway.store.url)
        assert store.usage() == []
    assert store.usage(by=[]) == [Usage(requests=1, prompt_tokens=2, completion_tokens=3)]
    store.close()


# over HTTP


def written(gateway: Gateway, requests: int) -> Usage:
    """The total once so many requests are in the database."""
    reaches(lambda: [used.requests for used in gateway.store.usage(by=[])] == [requests])
    return gateway.store.usage(by=[])[0]


def test_completions_chats_choices_streams_and_errors_midway_are_all_entered(tmp_path):
    with serve(tmp_path, settings=QUICK) as gateway, gateway.http(gateway.key()) as client:
        asked = [
            ("completions", {"prompt": ["a b", "c"], "max_tokens": 3, "n": 2}),
            ("completions", {"prompt": "a b", "max_tokens": 3, "stream": True}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 2}),
            ("completions", {"prompt": "refuse it", "max_tokens": 9}),
            ("completions", {"prompt": "break", "max_tokens": 9, "stream": True}),
            ("completions", {"prompt": "overload", "max_tokens": 9}),
        ]
        for route, body in asked:
            client.post(f"/v1/{route}", json={"model": BACKBONE, **body})
        client.post("/v1/completions", json={"model": "acme.unknown", "prompt": "a"})
        total = written(gateway, requests=5)
        assert (total.prompt_tokens, total.completion_tokens) == (3 + 2 + 3 + 2 + 1, 12 + 3 + 2 + 2 + 2)
        assert {u.model for u in gateway.store.usage()} == {BACKBONE}


@pytest.fixture(scope="module")
def filled(gateway):
    """A gateway whose ledger holds two tenants, two days and a model that a spreadsheet would compute."""
    rows = [
        Usage("2026-03-30", "acme", "acme.faq", "key_1", 1, 10, 4, 5),
        Usage("2026-03-31", "acme", "acme.faq", "key_1", 2, 20, 0, 6),
        Usage("2026-03-31", "acme", "=cmd()", "key_2", 3, 30, 0, 7, 100, 1.5),
        Usage("2026-03-31", "globex", "globex.faq", "key_3", 4, 40, 0, 8),
    ]
    gateway.store.add_usage(rows, "test", 1)
    return gateway


@pytest.fixture(scope="module")
def tenant(filled):
    with filled.http(filled.key()) as client:
        yield client


@pytest.fixture(scope="module")
def admin(filled):
    with filled.http(filled.key("ops", ("admin",))) as client:
        yield client


def test_a_tenant_sees_its_own_usage_and_an_admin_everybodys(tenant, admin):
    mine = tenant.get("/v1/usage?group_by=tenant").json()
    assert [(row["tenant"], row["requests"]) for row in mine["data"]] == [("acme", 6)]
    assert mine["total"]["prompt_tokens"] == 60
    assert (mine["total"]["training_tokens"], mine["total"]["training_seconds"]) == (100, 1.5)
    assert tenant.get("/v1/usage?tenant=acme").status_code == 200
    foreign = tenant.get("/v1/usage?tenant=globex")
    assert (foreign.status_code, foreign.json()["error"]["param"]) == (403, "tenant")
    everybody = admin.get("/v1/usage?group_by=tenant").json()
    assert {row["tenant"]: row["requests"] for row in everybody["data"]} == {"acme": 6, "globex": 4}
    assert admin.get("/v1/usage?tenant=globex").json()["total"]["requests"] == 4


def test_a_key_that_is_held_to_some_adapters_does_not_see_its_tenants_usage(filled):
    fill(filled.store, 1, "acme.support")
    held = filled.store.create_key("acme", ("infer", "read"), adapters=("support",))[1]
    with filled.http(held) as client:
        for path in ("/v1/usage", "/v1/organization/usage/completions?start_time=1"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")


def test_usage_is_grouped_bounded_by_days_and_given_in_pages(tenant):
    pages, page = [], "0"
    while page is not None:
        body = tenant.get("/v1/usage", params={"group_by": "day,model", "limit": 1, "page": page}).json()
        pages += body["data"]
        page = body["next_page"]
        assert body["has_more"] == (page is not None)
    assert [(row["day"], row["model"]) for row in pages] == [
        ("2026-03-30", "acme.faq"),
        ("2026-03-31", "=cmd()"),
        ("2026-03-31", "acme.faq"),
    ]
    last = tenant.get("/v1/usage?start_date=2026-03-31&end_date=2026-03-31&group_by=day").json()["data"]
    assert [(row["day"], row["requests"]) for row in last] == [("2026-03-31", 5)]


@pytest.mark.parametrize("way", [{"headers": {"accept": "text/csv"}}, {"params": {"format": "csv"}}])
def test_csv_has_no_cell_that_a_spreadsheet_computes(tenant, way):
    answer = tenant.get("/v1/usage", **way)
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["model"] for row in rows] == ["'=cmd()", "acme.faq", "acme.faq"]
    assert sum(int(row["prompt_tokens"]) for row in rows) == 60


@pytest.mark.parametrize(
    ("query", "param", "part"),
    [
        ("group_by=week", "group_by", "expected some of tenant, model, key, day, got 'week'"),
        ("start_date=soon", "start_date", "such as 2026-03-31, got 'soon'"),
        ("start_date=2026-04-02&end_date=2026-04-01", "start_date", "is after end_date"),
        ("limit=0", "limit", "a whole number, 1 to 1000, got '0'"),
        ("page=x", "page", "got 'x'"),
        ("format=xml", "format", "json or csv, got 'xml'"),
        ("limit=1&limit=2", "limit", "expected one value, got '1,2'"),
        ("group_by=a%00", "group_by", "expected plain text"),
        ("days=3", "days", "unknown; known are tenant, group_by"),
    ],
)
def test_a_wrong_question_is_a_400_that_names_field_value_and_remedy(tenant, query, param, part):
    answer = tenant.get(f"/v1/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert part in answer.json()["error"]["message"]


def openai_usage(client: httpx.Client, **query):
    start = int(datetime(2026, 3, 30, 5, tzinfo=UTC).timestamp())
    end = int(datetime(2026, 4, 2, tzinfo=UTC).timestamp())
    return client.get("/v1/organization/usage/completions", params={"start_time": start, "end_time": end, **query})


def test_the_same_has_openais_shape_in_buckets_of_a_day(admin, tenant):
    body = openai_usage(admin, **{"group_by[]": ["project_id", "model"], "models": "acme.faq,globex.faq"}).json()
    assert [bucket["end_time"] - bucket["start_time"] for bucket in body["data"]] == [86_400] * 3
    assert [len(bucket["results"]) for bucket in body["data"]] == [1, 2, 0]
    first = body["data"][0]["results"][0]
    assert first == {
        "object": "organization.usage.completions.result",
        "input_tokens": 10,
        "output_tokens": 5,
        "input_cached_tokens": 4,
        "num_model_requests": 1,
        "project_id": "acme",
        "user_id": None,
        "api_key_id": None,
        "model": "acme.faq",
        "batch": None,
    }
    one = openai_usage(tenant, limit=1).json()
    assert (one["has_more"], one["next_page"]) == (True, "2026-03-31")
    two = openai_usage(tenant, limit=1, page=one["next_page"]).json()
    assert [result["num_model_requests"] for bucket in two["data"] for result in bucket["results"]] == [5]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"bucket_width": "1h"}, "bucket_width"),
        ({"group_by": "user_id"}, "group_by"),
        ({"start_time": ""}, "start_time"),
        ({"page": "9999-12-31"}, "page"),
        ({"page": "tomorrow"}, "page"),
    ],
)
def test_what_openais_route_cannot_tell_is_refused(tenant, query, param):
    answer = openai_usage(tenant, **query)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
