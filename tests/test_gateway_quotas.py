"""Quotas of one gateway: who is refused and told what, what is reserved and given back, and how a change takes hold."""

from __future__ import annotations

import time
from functools import partialmethod

import httpx
import openai
import pytest
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve

from pedro.errors import RateLimitError
from pedro.gateway.auth import Principal
from pedro.gateway.quotas import Quotas, Ticket
from pedro.store import Quota

NO_STORE = None  # what is asked of it fails


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def caller(*, tenant: Quota = Quota(), key: Quota = Quota(), key_id: str = "key_1") -> Principal:  # noqa: B008
    return Principal(key_id, "acme", frozenset({"infer"}), key, tenant)


def admit(quotas: Quotas, who: Principal, tokens: int = 0) -> Ticket:
    """As a request does; with limits a minute of one gateway alone, it waits for nothing."""
    with pytest.raises(StopIteration) as done:
        quotas.admit(who, tokens).send(None)
    return done.value.value


def refused(quotas: Quotas, who: Principal, tokens: int = 0) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        admit(quotas, who, tokens)
    return caught.value


# the buckets


def test_a_minutes_worth_may_come_at_once_and_then_as_the_bucket_refills(clock):
    quotas, who = Quotas(NO_STORE, clock=clock), caller(tenant=Quota(3))
    for _ in range(3):
        admit(quotas, who)
    error = refused(quotas, who)
    assert error.retry_after_s == pytest.approx(20)
    assert "requests per minute: limit 3, remaining 0, requested 1" in error.message
    clock.now += 20.001
    admit(quotas, who)
    refused(quotas, who)


def test_a_tenants_keys_share_its_quota_and_a_key_may_have_less_of_its_own(clock):
    quotas = Quotas(NO_STORE, clock=clock)
    small, other = caller(tenant=Quota(3), key=Quota(1), key_id="a"), caller(tenant=Quota(3), key_id="b")
    admit(quotas, small)
    assert "this API key" in refused(quotas, small).message
    admit(quotas, other)
    admit(quotas, other)
    assert "tenant acme" in refused(quotas, other).message


def test_what_is_refused_takes_nothing_of_any_bucket(clock):
    quotas, who = Quotas(NO_STORE, clock=clock), caller(tenant=Quota(10, 100), key=Quota(10, 50))
    for _ in range(20):
        refused(quotas, who, 60)
    assert quotas.headers(who)["x-ratelimit-remaining-requests"] == "10"
    admit(quotas, who, 50)


def test_tokens_are_reserved_and_settled_once_by_what_was_used(clock):
    quotas, who = Quotas(NO_STORE, clock=clock), caller(tenant=Quota(tokens_per_minute=100))
    ticket = admit(quotas, who, 80)
    assert "tokens per minute: limit 100, remaining 20, requested 30" in refused(quotas, who, 30).message
    ticket.settle(10)
    ticket.settle(99)
    admit(quotas, who, 90)


def test_more_than_was_reserved_is_a_debt_that_time_pays(clock):
    quotas, who = Quotas(NO_STORE, clock=clock), caller(tenant=Quota(tokens_per_minute=60))
    admit(quotas, who, 10).settle(80)
    assert refused(quotas, who, 1).retry_after_s == pytest.approx(21)
    admit(quotas, who)  # what costs no tokens is not held up by the debt
    clock.now += 21
    admit(quotas, who, 1)


def test_a_request_that_no_minute_could_hold_is_told_so_and_not_to_come_again(clock):
    quotas, who = Quotas(NO_STORE, clock=clock), caller(tenant=Quota(tokens_per_minute=60))
    error = refused(quotas, who, 61)
    assert error.retry_after_s is None
    assert "max_tokens" in error.message


def test_a_changed_limit_holds_at_once_and_a_higher_one_adds_what_it_adds(clock):
    quotas = Quotas(NO_STORE, clock=clock)
    admit(quotas, caller(tenant=Quota(tokens_per_minute=100)), 100)
    refused(quotas, caller(tenant=Quota(tokens_per_minute=100)), 1)
    admit(quotas, caller(tenant=Quota(tokens_per_minute=150)), 50)
    refused(quotas, caller(tenant=Quota(tokens_per_minute=150)), 1)
    clock.now += 60
    refused(quotas, caller(tenant=Quota(tokens_per_minute=10)), 11)
    admit(quotas, caller(tenant=Quota(tokens_per_minute=10)), 10)
    admit(quotas, caller(), 10**6)


def test_full_buckets_of_many_tenants_are_forgotten(clock, monkeypatch):
    monkeypatch.setattr("pedro.gateway.quotas.MAX_BUCKETS", 50)
    quotas, busy = Quotas(NO_STORE, clock=clock), caller(key=Quota(1), key_id="busy")
    admit(quotas, busy)
    for number in range(200):
        quotas.headers(caller(key=Quota(5), key_id=str(number)))
    assert len(quotas._local) <= 51
    refused(quotas, busy)


# over HTTP


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """Its buckets refill never: what they hold does not depend on how fast the machine is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Quotas, "__init__", partialmethod(Quotas.__init__, clock=Clock()))
        with serve(tmp_path_factory.mktemp("gateway"), token_s=0.002) as running:
            yield running


_tenants = iter(f"tenant-{number}" for number in range(100))


@pytest.fixture
def limited(gateway: Gateway):
    """Makes a tenant with a quota, and gives its name and a client for it."""

    def make(requests: int | None = None, tokens: int | None = None) -> tuple[str, openai.OpenAI]:
        tenant = next(_tenants)
        gateway.store.set_quota(tenant=tenant, requests_per_minute=requests, tokens_per_minute=tokens)
        return tenant, gateway.client(gateway.key(tenant))

    return make


def ask(client: openai.OpenAI, **options):
    options = {"model": BACKBONE, "prompt": [1, 2], "max_tokens": 4} | options
    return client.completions.with_raw_response.create(**options)


def left(reply, kind: str) -> int:
    return int(reply.headers[f"x-ratelimit-remaining-{kind}"])


def test_over_the_requests_of_a_minute_the_openai_client_gets_its_rate_limit_error(limited):
    _, client = limited(requests=2)
    assert [left(ask(client), "requests") for _ in range(2)] == [1, 0]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    error, headers = caught.value, caught.value.response.headers
    assert (error.type, error.code, error.param) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert "requests per minute" in error.message
    assert headers["retry-after"] == "30"
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in headers
    assert headers["x-request-id"]


def test_without_a_quota_nothing_is_said_of_one(gateway):
    reply = ask(gateway.client(gateway.key("unlimited")))
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


def test_prompt_and_max_tokens_are_reserved_while_a_request_runs_and_the_rest_comes_back(gateway, limited):
    _, client = limited(tokens=1000)
    with client.completions.create(model=BACKBONE, prompt=[1, 2], max_tokens=900, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="tokens per minute"):
            ask(client, max_tokens=200)
    deadline = time.monotonic() + 60
    while gateway.backend.running and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.02)
    assert left(ask(client, max_tokens=200), "tokens") > 500  # the stream was cut: only what it made counts


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_costs_its_prompt_once_and_every_token_of_its_choices(limited, stream, n):
    _, client = limited(tokens=600)
    reply = client.completions.create(model=BACKBONE, prompt=[[1, 2], [3, 4, 5]], n=n, max_tokens=40, stream=stream)
    if stream:
        list(reply)
    spent = 600 - (left(ask(client, max_tokens=1), "tokens") + 3)
    assert spent == 5 + 80 * n


def test_text_is_guessed_at_first_and_paid_for_as_it_was(limited):
    _, client = limited(tokens=600)
    ask(client, prompt="a " * 500, max_tokens=1)  # 500 tokens, guessed as 250
    with pytest.raises(openai.RateLimitError):
        ask(client, prompt="a " * 500, max_tokens=1)


def test_a_client_that_leaves_before_the_first_token_pays_for_its_prompt(gateway, limited):
    tenant, client = limited(tokens=300)
    gateway.backend.first_token_s = 5.0
    body = {"model": BACKBONE, "prompt": ["a " * 300, "b " * 100], "max_tokens": 1}
    with gateway.http(gateway.key(tenant)) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=0.5)
    gateway.backend.first_token_s = 0.0
    deadline = time.monotonic() + 60
    while gateway.backend.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left(ask(client, max_tokens=1), "tokens") < 120


@pytest.mark.parametrize("prompt", ["overload", "crash", "queue"])
def test_what_the_backend_refuses_costs_a_request_but_no_tokens(limited, prompt):
    _, client = limited(requests=10, tokens=100)
    with pytest.raises(openai.APIStatusError):
        ask(client, prompt=prompt, max_tokens=90)
    reply = ask(client, max_tokens=90)
    assert left(reply, "requests") == 8


def test_a_changed_quota_holds_for_the_next_request(gateway, limited):
    tenant, client = limited(requests=1)
    ask(client)
    with pytest.raises(openai.RateLimitError):
        ask(client)
    gateway.store.set_quota(tenant=tenant, requests_per_minute=2)
    ask(client)
    with pytest.raises(openai.RateLimitError):
        ask(client)
    gateway.store.set_quota(tenant=tenant, requests_per_minute=0)
    assert "x-ratelimit-limit-requests" not in ask(client).headers


def test_one_tenant_over_its_quota_is_nobody_elses_trouble(limited):
    (_, flooding), (_, other) = limited(requests=1), limited(requests=1)
    ask(flooding)
    with pytest.raises(openai.RateLimitError):
        ask(flooding)
    ask(other)


def test_a_request_that_is_wrong_costs_nothing(gateway, limited):
    _, client = limited(requests=1)
    with pytest.raises(openai.BadRequestError):
        ask(client, temperature=9)
    ask(client)


def test_a_request_larger_than_the_quota_is_not_tried_again_by_the_client(gateway, limited):
    _, client = limited(tokens=50)
    patient = client.with_options(max_retries=5)
    with pytest.raises(openai.RateLimitError, match="Request too large") as caught:
        ask(patient, max_tokens=51)
    assert "retry-after" not in caught.value.response.headers


def test_over_a_days_budget_the_openai_client_is_told_which_and_until_when_and_does_not_try_again(gateway):
    tenant = next(_tenants)
    gateway.store.set_quota(tenant=tenant, requests_per_minute=100, requests_per_day=2)
    client = gateway.client(gateway.key(tenant)).with_options(max_retries=5)
    assert [left(ask(client), "requests") for _ in range(2)] == [1, 0]
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    error, headers = caught.value, caught.value.response.headers
    assert (error.type, error.code) == ("insufficient_quota", "insufficient_quota")
    assert "requests_per_day" in error.message
    assert error.message.endswith("renewed at 1970-01-02T00:00:00Z.")
    assert (headers["retry-after"], headers["x-should-retry"]) == ("85400", "false")
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-reset-requests"] == "23h43m20s"


def test_tokens_of_an_answer_count_in_the_months_budget(gateway):
    tenant = next(_tenants)
    gateway.store.set_quota(tenant=tenant, tokens_per_month=100)
    client = gateway.client(gateway.key(tenant))
    ask(client, max_tokens=50)
    assert left(ask(client, max_tokens=8), "tokens") == 100 - 52 - 10
    with pytest.raises(openai.RateLimitError, match="month's budget of tokens"):
        ask(client, max_tokens=50)


def test_a_tenants_full_queue_is_a_429_and_the_servers_a_503_both_with_retry_after(gateway):
    with gateway.http(gateway.key()) as http:
        replies: dict[str, httpx.Response] = {
            prompt: http.post("/v1/completions", json={"model": BACKBONE, "prompt": prompt})
            for prompt in ("queue", "overload")
        }
    assert {prompt: reply.status_code for prompt, reply in replies.items()} == {"queue": 429, "overload": 503}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies.values())
    assert replies["queue"].json()["error"]["type"] == "rate_limit_error"
    assert replies["overload"].json()["error"]["type"] == "overloaded_error"
