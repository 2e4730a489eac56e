"""Adapters that are served, as operators and tenants meet them: pinned, promoted, damaged, withdrawn."""

import asyncio
import json
import shutil
import threading
from dataclasses import replace

import pytest
from audit_entries import last_audit
from serving_adapters import make_adapter, register, tokenizer
from serving_ingress import answer, call, fingerprint, idle, ingress, run, text_call, until
from store_moves import stub_version

from pedro.adapter_directory import read_manifest, write_manifest
from pedro.errors import (
    AdapterUnusableError,
    ConflictError,
    NotFoundError,
    PedroError,
    ScopeError,
    UnavailableError,
    model_not_found,
)
from pedro.gateway.backend import ALL_TENANTS
from pedro.serving.cards import adapter_card
from pedro.serving.gone_versions import GoneVersions
from pedro.store import Actor, AuditQuery


@pytest.fixture
def served(shared_replica):
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    return shared_replica


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


def test_a_version_names_the_one_whose_weights_it_started_from():
    first, second = (stub_version(number, "acme.voice") for number in (1, 2))
    second = replace(second, spec={"parent": "acme.voice:1"})
    card = adapter_card("acme.voice", [first, second], None, lambda _: None, None)
    assert [(version.version, version.parent) for version in card.versions] == [(2, "acme.voice:1"), (1, None)]


def test_metrics_tell_what_was_served_by_replica_and_adapter(served):
    async def go():
        async with ingress(served, "r0") as at:
            await answer(at.backend, call(max_tokens=5))
            counted = 'adapter="acme.faq",finish_reason="length"'
            await until(lambda: counted in served.replica._metrics.text())  # once the answer has left
            return await at.backend.metrics()

    text = run(go())
    assert 'pedro_requests_total{adapter="acme.faq",finish_reason="length",replica="r0"}' in text
    assert 'pedro_adapters_resident{replica="r0"}' in text


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


@pytest.mark.parametrize("order", ["deleted, then fetched", "fetched, then deleted"])
def test_a_version_that_is_deleted_while_it_loads_answers_who_had_asked_and_nobody_else(served, monkeypatch, order):
    monkeypatch.setattr(GoneVersions, "look", lambda _: None)  # else it may end the load, within its five seconds
    name = f"acme.{order.partition(',')[0]}"
    register(served.registry, served.folder / "1", name)
    register(served.registry, served.folder / "2", name, promote=False)
    held, go_on, download = threading.Event(), threading.Event(), served.replica._registry.download

    def slow(version):
        if version.ref != f"{name}:2":
            return download(version)
        directory = download(version) if order.startswith("fetched") else None
        held.set()
        assert go_on.wait(60)
        return directory or download(version)

    monkeypatch.setattr(served.replica._registry, "download", slow)

    async def go():
        async with ingress(served, "r0") as at:
            asked = asyncio.create_task(fingerprint(at.backend, text_call("a", f"{name}:2")))
            await until(held.is_set)
            await at.backend.delete_version("acme", name, 2)
            assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1", (
                "who asks meanwhile is not held up"
            )
            go_on.set()
            assert await asked == f"{name}:2"
            with pytest.raises(NotFoundError):
                await fingerprint(at.backend, text_call("a", f"{name}:2"))
            assert await fingerprint(at.backend, text_call("a", name)) == f"{name}:1"
            await until(lambda: idle(served))

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

    before = last_audit(served.registry.store, limit=1)[0].id
    run(go())
    entries = served.registry.store.find_audit(AuditQuery(above=before))
    assert [(entry.action, entry.subject, entry.actor, entry.request_id) for entry in entries] == [
        (f"adapter.{move}", "acme.owned", "key:acme/key_1", "req_1")
        for move in ("canary", "promote", "rollback", "canary", "canary", "retire", "delete")
    ]
    assert [move.actor for move in served.registry.store.alias_history("acme.owned", 4)] == ["key:acme/key_1"] * 4
