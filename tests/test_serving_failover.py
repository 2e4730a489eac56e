"""Requests that take replicas down, and what they cost others: suspicion, setting aside, deadlines. A real replica."""

import asyncio

import pytest
from serving_connections import LocalConnection
from serving_ingress import answer, call, fingerprint, idle, ingress, run, text_call, until, waiting_apart

from pedro.errors import (
    DeadlineError,
    UnavailableError,
)
from pedro.serving import failover, router
from pedro.serving.protocol import ReplicaLost


@pytest.fixture
def served(shared_replica):
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    return shared_replica


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
