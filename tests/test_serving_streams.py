"""One long-lived stream a replica: what it carries, what breaks it, and who answers then. A real replica in process."""

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from serving_adapters import tokenizer
from serving_connections import Faulty
from serving_ingress import answer, call, idle, ingress, run, until

from pedro.engine.request import Request
from pedro.engine.sequence import Output
from pedro.errors import (
    PedroError,
    UnavailableError,
)
from pedro.serving.outputs import DeltaBuilder, OutputStream
from pedro.serving.protocol import LONGEST_SLICE_S, SLICE_S, ReplicaLost, slice_s


@pytest.fixture
def served(shared_replica):
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    return shared_replica


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
            await until(lambda: at.connections["r0"].streams == 2)
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
            whole, _, _ = await answer(at.backend, call(max_tokens=400))
            (busy,) = [name for name, connection in at.connections.items() if connection.submits]
            at.connections[busy].lost_after = 1
            text, _, _ = await answer(at.backend, call(max_tokens=400))
            lost = at.connections[busy].lost.is_set()
            return whole, text, lost, {name: connection.submits for name, connection in at.connections.items()}

    whole, text, lost, posts = run(go())
    assert lost
    assert text == whole
    assert all(posts.values()), "the other one went on"


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
