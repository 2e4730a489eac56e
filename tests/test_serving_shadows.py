"""A champion's shadow on a real replica: it is asked too, nobody sees it, and what it does costs nobody anything."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import httpx
import pytest
from serving_adapters import register
from serving_ingress import answer, call, fingerprint, ingress, run, text_call

from pedro.errors import NotFoundError, OverloadedError
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.usage import CallMeter
from pedro.serving import shadows
from pedro.serving.protocol import ReplicaLost
from pedro.store import INFER, ShadowCounts


@pytest.fixture
def served(shared_replica):
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    return shared_replica


def shaded(served, name, other="2", weight=1.0):
    """An adapter whose version 1 is champion and whose version 2, made of the folder `other`, is its shadow."""
    register(served.registry, served.folder / "1", name)
    register(served.registry, served.folder / other, name, promote=False)
    served.registry.shadow(name, 2, weight)
    return name


def counted(served, name):
    """Without the seconds."""
    return replace(served.registry.store.shadow_answers(name), seconds=0.0, champion_seconds=0.0)


@pytest.mark.parametrize(("other", "differs"), [("1", False), ("2", True)])
def test_it_is_asked_what_the_champion_answered_and_how_it_differs_is_counted(served, other, differs):
    name = shaded(served, f"acme.shaded{other}", other)

    async def go():
        async with ingress(served, "r0") as at:
            meter = CallMeter()
            asked = replace(call(model=name), meter=meter)
            alone = await answer(at.backend, replace(asked, request_id="alone", model=f"{name}:1", meter=None))
            assert (await answer(at.backend, asked))[:2] == alone[:2]
            sampled = replace(call(model=name, temperature=1.0, n=2), meter=CallMeter())
            assert await fingerprint(at.backend, sampled) == f"{name}:1"
            used = meter.completion_tokens
            await at.backend._shadows.drain()
            assert (meter.completion_tokens, meter.is_settled, used) == (40, True, 40)
            card = await at.backend.get_adapter("acme", name)
            text = await at.backend.metrics()
            return card, text

    card, text = run(go())
    same, different = (0, 2) if differs else (2, 0)
    assert counted(served, name) == ShadowCounts(same, different)
    kept = served.registry.store.shadow_answers(name)
    assert kept.seconds > 0
    assert kept.champion_seconds > 0
    assert card.shadow == {"version": 2, "weight": 1.0, **kept.to_dict()}
    assert f'pedro_shadow_answers_total{{outcome="{"different" if differs else "same"}"}} 2' in text


def test_what_names_a_version_or_another_alias_or_is_not_of_its_share_is_not_asked_of_it(served):
    name = shaded(served, "acme.part", weight=0.5)
    served.registry.store.set_alias(name, "candidate", 2)

    async def go():
        async with ingress(served, "r0") as at:
            for model in (f"{name}:1", f"{name}@candidate", "acme.faq"):
                await fingerprint(at.backend, text_call("a", model))
            await at.backend._shadows.drain()
            assert counted(served, name) == ShadowCounts()
            asked = [text_call("a", f"{name}@champion") for _ in range(40)]
            for one in asked:
                await fingerprint(at.backend, one)
                if at.backend._shadows._worker is not None:
                    await at.backend._shadows._worker
            await at.backend._shadows.flush()
            shadow, share = at.backend._resolver.shadow_of(await at.backend._resolver.resolve("acme", name))
            wanted = sum(shadows.is_asked_too(one, shadow, share) for one in asked)
            assert 5 < wanted < 35
            assert counted(served, name).different + counted(served, name).same == wanted

    run(go())


def stuck(at, gate, error=None):
    """Have shadows wait for `gate` (and then end in an error) where others are answered."""
    generate, begun = at.replicas.generate, []

    async def only_shadows(asked, ref, *rest):
        if asked.request_id.endswith("~shadow"):
            begun.append(asked)
            await gate.wait()
            if error is not None:
                raise error
        async with aclosing(generate(asked, ref, *rest)) as batches:
            async for batch in batches:
                yield batch

    at.replicas.generate = only_shadows
    return begun


def test_one_that_hangs_holds_up_no_request_and_no_more_than_so_many_wait_for_it(served):
    name = shaded(served, "acme.slow")

    async def go():
        async with ingress(served, "r0") as at:
            gate = asyncio.Event()
            begun = stuck(at, gate)
            for _ in range(shadows.MOST_WAITING + 4):
                assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
                while not begun:
                    await asyncio.sleep(0)
            assert len(begun) == 1, "one at a time"
            gate.set()
            await at.backend._shadows.drain()

    run(go())
    kept = counted(served, name)
    assert (kept.same + kept.different, kept.errors, kept.skipped) == (shadows.MOST_WAITING + 1, 0, 3)


def test_another_tenants_shadows_that_wait_cost_a_tenant_none_of_its_own(served):
    busy, quiet = shaded(served, "acme.busy"), shaded(served, "globex.quiet")

    async def go():
        async with ingress(served, "r0") as at:
            gate = asyncio.Event()
            begun = stuck(at, gate)
            for _ in range(shadows.MOST_WAITING + 2):
                await fingerprint(at.backend, text_call("a", busy))
                while not begun:
                    await asyncio.sleep(0)
            await fingerprint(at.backend, replace(text_call("a", quiet), tenant="globex"))
            gate.set()
            await at.backend._shadows.drain()

    run(go())
    assert (counted(served, busy).skipped, counted(served, quiet).skipped) == (1, 0)
    assert counted(served, quiet).same + counted(served, quiet).different == 1


def test_one_that_takes_too_long_is_an_error_of_its_own(served, monkeypatch):
    name = shaded(served, "acme.endless")
    monkeypatch.setattr(shadows, "LIMIT_S", 0.05)

    async def go():
        async with ingress(served, "r0") as at:
            stuck(at, asyncio.Event())
            assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
            await at.backend._shadows.drain()

    run(go())
    assert counted(served, name) == ShadowCounts(errors=1)


@pytest.mark.parametrize(
    ("what", "error", "counts"),
    [
        ("lost", ReplicaLost("gone"), ShadowCounts(errors=2)),
        ("left", ReplicaLost("left", blameless=True), ShadowCounts(errors=2)),
        ("broken", RuntimeError("broken"), ShadowCounts(errors=2)),
        ("full", OverloadedError("full"), ShadowCounts(skipped=2)),
    ],
)
def test_one_that_fails_fails_alone_and_what_may_have_lost_a_replica_is_asked_no_more(served, what, error, counts):
    name = shaded(served, f"acme.{what}")

    async def go():
        async with ingress(served, "r0") as at:
            gate = asyncio.Event()
            gate.set()
            begun = stuck(at, gate, error)
            for _ in range(2):
                assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
                await at.backend._shadows.drain()
            return len(begun)

    begun = run(go())
    assert counted(served, name) == counts
    assert begun == (1 if what == "lost" else 2)


def test_a_damaged_one_is_set_aside_and_the_champion_goes_on(served):
    name = shaded(served, "acme.damaged")
    (version,) = (one for one in served.registry.versions(name) if one.version == 2)
    for path in served.folder.glob(f"home/artifacts/**/{version.run_id}/**/adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-4] + b"abcd")

    async def go():
        async with ingress(served, "r0") as at:
            for _ in range(2):
                assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
                await at.backend._shadows.drain()
            return [one.fault for one in (await at.backend.get_adapter("acme", name)).versions]

    faults = run(go())
    assert ["damaged" in (fault or "") for fault in faults] == [True, False]
    assert counted(served, name) == ShadowCounts(errors=2)


def test_what_waits_for_one_that_went_is_not_asked(served):
    name = shaded(served, "acme.went")

    async def go():
        async with ingress(served, "r0") as at:
            gate = asyncio.Event()
            begun = stuck(at, gate)
            for _ in range(3):
                await fingerprint(at.backend, text_call("a", name))
            while not begun:
                await asyncio.sleep(0)
            await at.backend.delete_version("acme", name, 2)
            gate.set()
            await at.backend._shadows.drain()
            assert len(begun) == 1
            assert (await at.backend.get_adapter("acme", name)).shadow is None

    run(go())
    assert served.registry.store.shadow_answers(name) is None


def test_another_tenant_sees_and_sets_none(served):
    name = shaded(served, "acme.own")

    async def go():
        async with ingress(served, "r0") as at:
            for ask in (at.backend.set_shadow("globex", name, 2, 0.5), at.backend.get_adapter("globex", name)):
                with pytest.raises(NotFoundError):
                    await ask
            assert name not in [card.name for card in await at.backend.list_adapters("globex")]
            await fingerprint(at.backend, replace(text_call("a", "globex.faq"), tenant="globex"))
            card = await at.backend.set_shadow("acme", name, 2, 0.0)
            assert card.shadow is None

    run(go())


def test_over_http_neither_the_answer_nor_the_usage_nor_the_quota_knows_of_it(served):
    name = shaded(served, "acme.seen")
    store = served.registry.store
    _, secret = store.create_key("acme", scopes=(INFER,))

    async def go():
        async with ingress(served, "r0") as at:
            app = create_app(lambda: at.backend, store, GatewaySettings())
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app)
                headers = {"authorization": f"Bearer {secret}"}
                async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
                    body = {"prompt": "Once", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                    plain, shadowed = [
                        (await http.post("/v1/completions", json={"model": model, **body})).json()
                        for model in (f"{name}:1", name)
                    ]
                    await at.backend._shadows.drain()
                    streamed = await http.post("/v1/completions", json={"model": name, "stream": True, **body})
                    await at.backend._shadows.drain()
            return plain, shadowed, streamed.text

    plain, shadowed, streamed = run(go())
    assert shadowed["choices"] == plain["choices"]
    assert shadowed["usage"] == plain["usage"]
    assert shadowed["system_fingerprint"] == plain["system_fingerprint"]
    assert f"{name}:2" not in json.dumps(shadowed) + streamed
    (used,) = (one for one in store.usage("acme", by=("model",)) if one.model == name)
    assert (used.requests, used.completion_tokens) == (3, 18)
    kept = counted(served, name)
    assert (kept.same + kept.different, kept.errors) == (2, 0)
