"""One long-lived stream a replica: what it carries, what breaks it, and who answers then. A real replica in process."""

import asyncio
import itertools
import json
import logging
import shutil
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from serving_adapters import backbone, make_adapter, register, settings_at, tokenizer
from serving_connections import Faulty, LocalConnection

from pedro.engine.sequence import Output, Request
from pedro.errors import (
    AdapterUnusableError,
    ConflictError,
    DeadlineError,
    NotFoundError,
    PedroError,
    ScopeError,
    UnavailableError,
    model_not_found,
)
from pedro.gateway.backend import ALL_TENANTS, GenerateCall
from pedro.methods.adapter_files import read_manifest, write_manifest
from pedro.registry import Registry
from pedro.serving import failover, router
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.outputs import DeltaBuilder, OutputStream
from pedro.serving.protocol import LONGEST_SLICE_S, SLICE_S, ReplicaLost, slice_s
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Actor, AuditQuery

_ids = itertools.count()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("streams")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    for seed, name in enumerate(("acme.faq", "acme.faq", "globex.faq"), start=1):
        make_adapter(folder / str(seed), seed, "completion")
        register(registry, folder / str(seed), name)
    replica = ReplicaServer(ServeConfig(max_batch=8), settings, "r0")
    yield SimpleNamespace(replica=replica, registry=registry, folder=folder)
    replica.close()


@asynccontextmanager
async def ingress(served, *names, connection=LocalConnection, timeout_s=600.0):
    """The backend of an ingress whose replicas are `names`: all the one real replica, each reached on its own way."""
    connections = {}
    replicas = ReplicaSet(lambda name: connections.setdefault(name, connection(served.replica)))
    resolver = ModelResolver(served.registry, "stories260K", backbone().digest, 0.05)
    await resolver.refresh()
    replicas.update(names)
    try:
        yield SimpleNamespace(
            backend=ServeBackend("stories260K", 512, resolver, served.registry, replicas, timeout_s),
            replicas=replicas,
            connections=connections,
        )
    finally:
        await replicas.close()


def call(prompt="Once upon a time", model="acme.faq", n=1, tenant="acme", **params):
    params = {"max_tokens": 40, "ignore_eos": True, **params}
    return GenerateCall(f"c{next(_ids)}", tenant, model, prompt=prompt, n=n, params=params)


async def answer(backend, asked):
    """Text and ids of a call's one choice, and how many deltas it came in."""
    async with aclosing(backend.generate(asked)) as deltas:
        got = [delta async for delta in deltas]
    assert got[-1].finish_reason
    return "".join(d.text for d in got), [token for d in got for token in d.token_ids], len(got)


def run(work):
    async def limited():
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


def waiting_apart(at):
    """How many suspected calls wait until another has begun."""
    return len(at.backend._retries._probing._waiters or ())


def idle(served):
    stats = served.replica.stats()
    return stats["slots_free"] == stats["slots"] and not stats["running"]


def test_all_calls_share_one_stream_and_their_tokens_travel_in_slices(served, monkeypatch):
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 0.1)  # of many steps, however slow they are

    async def go():
        async with ingress(served, "r0") as at:
            alone = [await answer(at.backend, call(f"One day {i}")) for i in range(4)]
            connection = at.connections["r0"]
            await until(lambda: not any(map(len, served.replica._streams.values())))
            before, posts = len(connection.batches), len(connection.submits)
            together = await asyncio.gather(*(answer(at.backend, call(f"One day {i}")) for i in range(4)))
            assert [ids for _, ids, _ in together] == [ids for _, ids, _ in alone]
            assert connection.streams == 1
            assert len(connection.submits) - posts < 4, "calls that come together travel together"
            assert len(connection.batches) - before < sum(len(ids) for _, ids, _ in together) / 2
            assert any(len(batch.parts) > 1 for batch in connection.batches[before:])
            return connection.batches

    batches = run(go())
    assert max(batch.load for batch in batches) == max(batch.mine for batch in batches) == 4


def test_the_first_token_leaves_at_once_and_others_wait_for_the_slice_or_the_last(monkeypatch):
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 3600.0)

    async def go():
        stream = OutputStream(lambda: 1, lambda request_id: None)
        stream.open(7, "r", 1, lambda outputs: [output.token_ids for output in outputs])
        async with aclosing(stream.batches()) as batches:
            await anext(batches)
            stream.take([Output("r", token_ids=[1])])
            first = await anext(batches)
            stream.take([Output("r", token_ids=[2])])
            stream.take([Output("r", token_ids=[3], finish_reason="length")])
            return first.parts, (await anext(batches)).parts

    assert run(go()) == (((7, [[1]]),), ((7, [[2], [3]]),))


def test_the_slices_of_many_calls_end_in_turns(monkeypatch):
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 0.12 if calls > 1 else SLICE_S)

    async def go():
        stream = OutputStream(lambda: 1, lambda request_id: None)
        names = [f"r{number}" for number in range(8)]
        for number, name in enumerate(names):
            stream.open(number, name, 1, lambda outputs: [output.token_ids for output in outputs])
        async with aclosing(stream.batches()) as batches:
            await anext(batches)
            stream.take([Output(name, token_ids=[1]) for name in names])
            first = await anext(batches)
            stream.take([Output(name, token_ids=[2]) for name in names])
            return [len(batch.parts) for batch in (first, *[await anext(batches) for _ in range(4)])]

    assert run(go()) == [8, 2, 2, 2, 2]


def test_slices_grow_with_the_calls_that_share_them():
    assert slice_s(1) == SLICE_S
    assert SLICE_S < slice_s(32) < slice_s(48) < LONGEST_SLICE_S == slice_s(1000)


def test_a_client_that_does_not_read_holds_up_nobody_and_is_ended_in_the_end(served, monkeypatch):
    monkeypatch.setattr("pedro.serving.client.MAX_UNREAD", 3)
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 0.005)

    async def go():
        async with ingress(served, "r0") as at, aclosing(at.backend.generate(call(max_tokens=450))) as unread:
            await anext(unread)
            _, others, _ = await answer(at.backend, call(max_tokens=60))
            assert len(others) == 60
            await until(lambda: idle(served))
            received, error = await rest(unread)
            assert error.code == "client_too_slow"
            assert 0 < len(received) < 449

    run(go())


async def rest(deltas):
    """The token ids that still come, and the error in which they end."""
    received = []
    try:
        async for delta in deltas:
            received += delta.token_ids
    except PedroError as error:
        return received, error
    return received, None


def test_a_broken_stream_is_opened_again_and_its_calls_go_on_from_where_they_were(served):
    async def go():
        async with ingress(served, "r0") as at:
            whole, _, _ = await answer(at.backend, call(max_tokens=300, temperature=1.0, seed=7))
            received = []
            async with aclosing(at.backend.generate(call(max_tokens=300, temperature=1.0, seed=7))) as deltas:
                async for delta in deltas:
                    received.append(delta)
                    if len(received) == 2:
                        at.connections["r0"].broken.set()
            assert at.connections["r0"].streams == 2
            await until(lambda: idle(served))
            return whole, received

    whole, received = run(go())
    assert "".join(delta.text for delta in received) == whole
    assert [delta.finish_reason for delta in received if delta.finish_reason] == ["length"]


FAULTS = [(fault, what) for fault in ("loses", "doubles", "swaps") for what in ("batch", "parts")]


def faulty(fault, what):
    return type("Once", (Faulty,), {"fault": fault, "what": what})


@pytest.mark.parametrize(("fault", "what"), FAULTS)
def test_what_is_lost_doubled_or_swapped_on_the_way_is_made_again_and_never_text(served, fault, what, monkeypatch):
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 0.003)

    async def go():
        asked = {"max_tokens": 200, "temperature": 1.0, "seed": 7}
        async with ingress(served, "r0") as at:
            whole, ids, _ = await answer(at.backend, call(**asked))
            echoed, _, _ = await answer(at.backend, replace(call(**asked), echo=True))
        for echo in (False, True):
            async with ingress(served, "r0", connection=faulty(fault, what)) as at:
                text, came, _ = await answer(at.backend, replace(call(**asked), echo=echo))
                assert text == (echoed if echo else whole)
                assert came[-200:] == ids
                assert at.connections["r0"].streams == (2 if what == "batch" else 1)
                assert sum(calls for calls, _ in at.connections["r0"].submits) == 2, "it was issued again"
                await until(lambda: idle(served))

    run(go())


@pytest.mark.parametrize(("fault", "what"), FAULTS)
def test_several_choices_of_which_a_part_is_lost_end_in_an_error(served, fault, what, monkeypatch):
    monkeypatch.setattr("pedro.serving.outputs.slice_s", lambda calls: 0.003)

    async def choices(backend):
        texts, asked = ["", "", ""], call(n=3, max_tokens=200, temperature=1.0, seed=7)
        try:
            async for delta in backend.generate(asked):
                texts[delta.index] += delta.text
        except UnavailableError as error:
            return texts, error.code
        return texts, None

    async def go():
        async with ingress(served, "r0") as at:
            whole, code = await choices(at.backend)
            assert code is None
        async with ingress(served, "r0", connection=faulty(fault, what)) as at:
            begun, code = await choices(at.backend)
            assert code == "replica_lost"
            assert all(right.startswith(text) for right, text in zip(whole, begun, strict=True))
            await until(lambda: idle(served))

    run(go())


def test_beams_that_are_lost_with_their_batch_are_made_again(served):
    async def beams(backend):
        async with aclosing(backend.generate(call(n=2, max_tokens=30, num_beams=3))) as deltas:
            return [(delta.index, delta.text, delta.finish_reason) async for delta in deltas]

    async def go():
        async with ingress(served, "r0") as at:
            whole = await beams(at.backend)
        async with ingress(served, "r0", connection=faulty("loses", "batch")) as at:
            at.connections["r0"].seen = 2  # the first batch that holds anything
            assert await beams(at.backend) == whole
            assert at.connections["r0"].streams == 2

    run(go())


@pytest.mark.parametrize(
    "tokens", [(1, 3), (1, 1), (1, 3, 2, 4), (2,)], ids=["lost", "doubled", "swapped", "first one lost"]
)
def test_outputs_that_are_lost_within_the_replica_end_the_call_as_lost(tokens):
    request = Request("r", [1, 2], n=2)
    builder = DeltaBuilder(tokenizer(), None, request, call(n=2), "m")

    def output(number, index=0):
        return Output("r", index, token_ids=[number], text=str(number), prompt_tokens=2, completion_tokens=number)

    async def go():
        stream = OutputStream(lambda: 1, lambda request_id: None)
        stream.open(7, "r", 2, builder)
        async with aclosing(stream.batches()) as batches:
            await anext(batches)
            stream.take([output(1, index=1)])
            ((_, deltas),) = (await anext(batches)).parts
            assert [delta.text for delta in deltas] == ["1"]
            stream.take([output(number) for number in tokens])
            ((number, error),) = (await anext(batches)).parts
            return number, error, len(stream)

    number, error, unfinished = run(go())
    assert (number, unfinished) == (7, 0)
    assert isinstance(error, ReplicaLost)


class Interrupted(dict):
    """Whoever takes something out of it is interrupted, so that other threads have a turn then."""

    def pop(self, *key):
        value = super().pop(*key)
        time.sleep(0.002)
        return value


def test_two_ingresses_on_one_replica_lose_no_output_whenever_the_engines_thread_has_its_turn(served, caplog):
    async def go():
        async with ingress(served, "r0") as one, ingress(served, "r0") as other:
            prompts = [f"{i} cats" for i in range(3)]
            alone = [(await answer(one.backend, call(prompt, max_tokens=200)))[0] for prompt in prompts]
            for stream in served.replica._streams.values():
                stream._calls = Interrupted()
            asked = [answer(at.backend, call(p, max_tokens=200)) for at in (one, other) for p in prompts]
            assert [text for text, _, _ in await asyncio.gather(*asked)] == alone * 2

    with caplog.at_level(logging.WARNING, "pedro.serving"):
        run(go())
    assert not caplog.messages, "nothing had to be made again"


def test_a_lost_replicas_calls_go_on_at_another(served):
    async def go():
        async with ingress(served, "r0", "r1") as at:
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            whole, _, _ = await answer(at.backend, call(max_tokens=200))
            received = []
            async with aclosing(at.backend.generate(call(max_tokens=200))) as deltas:
                async for delta in deltas:
                    received.append(delta)
                    if len(received) == 2:
                        (busy,) = [name for name, client in at.replicas._clients.items() if client.load]
                        at.connections[busy].lost.set()
            return whole, received, busy, {name: connection.submits for name, connection in at.connections.items()}

    whole, received, busy, posts = run(go())
    assert "".join(delta.text for delta in received) == whole
    assert all(posts.values()), f"{busy} was lost: the other one went on"


def test_a_call_whose_replicas_are_lost_again_and_again_is_a_503(served):
    async def go():
        async with ingress(served, "r0") as at:
            error = None
            try:
                async for _ in at.backend.generate(call(max_tokens=400)):
                    at.connections["r0"].broken.set()
            except UnavailableError as caught:
                error = caught
            assert error is not None
            assert error.code == "replica_lost"
            await until(lambda: idle(served))

    run(go())


def test_a_replica_that_leaves_finishes_its_calls_and_gets_no_more(served):
    async def go():
        async with ingress(served, "r0") as at:
            async with aclosing(at.backend.generate(call(max_tokens=60))) as deltas:
                await anext(deltas)
                leaving = at.replicas._clients["r0"]
                at.replicas.update(["r1"])
                await until(lambda: at.replicas.ready)
                await answer(at.backend, call(max_tokens=3))
                assert [calls for calls, _ in at.connections["r0"].submits] == [1]
                assert not leaving.closed
                rest = [delta async for delta in deltas]
            assert rest[-1].finish_reason == "length"
            await until(lambda: leaving.closed)
            assert at.connections["r0"].streams == 1
            at.replicas.update(["r0", "r1"])
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            assert at.connections["r0"].streams == 2

    run(go())


def test_where_there_is_no_replica_a_call_waits_for_one_but_not_for_ever(served, monkeypatch):
    async def go():
        async with ingress(served) as at:
            assert not await at.backend.ready()
            waiting = asyncio.create_task(answer(at.backend, call(max_tokens=3)))
            await asyncio.sleep(0.02)
            at.replicas.update(["r0"])
            assert (await waiting)[1]
            assert await at.backend.ready()
            at.replicas.update([])
            monkeypatch.setattr("pedro.serving.router.PATIENCE_S", 0.02)
            with pytest.raises(UnavailableError, match="no engine replica"):
                await answer(at.backend, call(max_tokens=3))

    run(go())


def test_a_hot_adapter_is_served_by_every_replica_once_its_load_asks_for_it(served):
    async def go():
        async with ingress(served, "r0", "r1") as at:
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            await asyncio.gather(*(answer(at.backend, call(f"{i} cats", max_tokens=20)) for i in range(8)))
            hot = {name: sum(calls for calls, _ in connection.submits) for name, connection in at.connections.items()}
            for _ in range(4):
                await answer(at.backend, call(max_tokens=2))
            after = {name: sum(calls for calls, _ in connection.submits) for name, connection in at.connections.items()}
            return hot, sorted(after[name] - hot[name] for name in hot)

    hot, one_by_one = run(go())
    assert min(hot.values()) >= 3
    assert one_by_one == [0, 4], "without load it stays at home"


def test_leaving_early_frees_the_slot_and_an_unsubmitted_call_is_never_heard_of(served):
    async def go():
        async with ingress(served, "r0") as at:
            stream = at.backend.generate(call(max_tokens=450))
            await anext(stream)
            assert not idle(served)
            await stream.aclose()
            await until(lambda: idle(served))
            posts = len(at.connections["r0"].submits)
            task = asyncio.create_task(answer(at.backend, call(max_tokens=450)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.05)
            await until(lambda: idle(served))
            later = at.connections["r0"].submits[posts:]
            assert sum(started for started, _ in later) == sum(ended for _, ended in later)

    run(go())


# texts and adapters


def test_tokenize_gives_the_ids_that_generate_would_use_and_detokenize_reads_them_back(served):
    async def go():
        async with ingress(served, "r0") as at:
            backend = at.backend
            with_special = await backend.tokenize("acme", None, "One day", True)
            plain = await backend.tokenize("acme", "acme.faq", "One day", False)
            chat = await backend.tokenize("acme", "acme.faq", ({"role": "user", "content": "One day"},), True)
            assert list(with_special.ids) == tokenizer()("One day").input_ids
            assert list(plain.ids) == tokenizer()("One day", add_special_tokens=False).input_ids
            assert chat.ids == with_special.ids, "this adapter was trained on raw prompts"
            assert (with_special.max_model_len, len(with_special.token_strs)) == (512, len(with_special.ids))
            assert await backend.detokenize("acme", None, plain.ids) == "One day"
            assert await backend.detokenize("acme", None, with_special.ids) == "<s> One day"
            with pytest.raises(PedroError, match="512"):
                await backend.detokenize("acme", None, (512,))
            with pytest.raises(NotFoundError):
                await backend.tokenize("acme", "globex.faq", "One day", True)
            info = await backend.tokenizer_info()
            assert (info["bos_token"], info["eos_token"]) == (tokenizer().bos_token, tokenizer().eos_token)
            assert "/" not in str(info["tokenizer_class"])
            assert not any("path" in key or "file" in key for key in info)

    run(go())


def test_operators_load_pin_unpin_and_unload_on_every_replica(served):
    async def go():
        async with ingress(served, "r0") as at:
            backend = at.backend
            await backend.unload_adapter(ALL_TENANTS, "globex.faq")
            (loaded,) = await backend.load_adapter(ALL_TENANTS, "globex.faq")
            assert (loaded.name, loaded.version, loaded.replica, loaded.state) == ("globex.faq", 1, "r0", "ready")
            assert (loaded.pinned, loaded.uses, loaded.bytes > 0) == (False, 0, True)
            (pinned,) = await backend.pin_adapter("globex", "globex.faq@champion")
            assert pinned.pinned
            assert pinned in await backend.residents("globex")
            assert "globex.faq" not in {at.name for at in await backend.residents("acme")}
            (unpinned,) = await backend.unpin_adapter("globex", "globex.faq:1")
            assert not unpinned.pinned
            await backend.pin_adapter("globex", "globex.faq")
            assert await backend.unload_adapter("globex", "globex.faq") == []
            with pytest.raises(NotFoundError):
                await backend.pin_adapter("acme", "globex.faq")
            with pytest.raises(ScopeError):
                await backend.load_adapter(ALL_TENANTS, "stories260K")
            with pytest.raises(ScopeError):
                await backend.promote(ALL_TENANTS, "stories260K", 1)
            for tenant, name in ((ALL_TENANTS, "nonsense"), ("acme", "globex.faq"), (ALL_TENANTS, "acme.none")):
                with pytest.raises(NotFoundError):
                    await backend.promote(tenant, name, 1)
                with pytest.raises(NotFoundError):
                    await backend.rollback(tenant, name)
            at.replicas.update([])
            for act in (backend.load_adapter, backend.pin_adapter):
                with pytest.raises(UnavailableError) as caught:
                    await act("globex", "globex.faq")
                assert caught.value.code == "no_replica", "nothing was loaded anywhere"

    run(go())


def test_pins_beyond_the_budget_are_refused_with_the_numbers(served):
    async def go():
        async with ingress(served, "r0") as at:
            (first,) = await at.backend.pin_adapter("acme", "acme.faq:1")
            await at.backend.load_adapter("acme", "acme.faq:2")
            pool = served.replica._engine.adapters
            budget, pool.budget_bytes = pool.budget_bytes, first.bytes + 1
            try:
                with pytest.raises(ConflictError, match="pinned adapters hold") as caught:
                    await at.backend.pin_adapter("acme", "acme.faq:2")
                assert (caught.value.status, caught.value.code) == (409, "adapter_budget")
            finally:
                pool.budget_bytes = budget
                await at.backend.unpin_adapter("acme", "acme.faq:1")

    run(go())


def test_one_adapter_is_shown_with_its_versions_and_a_foreign_one_is_not_found(served):
    async def go():
        async with ingress(served, "r0") as at:
            card = await at.backend.get_adapter("acme", "acme.faq")
            assert [version.version for version in card.versions] == [2, 1]
            for tenant, name in (("acme", "globex.faq"), ("acme", "acme.none"), (ALL_TENANTS, "nonsense")):
                with pytest.raises(NotFoundError) as caught:
                    await at.backend.get_adapter(tenant, name)
                assert caught.value.code == "model_not_found"

    run(go())


def test_metrics_tell_what_was_served_by_replica_and_adapter(served):
    async def go():
        async with ingress(served, "r0") as at:
            await answer(at.backend, call(max_tokens=5))
            return await at.backend.metrics()

    text = run(go())
    assert 'pedro_requests_total{adapter="acme.faq",finish_reason="length",replica="r0"}' in text
    assert 'pedro_adapters_resident{replica="r0"}' in text


def text_call(prompt, model="acme.faq", **fields):
    return replace(call(prompt, model, max_tokens=4), **fields)


async def fingerprint(backend, asked):
    async with aclosing(backend.generate(asked)) as deltas:
        return [delta.fingerprint async for delta in deltas][-1].partition("#")[0]


def damaged(served, name):
    """A version whose weights are not those that were registered."""
    version = register(served.registry, served.folder / "1", name, promote=False)
    for path in served.folder.glob(f"home/artifacts/**/{version.run_id}/**/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    return version


def test_a_champion_that_cannot_be_loaded_leaves_the_last_good_version_on_the_air_and_operators_are_told(served):
    register(served.registry, served.folder / "1", "acme.mine")

    async def go():
        async with ingress(served, "r0") as at:
            assert await fingerprint(at.backend, text_call("a", "acme.mine")) == "acme.mine:1"
            for number in (2, 3):  # the second time, `previous` is one that cannot be served
                version = damaged(served, "acme.mine")
                served.registry.promote("acme.mine", version.version)  # as a writer may that opens nothing
                await at.backend._resolver.refresh()
                for name in ("acme.mine", "acme.mine", "acme.mine@champion"):
                    if number == 2 or name == "acme.mine":
                        assert await fingerprint(at.backend, text_call("a", name)) == "acme.mine:1"
                with pytest.raises(AdapterUnusableError, match=f"acme.mine:{number} cannot be served") as caught:
                    await answer(at.backend, text_call("a", f"acme.mine:{number}"))
                assert (caught.value.status, caught.value.type) == (500, "server_error")
            card = await at.backend.get_adapter("acme", "acme.mine")
            assert [("damaged" in (v.fault or ""), v.version) for v in card.versions] == [(1, 3), (1, 2), (0, 1)]
            assert "pedro_adapter_versions_set_aside 2" in await at.backend.metrics()

    run(go())


def test_a_canary_that_cannot_be_served_is_withdrawn_by_one_of_two_gateways_and_no_request_fails(served):
    name = "acme.split"
    register(served.registry, served.folder / "1", name)
    canary = damaged(served, name)
    served.registry.canary(name, canary.version, 0.5)

    async def go():
        async with ingress(served, "r0") as one, ingress(served, "r0") as other:
            gateways = [one.backend, other.backend]
            for number in range(130):
                asked = replace(text_call("a", name), user=f"user {number}", params={"max_tokens": 1})
                assert await fingerprint(gateways[number % 2], asked) == f"{name}:1"
            await asyncio.gather(*(backend._canaries.flush() for backend in gateways))
            assert served.registry.store.get_adapter(name).standing.canary is None
            withdrawn = [m for m in served.registry.store.alias_history(name) if m.action == "withdraw"]
            assert len(withdrawn) == 1
            for backend in gateways:
                assert await fingerprint(backend, text_call("a", name)) == f"{name}:1"

    run(go())


def plant(served, version, how):
    """Give a registered version other files in the artifact store, their digests in order."""
    (directory,) = served.folder.glob(f"home/artifacts/*/{version.run_id}/artifacts/adapter")
    if how == "another adapter":
        shutil.rmtree(directory)
        shutil.copytree(served.folder / "3", directory)
        return
    manifest = read_manifest(directory)
    if how == "weights":
        shutil.copy(served.folder / "3" / "adapter_model.safetensors", directory)
    elif how == "template":
        manifest["prompt_format"]["template"] = "Ignore them. " + manifest["prompt_format"]["template"]
    elif how == "template, its digest left out":
        manifest["prompt_format"]["template"] = "Ignore them. " + manifest["prompt_format"]["template"]
        del manifest["manifest_digest"]
        (directory / "pedro_adapter.json").write_text(json.dumps(manifest))
        return
    write_manifest(directory, manifest)


@pytest.mark.parametrize("how", ["weights", "template", "template, its digest left out", "another adapter"])
def test_who_can_write_artifacts_alone_plants_nothing_and_the_last_good_version_answers(served, how):
    name = f"acme.{how.replace(' ', '-').replace(',', '')}"
    register(served.registry, served.folder / "1", name)

    async def go():
        async with ingress(served, "r0") as at:
            assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
            version = register(served.registry, served.folder / "2", name)
            plant(served, version, how)
            await at.backend._resolver.refresh()
            assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
            with pytest.raises(AdapterUnusableError, match=f"{name}:2 cannot be served"):
                await answer(at.backend, text_call("a", f"{name}:2"))

    run(go())


def test_without_a_version_that_worked_the_failure_is_ours_and_said_so(served):
    version = damaged(served, "acme.never")
    served.registry.promote("acme.never", version.version)

    async def go():
        async with ingress(served, "r0") as at:
            for _ in range(2):
                with pytest.raises(AdapterUnusableError):
                    await answer(at.backend, text_call("a", "acme.never"))

    run(go())


class Mortal(LocalConnection):
    """Dies of the prompt "kill"."""

    async def submit(self, stream_id, requests, cancelled):
        if any(request.call.prompt == "kill" for request in requests):
            self.killed = True
            self.lost.set()
        await super().submit(stream_id, requests, cancelled)


def test_a_request_that_kills_replicas_is_issued_twice_at_most_and_its_adapter_alone_is_set_aside(served):
    async def go():
        async with ingress(served, "r0", "r1", "r2", connection=Mortal) as at:
            long = asyncio.create_task(answer(at.backend, call("Once", "globex.faq", tenant="globex", max_tokens=200)))
            with pytest.raises(UnavailableError) as caught:
                await answer(at.backend, text_call("kill"))
            assert caught.value.code == "replica_lost"
            assert sum(hasattr(connection, "killed") for connection in at.connections.values()) == 2
            assert await fingerprint(at.backend, text_call("a")) == "acme.faq:1"  # the former champion
            with pytest.raises(UnavailableError, match="is set aside") as caught:
                await answer(at.backend, text_call("a", "acme.faq:2"))
            assert caught.value.code == "adapter_quarantined"
            _, ids, _ = await long
            assert len(ids) == 200
            assert await fingerprint(at.backend, text_call("a", "globex.faq", tenant="globex")) == "globex.faq:1"
            card = await at.backend.get_adapter("acme", "acme.faq")
            assert "set aside" in card.versions[0].fault

    run(go())


def test_once_a_version_is_suspected_its_calls_take_one_more_replica_down_however_many_they_are(served):
    async def go():
        async with ingress(served, "r0", "r1", "r2", "r3", "r4", "r5", connection=Mortal) as at:

            def killed():
                return sum(hasattr(connection, "killed") for connection in at.connections.values())

            async with at.backend._retries._probing:  # while another is suspected
                calls = [asyncio.create_task(answer(at.backend, text_call("kill", "acme.faq:2"))) for _ in range(3)]
                await until(lambda: waiting_apart(at) == 3)
                at_once = killed()  # as many as the calls were spread over before any was lost
                assert 1 <= at_once <= 3
                calls += [asyncio.create_task(answer(at.backend, text_call("kill", "acme.faq:2"))) for _ in range(3)]
                await until(lambda: waiting_apart(at) == 6)
                assert killed() == at_once
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert {error.code for error in errors} == {"replica_lost"}
            assert killed() == at_once + 1

    run(go())


def test_a_suspected_call_of_the_backbone_is_tried_again_apart_from_others(served):
    async def go():
        async with ingress(served, "r0", "r1", "r2", connection=Mortal) as at:

            def killed():
                return sum(hasattr(connection, "killed") for connection in at.connections.values())

            async with at.backend._retries._probing:  # while another is suspected
                calling = asyncio.create_task(answer(at.backend, text_call("kill", "stories260K")))
                await until(lambda: waiting_apart(at) == 1)
                assert killed() == 1
            (error,) = await asyncio.gather(calling, return_exceptions=True)
            assert error.code == "replica_lost"
            assert killed() == 2

    run(go())


class Stuck(LocalConnection):
    """Calls with one of the `prompts` wait here without end. `dead` set: none is taken, though the stream lives on."""

    prompts: tuple[str, ...] = ("stick",)
    dead = False

    def __init__(self, replica):
        super().__init__(replica)
        self.stuck = []

    async def submit(self, stream_id, requests, cancelled):
        if self.dead:
            raise ReplicaLost("dead")
        sticks = [request for request in requests if request.call.prompt in self.prompts]
        self.stuck += sticks
        await super().submit(stream_id, [request for request in requests if request not in sticks], cancelled)


def in_order(monkeypatch):
    """Calls go to the first replica by name that may have them."""
    monkeypatch.setattr(router, "choose", lambda ref, loads: min(loads))


async def suspected(at, tenant, model):
    version = await at.backend._resolver.resolve(tenant, model)
    return at.backend._faults.suspected(version.model_ref)


def test_replicas_that_were_to_leave_are_no_evidence_against_what_ran_there(served, monkeypatch):
    in_order(monkeypatch)

    async def go():
        async with ingress(served, "r0", "r1", "r2", connection=Stuck) as at:
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            at.connections["r2"].prompts = ()
            calling = asyncio.create_task(fingerprint(at.backend, text_call("stick")))
            for lost, left in (("r0", ["r1", "r2"]), ("r1", ["r2"])):
                await until(lambda lost=lost: at.connections[lost].stuck)
                at.replicas.update(left)
                at.connections[lost].lost.set()
            assert await calling == "acme.faq:2"
            assert not await suspected(at, "acme", "acme.faq:2")
            assert await fingerprint(at.backend, text_call("a")) == "acme.faq:2"

    run(go())


def test_replicas_that_die_at_once_are_no_evidence_against_a_call_that_ran_on_one(served, monkeypatch):
    in_order(monkeypatch)

    async def go():
        async with ingress(served, "r0", "r1", "r2", connection=Stuck) as at:
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            for name in ("r1", "r2"):
                at.connections[name].prompts = ()
            calling = asyncio.create_task(fingerprint(at.backend, text_call("stick")))
            await until(lambda: at.connections["r0"].stuck)
            at.connections["r1"].dead = True  # and its stream will tell later
            at.connections["r0"].lost.set()
            assert await calling == "acme.faq:2"
            assert sum(calls for calls, _ in at.connections["r2"].submits) == 1
            assert not await suspected(at, "acme", "acme.faq:2")

    run(go())


def test_a_suspected_version_is_not_tried_where_anothers_call_may_take_the_replica_down(served, monkeypatch):
    in_order(monkeypatch)

    async def go():
        async with ingress(served, "r1", connection=Stuck) as at:
            poison = [asyncio.create_task(answer(at.backend, text_call("stick")))]
            await until(lambda: at.connections["r1"].stuck)
            at.replicas.update(["r0", "r1"])
            await until(lambda: all(client.ready for client in at.replicas._clients.values()))
            poison.append(asyncio.create_task(answer(at.backend, text_call("stick"))))
            await until(lambda: at.connections["r0"].stuck)
            other = text_call("stick", "globex.faq", tenant="globex")
            innocent = asyncio.create_task(fingerprint(at.backend, other))
            await until(lambda: len(at.connections["r0"].stuck) == 2)
            async with at.backend._retries._probing:
                at.connections["r0"].lost.set()
                await until(lambda: waiting_apart(at) == 2)
                assert await suspected(at, "acme", "acme.faq")
                assert await suspected(at, "globex", "globex.faq")
                poison[1].cancel()  # so that the next to be tried is the other
            await asyncio.sleep(0.2)
            assert len(at.connections["r1"].stuck) == 1, "not beside the one that is stuck there"
            at.replicas.update(["r1", "r2"])
            at.connections["r2"].prompts = ()
            assert await innocent == "globex.faq:1"
            poison[0].cancel()
            await asyncio.gather(*poison, return_exceptions=True)

    run(go())


def test_a_call_that_never_reached_its_replica_is_not_suspected(served):
    async def go():
        async with ingress(served, "r0") as at:
            await until(lambda: at.replicas.ready)
            served.replica._streams.clear()  # it knows nothing of its streams any more
            async with at.backend._retries._probing, asyncio.timeout(60):  # while another is suspected
                assert await fingerprint(at.backend, text_call("a")) == "acme.faq:2"

    run(go())


def test_a_call_that_waits_while_another_is_suspected_ends_at_its_deadline(served):
    async def go():
        async with ingress(served, "r0", "r1", connection=Mortal, timeout_s=0.5) as at:
            await at.backend._retries._probing.acquire()
            with pytest.raises(DeadlineError):
                async with asyncio.timeout(60):
                    await answer(at.backend, text_call("kill"))

    run(go())


class Silent(LocalConnection):
    """Never takes the prompt "hang"."""

    async def submit(self, stream_id, requests, cancelled):
        await super().submit(stream_id, [request for request in requests if request.call.prompt != "hang"], cancelled)


def test_a_suspected_version_that_hangs_keeps_other_tenants_apart_for_a_bounded_time(served, monkeypatch):
    monkeypatch.setattr(failover, "PROBE_S", 0.2)

    async def go():
        async with ingress(served, "r0", connection=Silent) as at:
            for tenant in ("acme", "globex"):
                version = await at.backend._resolver.resolve(tenant, f"{tenant}.faq")
                at.backend._faults.suspect(version.model_ref)
            hanging = asyncio.create_task(answer(at.backend, text_call("hang")))
            await until(at.backend._retries._probing.locked)
            async with asyncio.timeout(60):
                mine = text_call("a", "globex.faq", tenant="globex", timeout_s=60.0)
                assert await fingerprint(at.backend, mine) == "globex.faq:1"
            assert not hanging.done()
            hanging.cancel()

    run(go())


@pytest.mark.parametrize(("asked_s", "default_s"), [(0.2, 600.0), (None, 0.2), (600.0, 0.2)])
def test_a_request_ends_at_its_deadline_and_leaves_the_engine(served, asked_s, default_s):
    async def go():
        async with ingress(served, "r0", timeout_s=default_s) as at:
            with pytest.raises(DeadlineError) as caught:
                await answer(
                    at.backend,
                    text_call(
                        "a",
                        "stories260K",
                        timeout_s=asked_s,
                        params={"max_tokens": 500, "num_beams": 8, "ignore_eos": True},
                    ),
                )
            await until(lambda: idle(served))
            return caught.value

    error = run(go())
    assert (error.status, error.code, error.type) == (504, "deadline_exceeded", "timeout_error")


def test_a_version_that_no_replica_can_load_does_not_become_champion(served):
    make_adapter(served.folder / "good", 4, "completion")
    make_adapter(served.folder / "alien", 5, "completion", digest="sha256:another")
    for made in ("alien", "good", "alien"):
        register(served.registry, served.folder / made, "acme.moves", promote=made == "good")
    served.registry.set_alias("acme.moves", "previous", 1)

    async def go():
        async with ingress(served, "r0") as at:
            for move in (at.backend.promote("acme", "acme.moves", 3), at.backend.rollback("acme", "acme.moves")):
                with pytest.raises(ConflictError, match=r"acme.moves:[13] cannot be served.*another.* become champion"):
                    await move
            assert served.registry.catalog()["acme.moves"].aliases == {"champion": 2, "previous": 1}
            card = await at.backend.promote("acme", "acme.moves", 2)
            assert card.aliases["champion"] == 2

    run(go())


def test_a_tenants_moves_are_entered_in_the_name_of_its_key_and_stay_within_its_own(served):
    make_adapter(served.folder / "owned", 6, "completion")
    for promote in (True, False, False):
        register(served.registry, served.folder / "owned", "acme.owned", promote=promote)
    actor = Actor.of_key("acme", "key_1", "req_1")

    async def go():
        async with ingress(served, "r0") as at:
            name, backend = "acme.owned", at.backend
            card = await backend.set_canary("acme", name, 2, 0.5, actor=actor)
            assert card.canary == {"version": 2, "weight": 0.5}
            (listed,) = [one for one in await backend.list_adapters("acme") if one.name == name]
            assert listed == card
            with pytest.raises(ConflictError):
                await backend.promote("acme", name, 2, expected=3, actor=actor)
            assert (await backend.promote("acme", name, 2, expected=1, actor=actor)).canary is None
            await backend.rollback("acme", name, actor=actor)
            with pytest.raises(ConflictError, match="champion"):
                await backend.delete_version("acme", name, 1, actor=actor)
            with pytest.raises(ConflictError, match=f"{name}:2 is previous; give that to another version first"):
                await backend.delete_version("acme", name, 2, unused=True, actor=actor)
            await backend.set_canary("acme", name, 3, 0.5, actor=actor)
            with pytest.raises(ConflictError, match=f"{name}:3 is canary"):
                await backend.delete_version("acme", name, 3, unused=True, actor=actor)
            await backend.set_canary("acme", name, 3, 0, actor=actor)
            await backend.delete_version("acme", name, 3, unused=True, actor=actor)
            await backend.delete_version("acme", name, 2, actor=actor)
            with pytest.raises(NotFoundError):
                await backend.get_model("acme", f"{name}:3")
            for move in (backend.set_canary("globex", name, 2, 0.5), backend.delete_version("globex", name, 2)):
                with pytest.raises(NotFoundError) as caught:
                    await move
                assert caught.value.body() == model_not_found(name).body()

    before = served.registry.store.list_audit(limit=1)[0].id
    run(go())
    entries = served.registry.store.find_audit(AuditQuery(above=before))
    assert [(entry.action, entry.subject, entry.actor, entry.request_id) for entry in entries] == [
        (f"adapter.{move}", "acme.owned", "key:acme/key_1", "req_1")
        for move in ("canary", "promote", "rollback", "canary", "canary", "retire", "delete")
    ]
    assert [move.actor for move in served.registry.store.alias_history("acme.owned", 4)] == ["key:acme/key_1"] * 4
