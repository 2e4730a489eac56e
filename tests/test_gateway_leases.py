"""Limits that several gateways share: never more than the limit and one lease, whatever they do and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
import time
from calendar import timegm

import pytest
from gateway_backend import BACKBONE
from gateway_server import serve

from pedro.errors import BudgetError, RateLimitError, UnavailableError
from pedro.gateway import leases
from pedro.gateway.app import GatewaySettings
from pedro.gateway.auth import Principal
from pedro.gateway.lease import LEASE_S, LEASE_SHARE, REFRESH_S
from pedro.gateway.leases import AWAY_S
from pedro.gateway.quotas import Quotas
from pedro.store import LeaseRequest, Quota, Store, window_end, window_start

NOON = float(timegm((2025, 1, 31, 12, 0, 0)))


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Watched:
    """A store that counts its questions, can be away, and can be held up before it answers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked = 0
        self.away = False
        self.go_on = threading.Event()
        self.go_on.set()

    def exchange(self, *arguments):
        self.asked += 1
        self.go_on.wait()
        if self.away:
            raise UnavailableError("away")
        return self._store.exchange(*arguments)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """An answer of the store is waited for, however slow the machine is."""
    monkeypatch.setattr(leases, "PATIENCE_S", 60.0)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def file(tmp_path):
    opened = Store(f"sqlite:///{tmp_path}/pedro.db")
    yield opened
    opened.close()


def caller(tenant: str = "acme", **limits: int) -> Principal:
    return Principal("key_1", tenant, frozenset({"infer"}), tenant_quota=Quota(**limits))


def run(scenario) -> None:
    async def within():
        async with asyncio.timeout(120):
            await scenario

    asyncio.run(within())


async def admitted(quotas: Quotas, who: Principal, tokens: int = 0) -> bool:
    try:
        await quotas.admit(who, tokens)
    except RateLimitError:
        return False
    return True


async def admitted_of(quotas: Quotas, who: Principal, wanted: int) -> int:
    return sum([await admitted(quotas, who) for _ in range(wanted)])


async def tick(*gateways: Quotas) -> None:
    """What happens once a second."""
    for quotas in gateways:
        quotas._leases.tick()
        await quotas._leases.settled()


def gateways(store, clock, number: int = 3) -> list[Quotas]:
    return [Quotas(store, number, clock) for _ in range(number)]


def remaining(quotas: Quotas, who: Principal, kind: str = "requests") -> int:
    return int(quotas.headers(who)[f"x-ratelimit-remaining-{kind}"])


# never more than the limit and one lease


def one_lease(limit: int) -> int:
    """What all gateways together hold ahead of need, at most."""
    return max(1, int(limit * LEASE_SHARE))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_gateways_do_no_time_sees_more_than_the_limit_and_one_lease(file, clock, seed):
    """Requests come at any gateway, at once or not; time goes by, leases come back, gateways die and are replaced."""
    chance = random.Random(seed)
    limit = chance.choice([1, 3, 30, 600])
    who = caller(requests_per_minute=limit, requests_per_day=4 * limit)
    times: list[float] = []

    async def ask(quotas):
        if await admitted(quotas, who):
            times.append(clock.now)

    async def go():
        alive = gateways(file, clock)
        for _ in range(40):
            await asyncio.gather(*(ask(chance.choice(alive)) for _ in range(chance.randrange(1, 2 + limit // 4))))
            clock.now += chance.choice([0, 0, 0.3, 2, 7, 30])
            event = chance.random()
            if event < 0.1:
                await alive.pop().close()
                alive.append(Quotas(file, 3, clock))
            elif event < 0.2:
                alive.pop(0)  # killed: what it held is lost
                alive.append(Quotas(file, 3, clock))
            elif event < 0.6:
                await tick(*alive)
        for quotas in alive:
            await quotas.close()

    run(go())
    assert 0 < len(times) <= 4 * limit  # of a day
    for first, began in enumerate(times):
        for last in range(first, len(times)):
            span = times[last] - began
            assert last - first + 1 <= limit * (1 + span / 60) + one_lease(limit) + 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_tokens_that_are_reserved_and_settled_stay_within_a_days_budget(file, clock, seed):
    chance = random.Random(seed)
    budget = chance.choice([50, 1000, 20_000])
    who = caller(tokens_per_day=budget)
    spent = 0

    async def go():
        nonlocal spent
        alive, running = gateways(file, clock), []
        for _ in range(120):
            quotas = chance.choice(alive)
            if running and chance.random() < 0.5:
                ticket, reserved = running.pop(chance.randrange(len(running)))
                used = chance.randrange(reserved + 1)
                ticket.settle(used)
                spent += used
            else:
                reserved = chance.randrange(1, max(2, budget // 10))
                try:
                    running.append((await quotas.admit(who, reserved), reserved))
                except BudgetError:
                    clock.now += 1
            if chance.random() < 0.2:
                clock.now += chance.choice([0.5, 20])
                await tick(*alive)
            assert spent + sum(reserved for _, reserved in running) <= budget
        for ticket, _ in running:
            ticket.settle(0)
        for quotas in alive:
            await quotas.close()
        last = Quotas(file, 3, clock)
        await last.admit(who, budget - spent)  # all that was not used is there
        assert not await admitted(last, who, 1)

    run(go())


def test_two_processes_that_exchange_at_once_are_given_the_limit_and_no_more(store):
    """Threads of one process here: each has its own connection, as a process would."""
    given: list[int] = []

    def take():
        for _ in range(25):
            asked = LeaseRequest("tenant:acme", "requests_per_day", 60, needs=(1,), ahead=2, share=0.5)
            (grant,) = store.exchange([asked], NOON)
            given.append(sum(grant.granted) + grant.ahead)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(given) == 60


def test_gateways_together_admit_the_limit_and_leases_of_the_idle_come_back(store, clock):
    who = caller(requests_per_day=300)

    async def go():
        first, second, third = gateways(store, clock)
        before = await admitted_of(first, who, 40) + await admitted_of(second, who, 40)
        assert before == 80
        rest = await admitted_of(third, who, 300)
        assert 220 - 2 * 300 * LEASE_SHARE / 3 <= rest <= 220
        clock.now += LEASE_S + 0.1
        await tick(first, second, third)
        assert rest + await admitted_of(third, who, 300) == 220

    run(go())


def test_a_small_limit_is_given_out_one_by_one(store, clock):
    who = caller(requests_per_minute=5)

    async def go():
        first, second, _ = gateways(store, clock)
        assert await admitted(first, who)
        assert await admitted_of(second, who, 9) == 4
        assert not await admitted(first, who)

    run(go())


def test_most_requests_ask_the_store_nothing(file, clock):
    watched, who = Watched(file), caller(requests_per_minute=60_000, tokens_per_minute=10**7)

    async def go():
        first, *_ = gateways(watched, clock)
        waited = 0
        for _ in range(2000):
            admission = asyncio.ensure_future(first.admit(who, 20))
            await asyncio.sleep(0)
            waited += not admission.done()
            (await admission).settle(20)
            await asyncio.sleep(0.0)
        assert waited < 20
        assert watched.asked < 100

    run(go())


# what the headers say


def test_gateways_say_the_same_of_what_is_left_within_one_lease(store, clock):
    who = caller(requests_per_minute=1000, tokens_per_day=50_000)

    async def go():
        alive = gateways(store, clock)
        for number in range(200):
            ticket = await alive[number % 3].admit(who, 40)
            ticket.settle(30)
        clock.now += REFRESH_S
        await tick(*alive)
        requests = [remaining(quotas, who) for quotas in alive]
        assert max(requests) - min(requests) <= one_lease(1000)
        assert max(requests) <= 800 + 1000 / 60 + 1
        tokens = [remaining(quotas, who, "tokens") for quotas in alive]
        assert max(tokens) - min(tokens) <= one_lease(50_000)
        assert max(tokens) <= 50_000 - 200 * 30
        assert {quotas.headers(who)["x-ratelimit-limit-tokens"] for quotas in alive} == {"50000"}
        assert {quotas.headers(who)["x-ratelimit-reset-tokens"] for quotas in alive} == {"11h59m59s"}

    run(go())


def test_the_limit_that_leaves_least_is_the_one_that_is_told(file, clock):
    who = caller(requests_per_minute=10, requests_per_day=12)

    async def go():
        quotas = Quotas(file, clock=clock)
        assert await admitted_of(quotas, who, 10) == 10
        assert quotas.headers(who)["x-ratelimit-limit-requests"] == "10"
        clock.now += 60
        assert quotas.headers(who)["x-ratelimit-limit-requests"] == "12"
        assert remaining(quotas, who) == 2

    run(go())


# gateways that end


def test_a_gateway_that_ends_gives_its_leases_back(store, clock):
    who = caller(requests_per_month=300)

    async def go():
        first, second = gateways(store, clock, 2)
        assert await admitted_of(first, who, 50) == 50
        await first.close()
        assert await admitted_of(second, who, 300) == 250

    run(go())


def test_what_a_killed_gateway_held_is_lost_until_the_limit_is_renewed(store, clock):
    minute, day = caller(requests_per_minute=300), caller("globex", requests_per_day=300)

    async def go():
        first, second = gateways(store, clock, 2)
        for who in (minute, day):
            assert await admitted_of(first, who, 50) == 50
        await first._leases.settled()
        held = 300 * LEASE_SHARE / 2
        assert 250 - held <= await admitted_of(second, minute, 300) <= 250
        assert 250 - held <= await admitted_of(second, day, 300) <= 250
        clock.now += 60
        assert await admitted_of(second, minute, 400) == 300
        clock.now = window_end("requests_per_day", clock.now)
        assert await admitted_of(second, day, 400) == 300

    run(go())


# budgets


@pytest.mark.parametrize(
    ("what", "last", "renewed"),
    [
        ("requests_per_day", (2025, 1, 31, 23, 59, 59), "2025-02-01T00:00:00Z"),
        ("requests_per_month", (2025, 1, 31, 23, 59, 59), "2025-02-01T00:00:00Z"),
        ("requests_per_month", (2024, 2, 29, 23, 59, 59), "2024-03-01T00:00:00Z"),
        ("requests_per_month", (2025, 12, 1, 0, 0, 0), "2026-01-01T00:00:00Z"),
    ],
)
def test_a_budget_is_renewed_when_the_day_or_month_begins_in_utc_and_its_error_says_so(store, what, last, renewed):
    clock, who = Clock(float(timegm(last))), caller(**{what: 20})
    period = what.rpartition("_")[2]

    async def go():
        first, second = gateways(store, clock, 2)
        assert await admitted_of(first, who, 20) == 20
        clock.now += 0.5
        for quotas in (first, second):
            with pytest.raises(BudgetError) as caught:
                await quotas.admit(who)
            assert (caught.value.type, caught.value.code) == ("insufficient_quota", "insufficient_quota")
            assert f"{period}'s budget of requests of tenant acme ({what})" in caught.value.message
            assert caught.value.message.endswith(f"It is renewed at {renewed}.")
            assert caught.value.retry_after_s == window_end(what, clock.now) - clock.now
        clock.now = window_end(what, clock.now)
        assert await admitted_of(second, who, 30) == 20

    run(go())


def test_windows_are_days_and_months_in_utc():
    for what, at in (("tokens_per_day", NOON), ("tokens_per_month", NOON)):
        assert window_start(what, window_start(what, at)) == window_start(what, at)
        assert window_start(what, window_end(what, at)) == window_end(what, at)
        assert window_start(what, math.nextafter(window_end(what, at), 0)) == window_start(what, at)


def test_a_budget_outlives_its_gateway_and_is_not_given_back_by_an_answer_of_the_day_before(store, clock):
    who = caller(tokens_per_day=1000)

    async def go():
        first = Quotas(store, clock=clock)
        (await first.admit(who, 600)).settle(500)
        long = await first.admit(who, 400)
        await first.close()
        second = Quotas(store, clock=clock)
        assert not second.headers(who)  # it has not asked
        assert not await admitted(second, who, 101)
        assert remaining(second, who, "tokens") == 100
        clock.now = window_end("tokens_per_day", clock.now)
        long.settle(0)
        await second.admit(who, 1000)
        assert not await admitted(second, who, 1)

    run(go())


def test_more_than_was_reserved_is_charged_to_the_budget(store, clock):
    who = caller(tokens_per_day=1000)

    async def go():
        first, second = gateways(store, clock, 2)
        (await first.admit(who, 100)).settle(900)
        await first.close()
        assert not await admitted(second, who, 101)
        assert await admitted(second, who, 100)

    run(go())


def test_a_request_that_no_budget_could_hold_is_told_so(file, clock):
    async def go():
        with pytest.raises(
            BudgetError, match="Request too large for tenant acme on tokens per day: limit 50"
        ) as caught:
            await Quotas(file, clock=clock).admit(caller(tokens_per_day=50), 51)
        assert caught.value.retry_after_s is None

    run(go())


def test_a_changed_budget_counts_what_was_used_already(store, clock):
    async def go():
        first, second = gateways(store, clock, 2)
        assert await admitted_of(first, caller(requests_per_day=100), 100) == 100
        assert await admitted_of(second, caller(requests_per_day=150), 100) == 50
        clock.now += REFRESH_S
        assert not await admitted(first, caller(requests_per_day=50))
        assert await admitted(first, caller(requests_per_day=151))

    run(go())


def test_what_one_limit_refuses_is_given_back_to_the_others(store, clock):
    who = caller(requests_per_day=2, tokens_per_day=1000)

    async def go():
        first, _ = gateways(store, clock, 2)
        assert await admitted(first, who, 100)
        assert await admitted(first, who, 100)
        for _ in range(5):
            assert not await admitted(first, who, 100)
            clock.now += REFRESH_S
        await tick(first)
        assert remaining(first, who, "tokens") == 800

    run(go())


def test_a_request_that_leaves_while_it_waits_takes_nothing(file, clock):
    watched, who = Watched(file), caller(requests_per_day=10)

    async def go():
        first, second = gateways(watched, clock, 2)
        watched.go_on.clear()
        waiting = [asyncio.ensure_future(first.admit(who)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for admission in waiting:
            admission.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        watched.go_on.set()
        await first._leases.settled()
        await tick(first)
        assert await admitted_of(second, who, 20) == 10

    run(go())


# while the store is away


def test_a_minute_without_the_store_costs_no_request_within_the_limit(store, clock):
    """Three gateways, 2 requests a second at each: 360 of 400 a minute."""
    watched, who = Watched(store), caller(requests_per_minute=400, requests_per_day=2000, tokens_per_day=100_000)

    async def go():
        alive, reached = gateways(watched, clock), 0
        for second in range(180):
            watched.away = 60 <= second < 120
            for quotas in alive:
                for _ in range(2):
                    (await quotas.admit(who, 30)).settle(20)
                    reached += 1
            await tick(*alive)
            assert all(quotas.degraded is watched.away for quotas in alive)
            clock.now += 1
        for quotas in alive:
            await quotas.close()
        fresh = Quotas(store, 3, clock)
        assert await admitted(fresh, who, 1)
        assert remaining(fresh, who, "tokens") == 100_000 - reached * 20 - 1

    run(go())


def test_while_the_store_is_away_each_gateway_gives_its_share_of_what_was_left(store, clock):
    watched, who = Watched(store), caller(requests_per_day=300)

    async def go():
        alive = gateways(watched, clock)
        for quotas in alive:
            assert await admitted_of(quotas, who, 30) == 30
        await tick(*alive)
        clock.now += REFRESH_S
        await tick(*alive)
        watched.away = True
        given = [await admitted_of(quotas, who, 300) for quotas in alive]
        assert sum(given) <= 210 + one_lease(300)
        assert min(given) >= 60
        clock.now += AWAY_S + 1
        with pytest.raises(UnavailableError):
            await alive[0].admit(who)
        watched.away = False
        clock.now = window_end("requests_per_day", clock.now)
        await tick(*alive)
        assert await admitted(alive[0], who)
        assert not alive[0].degraded

    run(go())


def test_a_store_that_hangs_is_waited_for_by_nobody_for_long(file, clock, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_S", 0.05)
    watched, who = Watched(file), caller(requests_per_minute=100, requests_per_day=1000)

    async def go():
        quotas = Quotas(watched, 2, clock)
        watched.go_on.clear()
        assert await admitted_of(quotas, who, 50) == 50  # half of the limit: there are two
        assert not await admitted(quotas, who)
        assert quotas.degraded
        assert watched.asked == 1
        watched.go_on.set()
        await quotas._leases.settled()
        assert not quotas.degraded
        monkeypatch.setattr(leases, "PATIENCE_S", 60.0)
        assert await admitted_of(quotas, who, 100) == 50

    run(go())


def test_leases_that_hold_nothing_are_forgotten_and_what_is_settled_late_counts(file, clock, monkeypatch):
    monkeypatch.setattr(leases, "MAX_LEASES", 50)

    async def go():
        quotas, who = Quotas(file, clock=clock), caller("late", tokens_per_day=1000)
        ticket = await quotas.admit(who, 500)
        for number in range(200):
            await quotas.admit(caller(f"tenant-{number}", tokens_per_day=5), 1)
            clock.now += LEASE_S
            await tick(quotas)
        assert len(quotas._leases) <= 52
        ticket.settle(100)
        await tick(quotas)
        assert not await admitted(quotas, who, 901)
        assert await admitted(quotas, who, 900)

    run(go())


def test_over_http_a_database_that_is_away_costs_no_request_of_a_known_key_within_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE_S", 60.0)
    database, elsewhere = tmp_path / "pedro.db", tmp_path / "elsewhere"
    with contextlib.ExitStack() as running:
        settings = GatewaySettings(gateways=3)
        alive = [running.enter_context(serve(tmp_path, settings=settings)) for _ in range(3)]
        alive[0].store.set_quota(tenant="acme", requests_per_minute=600, tokens_per_day=3000)
        key = alive[0].key("acme")
        clients = [gateway.client(key) for gateway in alive]

        def ask(client):
            return client.completions.with_raw_response.create(model=BACKBONE, prompt=[1, 2], max_tokens=3)

        for client in clients:
            ask(client)
        elsewhere.mkdir()
        for file in tmp_path.glob("pedro.db*"):
            file.rename(elsewhere / file.name)
        for _ in range(30):
            for client in clients:
                ask(client)
        with alive[0].http() as anybody:
            assert anybody.get("/ready").json() == {"status": "degraded"}
        for file in elsewhere.iterdir():
            file.rename(tmp_path / file.name)
        assert database.is_file()
        with alive[0].http() as anybody:
            deadline = time.monotonic() + 60
            while anybody.get("/ready").json() != {"status": "ready"}:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert int(ask(clients[0]).headers["x-ratelimit-remaining-tokens"]) <= 3000 - 31 * 5
