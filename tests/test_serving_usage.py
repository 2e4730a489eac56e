"""The usage ledger equals the engine's own count: over HTTP, whatever is asked, and however it ends."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families as parsed
from serving_adapters import backbone, make_adapter, register, settings_at
from serving_connections import LocalConnection

from pedro.errors import PedroError
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.backend import GenerateCall
from pedro.gateway.usage import CallMeter
from pedro.registry import Registry
from pedro.serving import client as replica_client
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.protocol import Spent
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Store

BACKBONE = "stories260K"
GUARD_S = 600
COUNTERS = ("prompt_tokens", "completion_tokens")


@pytest.fixture
def served(request, tmp_path):
    """A fresh replica of 8 slots, or as many as asked for, whose counts are at zero, with adapters of two tenants."""
    torch.set_num_threads(1)
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)
    for seed, name in enumerate(("acme.faq", "globex.faq"), start=1):
        make_adapter(tmp_path / name, seed, "completion")
        register(registry, tmp_path / name, name)
    replica = ReplicaServer(ServeConfig(max_batch=getattr(request, "param", 8)), settings, "r0")
    store = Store(settings.database_url)
    yield SimpleNamespace(replica=replica, registry=registry, store=store)
    store.close()
    replica.close()


@asynccontextmanager
async def ingress(served, connection=LocalConnection):
    """The backend of a gateway in this process, and its connection to the replica."""
    connected = connection(served.replica)
    replicas = ReplicaSet(lambda _: connected)
    resolver = ModelResolver(served.registry, BACKBONE, backbone().digest, 3600.0)
    await resolver.refresh()
    replicas.update(["r0"])
    try:
        yield ServeBackend(BACKBONE, 512, resolver, served.registry, replicas), connected
    finally:
        await replicas.close()


@asynccontextmanager
async def gateway(served):
    """The whole gateway on a port of this machine: its URL and its ledger."""
    async with ingress(served) as (backend, _):
        app = create_app(lambda: backend, served.store, GatewaySettings(write_usage_every_s=0.05))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}", app.state.usage
        finally:
            server.should_exit = True
            await running


class Client:
    """Sends one kind of request after the other, and leaves some answers before their end."""

    def __init__(self, url, keys, seed, at_once):
        self.keys, self.chance = keys, random.Random(seed)
        limits = httpx.Limits(max_connections=2 * at_once, max_keepalive_connections=at_once // 2)
        self.http = httpx.AsyncClient(base_url=url, timeout=GUARD_S, limits=limits)
        self.told: Counter[str] = Counter()  # tokens as whole answers tell them
        self.ends: Counter[str] = Counter()

    def body(self):
        chance = self.chance
        tenant = chance.choice(["acme", "globex"])
        prompt = "Once upon a time " + "there was a girl " * chance.randrange(4)
        body = {
            "model": chance.choice([BACKBONE, f"{tenant}.faq", f"{tenant}.faq", f"{tenant}.faq:1", "acme.unknown"]),
            "max_tokens": chance.choice([1, 2, 4, 8]),
            "temperature": chance.choice([0, 1]),
            "n": chance.choice([1, 1, 1, 1, 1, 1, 1, 2, 2, 11]),  # more than there are slots
            "seed": chance.randrange(1000),
            "ignore_eos": chance.random() < 0.5,
        }
        route = chance.choice(["completions", "completions", "chat/completions"])
        if route == "completions":
            body["prompt"] = chance.choice([prompt, [prompt, "The"], "word " * 600])
            body |= chance.choice([{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "max_tokens": 0}])
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        if chance.random() < 0.1:
            body |= {"use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0, "max_tokens": 6}
            body = {k: v for k, v in body.items() if k not in ("logprobs", "echo")}
        return tenant, f"/v1/{route}", body

    async def one(self):
        tenant, route, body = self.body()
        chance = self.chance
        headers = {"authorization": f"Bearer {chance.choice(self.keys[tenant])}"}
        kind = chance.choice(["whole", "whole", "stream", "leave", "leave at once", "late"])
        if kind in ("stream", "leave", "leave at once") and "use_beam_search" not in body:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if kind.startswith(("leave", "late")) and body["max_tokens"]:
            body |= {"max_tokens": 60, "ignore_eos": True}
        if kind == "late":
            headers["x-request-timeout"] = str(chance.choice([0.02, 0.05, 0.1]))
        if kind == "leave at once":
            with suppress(httpx.TimeoutException):
                await self.http.post(route, json=body, headers=headers, timeout=chance.choice([0.01, 0.05]))
        elif kind == "leave":
            async with self.http.stream("POST", route, json=body, headers=headers) as answer:
                left = chance.randrange(1, 6)
                lines = answer.aiter_lines()
                async for _ in lines:
                    left -= 1
                    if not left:
                        break
                await lines.aclose()
        else:
            answer = await self.http.post(route, json=body, headers=headers)
            kind = f"{kind} {answer.status_code}"
            if answer.status_code == 200 and "stream" not in body:
                self.told.update({name: answer.json()["usage"][name] for name in COUNTERS})
        self.ends[kind] += 1


def metrics(served):
    """Tokens by adapter, as Prometheus is told."""
    found: dict[str, Counter[str]] = {name: Counter() for name in COUNTERS}
    for family in parsed(served.replica._metrics.text()):
        name = family.name.removeprefix("pedro_")
        for sample in family.samples if name in COUNTERS else ():
            found[name][sample.labels["adapter"]] += int(sample.value)
    return found


async def many(served, number, seed, at_once=16):
    """Send them, wait until everything has ended and is written; how they ended."""
    keys = {tenant: [served.store.create_key(tenant, ("infer",)) for _ in range(2)] for tenant in ("acme", "globex")}
    async with asyncio.timeout(GUARD_S), gateway(served) as (url, ledger):
        secrets = {tenant: [secret for _, secret in made] for tenant, made in keys.items()}
        client, free = Client(url, secrets, seed, at_once), asyncio.Semaphore(at_once)

        async def one():
            async with free:
                await client.one()

        async with client.http:
            await asyncio.gather(*(one() for _ in range(number)))
        while ledger._open or ledger.unwritten:
            await asyncio.sleep(0.01)
        stats = served.replica.stats()
        assert stats["slots_free"] == stats["slots"]
    known = {record.id: tenant for tenant, made in keys.items() for record, _ in made}
    assert all(known[used.key_id] == used.tenant for used in served.store.usage()), "a key's usage is its tenant's"
    return client, stats


def check_equal(served, client, stats):
    (total,) = served.store.usage(by=[])
    assert (total.prompt_tokens, total.completion_tokens) == tuple(stats[name] for name in COUNTERS)
    shown = metrics(served)
    for used in served.store.usage(by=["model"]):
        assert used.prompt_tokens == shown["prompt_tokens"][used.model]
        assert used.completion_tokens == shown["completion_tokens"][used.model]
    assert all(getattr(total, name) >= client.told[name] > 0 for name in COUNTERS)
    assert total.cached_tokens == stats["prefixes"]["saved_tokens"] > 0
    assert {"whole 200", "whole 404", "whole 400", "stream 200", "leave", "leave at once"} <= client.ends.keys()


def test_the_ledger_is_the_engines_own_count_over_hundreds_of_mixed_requests(served):
    client, stats = asyncio.run(many(served, 300, seed=1))
    check_equal(served, client, stats)


@pytest.mark.slow
@pytest.mark.parametrize("served", [32], indirect=True)
def test_the_ledger_is_the_engines_own_count_over_five_thousand_requests(served):
    client, stats = asyncio.run(many(served, 5000, seed=2, at_once=64))
    check_equal(served, client, stats)


# one call, however it ends


def call(n=1, **params):
    call = GenerateCall("c1", "acme", "acme.faq", prompt="Once upon a time", n=n, meter=CallMeter())
    return replace(call, params={"max_tokens": 60, "ignore_eos": True, **params})


async def settled(meter):
    async with asyncio.timeout(60):
        while not meter.is_settled:
            await asyncio.sleep(0.005)


async def read(deltas):
    async with aclosing(deltas):
        async for _ in deltas:
            pass


def engine_count(served):
    return tuple(served.replica.stats()[name] for name in COUNTERS)


@pytest.mark.parametrize("n", [1, 3])
def test_a_call_that_is_left_is_told_what_the_engine_made_until_it_ended(served, n):
    async def go():
        asked = call(n, max_tokens=400)
        async with ingress(served) as (backend, _):
            async with aclosing(backend.generate(asked)) as deltas:
                seen = await anext(deltas)
            assert not asked.meter.is_settled, "whoever left does not wait for it"
            await settled(asked.meter)
        return seen, asked.meter

    seen, meter = asyncio.run(go())
    assert meter.model == "acme.faq"
    assert meter.completion_tokens >= seen.completion_tokens
    assert (meter.prompt_tokens, meter.completion_tokens) == engine_count(served)


def test_a_call_whose_time_is_over_is_told_what_its_beams_made_though_no_delta_came(served):
    async def go():
        asked = replace(call(2, num_beams=2, max_tokens=400), timeout_s=0.1)
        async with ingress(served) as (backend, _):
            with pytest.raises(PedroError):
                await read(backend.generate(asked))
            await settled(asked.meter)
        return asked.meter

    meter = asyncio.run(go())
    assert (meter.prompt_tokens, meter.completion_tokens) == engine_count(served)


def test_a_call_that_was_issued_again_counts_once(served):
    async def go():
        asked = call()
        async with ingress(served) as (backend, connected):
            seen = 0
            async with aclosing(backend.generate(asked)) as deltas:
                async for delta in deltas:
                    seen = delta.completion_tokens
                    if connected.streams == 1:
                        connected.broken.set()
            assert connected.streams == 2
            await settled(asked.meter)
        return seen, asked.meter

    seen, meter = asyncio.run(go())
    assert seen == meter.completion_tokens == 60
    assert engine_count(served)[0] == 2 * meter.prompt_tokens, "another engine reads the prompt again"


class Silent(LocalConnection):
    """Never tells what a call used."""

    async def stream(self, stream_id):
        async with aclosing(super().stream(stream_id)) as batches:
            async for batch in batches:
                yield replace(batch, parts=tuple(part for part in batch.parts if not isinstance(part[1], Spent)))


def test_a_count_that_never_comes_is_waited_for_but_not_for_ever(served, monkeypatch):
    monkeypatch.setattr(replica_client, "COUNT_S", 0.05)

    async def go():
        asked = call(max_tokens=400)
        async with ingress(served, Silent) as (backend, _):
            async with aclosing(backend.generate(asked)) as deltas:
                seen = await anext(deltas)
            await settled(asked.meter)
        return seen, asked.meter

    seen, meter = asyncio.run(go())
    assert (meter.prompt_tokens, meter.completion_tokens) == (seen.prompt_tokens, seen.completion_tokens)
