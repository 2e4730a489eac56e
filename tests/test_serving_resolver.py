"""What a model name means: the catalogue on a real store."""

import asyncio
import itertools
import sqlite3
from pathlib import Path

import pytest
from serving_adapters import OTHER_BACKBONE, register, settings_at, stub_adapter

from pedro.errors import AdapterError, NotFoundError, UnavailableError, model_not_found
from pedro.gateway.backend import ALL_TENANTS, GenerateCall
from pedro.registry import Registry
from pedro.serving.backend import share_of
from pedro.serving.resolver import ModelResolver

OURS = "sha256:" + "a" * 64
_count = itertools.count()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def registry(home):
    return Registry.open(settings_at(home))


@pytest.fixture
def add(registry, tmp_path):
    """Register a version; its digest is a fresh one, so that versions can be told apart."""

    def add(name, *, promote=True, backbone_digest=OURS):
        number = next(_count)
        directory = stub_adapter(tmp_path / str(number), f"sha256:{number:064x}", backbone_digest)
        return register(registry, directory, name, promote=promote)

    return add


@pytest.fixture
def resolver(registry):
    return ModelResolver(registry, "stories", OURS, interval_s=0.01)


def backup(home, copy):
    """A copy of a home's records, as they are now."""
    with sqlite3.connect(home / "pedro.db") as there, sqlite3.connect(copy) as here:
        there.backup(here)


def resolve(resolver, tenant, model, *, refresh=True):
    async def go():
        if refresh:
            await resolver.refresh()
        return await resolver.resolve(tenant, model)

    return asyncio.run(go())


def test_the_bare_name_is_the_champion_and_aliases_and_versions_name_the_others(resolver, registry, add):
    first, second, third = add("acme.faq"), add("acme.faq"), add("acme.faq", promote=False)
    registry.set_alias("acme.faq", "candidate", 3)
    assert resolve(resolver, "acme", "acme.faq").digest == second.digest
    assert resolve(resolver, "acme", "acme.faq@champion").digest == second.digest
    assert resolve(resolver, "acme", "acme.faq@previous").digest == first.digest
    assert resolve(resolver, "acme", "acme.faq@candidate").digest == third.digest
    assert resolve(resolver, "acme", "acme.faq:1").digest == first.digest


def test_a_name_without_a_champion_is_not_found(resolver, add):
    add("acme.raw", promote=False)
    with pytest.raises(NotFoundError):
        resolve(resolver, "acme", "acme.raw")
    assert resolve(resolver, "acme", "acme.raw:1").version == 1


@pytest.mark.parametrize("suffix", ["", "@champion", "@nothing", ":1", ":99"])
def test_a_foreign_name_and_an_unknown_one_get_the_same_error(resolver, add, suffix):
    add("globex.secret")
    bodies = set()
    for name in ("globex.secret", "globex.nothere"):
        with pytest.raises(NotFoundError) as caught:
            resolve(resolver, "acme", name + suffix)
        assert caught.value.status == 404
        assert caught.value.body() == model_not_found(name + suffix).body()
        bodies.add(str(caught.value.body()).replace(name, "NAME"))
    assert len(bodies) == 1


@pytest.mark.parametrize(
    "name",
    ["", ".", "acme", "acme.", ".faq", "acme.faq.x", "acme.faq:", "acme.faq:1:2", "acme.faq@", "acme.faq:0x1",
     "acme.faq:1@champion", "../acme.faq", "acme/faq", "acme.faq\n", "acme.faq:9999999999", "ACME.faq", "acme.f%61q",
     "acme.faq' OR '1'='1", "*", "*.faq", "acme.faq\x00", "acme.faq@champion ", "acmé.faq"],
)  # fmt: skip
def test_a_hostile_name_is_simply_not_found(resolver, name):
    with pytest.raises(NotFoundError) as caught:
        resolve(resolver, "acme", name)
    assert caught.value.body() == model_not_found(name).body()


def test_an_admin_sees_every_tenant_and_a_tenant_only_its_own(resolver, add):
    add("acme.mine"), add("globex.theirs")

    async def names(tenant):
        await resolver.refresh()
        return {version.name for version in await resolver.champions(tenant)}

    assert asyncio.run(names("acme")) >= {"acme.mine"}
    assert all(name.startswith("acme.") for name in asyncio.run(names("acme")))
    assert asyncio.run(names(ALL_TENANTS)) >= {"acme.mine", "globex.theirs"}
    assert resolve(resolver, ALL_TENANTS, "globex.theirs").tenant == "globex"


def test_a_tenant_whose_name_begins_with_anothers_is_a_stranger(resolver, add):
    add("acme-two.faq")
    with pytest.raises(NotFoundError):
        resolve(resolver, "acme", "acme-two.faq")


def test_of_a_canary_a_user_is_answered_by_the_same_version_each_time_and_so_are_all_prompts_of_one_request():
    def share(user=None, request_id="cmpl-1-0", model="acme.split", canary=2):
        return share_of(GenerateCall(request_id, "acme", model, "hello", user=user), canary)

    assert share("ann") == share("ann", "cmpl-2-0") == share("ann", model="acme.split@champion")
    assert share("ann") != share("ann", model="acme.other")
    assert share(request_id="cmpl-1-0") == share(request_id="cmpl-1-7") != share(request_id="cmpl-2-0")
    users = [share(f"user {number}") for number in range(2000)]
    requests = [share(request_id=f"cmpl-{number}-0") for number in range(2000)]
    for shares in (users, requests):
        assert all(0 <= one < 1 for one in shares)
        assert 150 < sum(one < 0.1 for one in shares) < 250
    first, second = ({n for n in range(2000) if share(f"user {n}", canary=version) < 0.1} for version in (2, 3))
    assert len(first & second) < 50  # who met the last canary is as likely as anybody to meet the next


def test_a_canary_answers_its_share_of_the_bare_name_and_nothing_else(resolver, registry, add):
    champion, canary = add("acme.split"), add("acme.split", promote=False)
    registry.canary("acme.split", canary.version, 0.25)

    async def go(model, share):
        await resolver.refresh()
        return (
            await resolver.resolve("acme", model, lambda version: share if version == canary.version else 1)
        ).version

    shares = [number / 100 for number in range(100)]
    asked = [asyncio.run(go("acme.split", share)) for share in shares[::5]]
    assert asked == [canary.version] * 5 + [champion.version] * 15
    assert asyncio.run(go("acme.split@champion", 0.0)) == canary.version
    assert asyncio.run(go("acme.split:1", 0.0)) == champion.version
    assert resolve(resolver, "acme", "acme.split").version == champion.version
    registry.promote("acme.split", champion.version)
    assert asyncio.run(go("acme.split", 0.0)) == champion.version


def test_an_alias_move_is_seen_at_the_next_refresh_and_not_before(resolver, registry, add):
    old, new = add("acme.swap"), add("acme.swap", promote=False)
    assert resolve(resolver, "acme", "acme.swap").digest == old.digest
    registry.promote("acme.swap", new.version)
    assert resolve(resolver, "acme", "acme.swap", refresh=False).digest == old.digest
    assert resolve(resolver, "acme", "acme.swap").digest == new.digest
    registry.rollback("acme.swap")
    assert resolve(resolver, "acme", "acme.swap").digest == old.digest


def test_a_reading_of_an_unchanged_store_costs_one_look_and_any_change_is_seen(resolver, registry, add, monkeypatch):
    add("acme.quiet")
    readings = []
    read = registry.store.changes
    monkeypatch.setattr(registry.store, "changes", lambda since: readings.append(1) or read(since))

    async def go():
        for _ in range(5):
            await resolver.refresh()
        assert readings == []
        assert resolver.fresh
        assert (await resolver.resolve("acme", "acme.quiet")).version == 1
        await asyncio.to_thread(add, "acme.quiet")
        await resolver.refresh()
        assert (await resolver.resolve("acme", "acme.quiet")).version == 2
        await asyncio.to_thread(registry.rollback, "acme.quiet")
        await resolver.refresh()
        assert (await resolver.resolve("acme", "acme.quiet")).version == 1

    asyncio.run(go())
    assert len(readings) == 2


def test_a_store_restored_from_a_copy_is_read_anew(tmp_path, add, registry):
    add("acme.restored")
    own = Registry.open(settings_at(tmp_path / "own"))
    register(own, stub_adapter(tmp_path / "one", "sha256:1", OURS), "acme.restored")
    backup(tmp_path / "own", tmp_path / "copy.db")
    register(own, stub_adapter(tmp_path / "two", "sha256:2", OURS), "acme.restored")
    resolver = ModelResolver(own, "stories", OURS, interval_s=0.01)
    assert resolve(resolver, "acme", "acme.restored").version == 2
    (tmp_path / "copy.db").rename(tmp_path / "own" / "pedro.db")
    for journal in (tmp_path / "own").glob("pedro.db-*"):
        journal.unlink()
    assert resolve(resolver, "acme", "acme.restored").version == 1


def test_the_watcher_follows_moves_and_ends_when_cancelled(resolver, registry, add):
    add("acme.watched"), add("acme.watched", promote=False)

    async def go():
        watching = asyncio.create_task(resolver.watch())
        async with asyncio.timeout(60):
            while not resolver.fresh:
                await asyncio.sleep(0.01)
            assert (await resolver.resolve("acme", "acme.watched")).version == 1
            await asyncio.to_thread(registry.promote, "acme.watched", 2)
            while (await resolver.resolve("acme", "acme.watched")).version != 2:
                await asyncio.sleep(0.01)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    asyncio.run(go())


def test_a_name_deleted_and_registered_again_never_means_the_old_version(resolver, registry, add):
    old = add("acme.reborn")
    assert resolve(resolver, "acme", "acme.reborn:1").digest == old.digest
    registry.delete("acme.reborn")
    new = add("acme.reborn")
    assert (new.version, new.digest != old.digest) == (1, True)
    assert resolve(resolver, "acme", "acme.reborn").digest == new.digest
    assert resolve(resolver, "acme", "acme.reborn:1").digest == new.digest


def test_a_deleted_name_is_not_found(resolver, registry, add):
    add("acme.gone")
    assert resolve(resolver, "acme", "acme.gone")
    registry.delete("acme.gone")
    with pytest.raises(NotFoundError):
        resolve(resolver, "acme", "acme.gone")


def test_a_deleted_version_is_not_found_though_it_was_served_before(resolver, registry, add):
    add("acme.part", promote=False), add("acme.part")
    assert resolve(resolver, "acme", "acme.part:1").version == 1
    registry.delete("acme.part", 1)

    async def go():
        await resolver.refresh()
        await asyncio.sleep(0.02)
        await resolver.resolve("acme", "acme.part:1")

    with pytest.raises(NotFoundError):
        asyncio.run(go())
    assert resolve(resolver, "acme", "acme.part").version == 2


def test_an_adapter_of_another_backbone_is_refused_with_both_digests_and_not_listed(resolver, add):
    add("acme.alien", backbone_digest=OTHER_BACKBONE)
    with pytest.raises(AdapterError) as caught:
        resolve(resolver, "acme", "acme.alien")
    assert OURS in caught.value.message
    assert OTHER_BACKBONE in caught.value.message
    assert "`pedro serve --backbone b`" in caught.value.message, "what to do"
    assert "acme.alien" not in {version.name for version in asyncio.run(resolver.champions("acme"))}


def test_before_the_first_reading_a_name_is_unavailable_rather_than_unknown(resolver):
    with pytest.raises(UnavailableError):
        resolve(resolver, "acme", "acme.faq", refresh=False)
    assert not resolver.fresh


def test_a_name_deleted_since_the_last_reading_is_left_out_of_the_list(resolver, registry, add):
    add("acme.fleeting"), add("acme.lasting")

    async def go():
        await resolver.refresh()
        await asyncio.to_thread(registry.delete, "acme.fleeting")
        return {version.name for version in await resolver.champions("acme")}

    names = asyncio.run(go())
    assert "acme.lasting" in names
    assert "acme.fleeting" not in names


def test_while_the_store_is_away_the_last_state_stays_in_force(home, tmp_path, registry, add):
    add("acme.steady"), add("acme.steady")
    database = tmp_path / "pedro.db"
    backup(home, database)
    own = Registry(registry.tracking_uri, registry.artifact_root, tmp_path / "cache", f"sqlite:///{database}")
    resolver = ModelResolver(own, "stories", OURS, interval_s=0.01)

    async def go():
        watching = asyncio.create_task(resolver.watch())
        async with asyncio.timeout(60):
            while not resolver.fresh:
                await asyncio.sleep(0.01)
            assert (await resolver.resolve("acme", "acme.steady")).version == 2
            assert (await resolver.resolve("acme", "acme.steady:1")).version == 1
            with pytest.raises(NotFoundError):
                await resolver.resolve("acme", "acme.nothere")
            database.unlink()
            Path(f"{database}").mkdir()  # nothing can be opened or made here now
            await asyncio.sleep(0.3)
            assert not watching.done()
            assert (await resolver.resolve("acme", "acme.steady")).version == 2
            assert (await resolver.resolve("acme", "acme.steady:1")).version == 1
            assert "acme.steady" in {version.name for version in await resolver.champions("acme")}
            with pytest.raises(NotFoundError):
                await resolver.resolve("acme", "acme.nothere")
            with pytest.raises(UnavailableError):  # whether there is one cannot be known now
                await resolver.resolve("acme", "acme.neverasked")
        watching.cancel()

    asyncio.run(go())


def test_a_registry_that_never_answered_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Registry("http://127.0.0.1:9", str(tmp_path), tmp_path, f"sqlite:///{tmp_path}/pedro.db")
    resolver = ModelResolver(registry, "stories", OURS, interval_s=0.01)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        asyncio.run(resolver.refresh())
    with pytest.raises(UnavailableError):
        resolve(resolver, "acme", "acme.faq", refresh=False)
