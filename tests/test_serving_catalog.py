"""What a server knows of adapters follows the store: nothing stale, nothing forgotten, bounded, whatever is away."""

from __future__ import annotations

import asyncio
import threading

import pytest
from store_moves import fill, stub_version

from pedro.errors import UnavailableError
from pedro.serving.resolver import AdapterCatalog
from pedro.store import CHAMPION, Database, Store


class Counted:
    """A store that counts the names it is asked for, can be away, and can be held up while it answers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.looked_up: list[str] = []
        self.questions = 0
        self.away = False
        self.before_answer = lambda: None

    def __getattr__(self, name):
        if self.away:
            raise UnavailableError("away")
        return getattr(self._store, name)

    def look_up(self, names):
        if self.away:
            raise UnavailableError("away")
        self.looked_up += names
        self.questions += 1
        found = self._store.look_up(names)
        self.before_answer()
        return found


def champion(known) -> int | None:
    return None if known is None else known.adapter.aliases.get(CHAMPION)


def test_a_name_is_looked_up_once_and_again_only_when_it_changed(store):
    fill(store, 2, "acme.faq"), fill(store, 1, "acme.other")
    store.promote("acme.faq", 1)
    counted = Counted(store)
    catalog = AdapterCatalog(counted)

    async def go():
        await catalog.follow()
        for _ in range(3):
            assert champion(await catalog.get("acme.faq")) == 1
            assert await catalog.get("acme.none") is None
            await catalog.follow()
        assert counted.looked_up == ["acme.faq", "acme.none"]
        store.promote("acme.other", 1)  # nobody asked for it
        store.promote("acme.faq", 2)
        await catalog.follow()
        assert counted.looked_up == ["acme.faq", "acme.none", "acme.faq"]
        known = await catalog.get("acme.faq")
        assert (champion(known), known.versions[2].digest, known.versions[2].aliases) == (2, "sha256:2", ("champion",))
        fill(store, 1, "acme.none")
        await catalog.follow()
        assert champion(await catalog.get("acme.none")) is None
        assert (await catalog.version("acme.none", 1)).digest == "sha256:1"
        store.delete_adapter("acme.faq")
        await catalog.follow()
        assert await catalog.get("acme.faq") is None

    asyncio.run(go())


def test_many_who_ask_at_once_are_one_question(store):
    fill(store, 1, "acme.faq")
    counted = Counted(store)
    catalog = AdapterCatalog(counted)

    async def go():
        await catalog.follow()
        found = await asyncio.gather(*(catalog.get("acme.faq") for _ in range(50)))
        assert {one.adapter.name for one in found} == {"acme.faq"}
        assert counted.looked_up == ["acme.faq"]

    asyncio.run(go())


def test_many_names_asked_for_at_once_are_few_questions_and_each_gets_its_own_answer(store, monkeypatch):
    monkeypatch.setattr("pedro.serving.resolver.MAX_TOGETHER", 4)
    for number in range(9):
        fill(store, 1, f"acme.a{number}")
    counted = Counted(store)
    catalog = AdapterCatalog(counted)
    names = [f"acme.a{number}" for number in range(9)]

    async def go():
        await catalog.follow()
        found = await asyncio.gather(*(catalog.get(name) for name in (*names, "acme.none")))
        assert [one and one.adapter.name for one in found] == [*names, None]
        assert (sorted(counted.looked_up), counted.questions) == ([*names, "acme.none"], 3)
        counted.away = True
        away = await asyncio.gather(*(catalog.get(f"acme.b{number}") for number in range(9)), return_exceptions=True)
        assert {type(one) for one in away} == {UnavailableError}
        counted.away = False
        assert await catalog.get("acme.b1") is None, "a failure is not remembered"

    asyncio.run(go())


def test_a_change_between_question_and_answer_is_not_lost(store):
    fill(store, 2, "acme.faq")
    store.promote("acme.faq", 1)
    counted = Counted(store)
    catalog = AdapterCatalog(counted)
    read, go_on = threading.Event(), threading.Event()

    def pause():
        counted.before_answer = lambda: None
        read.set()
        go_on.wait(10)

    async def go():
        await catalog.follow()
        counted.before_answer = pause
        asking = asyncio.create_task(catalog.get("acme.faq"))
        await asyncio.to_thread(read.wait, 10)
        store.promote("acme.faq", 2)
        await catalog.follow()
        go_on.set()
        assert champion(await asking) == 2
        assert champion(await catalog.get("acme.faq")) == 2

    asyncio.run(go())


def test_of_two_who_follow_at_once_the_older_answer_does_not_come_last(store):
    fill(store, 3, "acme.faq")
    store.promote("acme.faq", 1)
    counted = Counted(store)
    catalog = AdapterCatalog(counted)
    read, go_on = threading.Event(), threading.Event()

    def pause():
        counted.before_answer = lambda: None
        read.set()
        go_on.wait(10)

    async def go():
        await catalog.follow()
        await catalog.get("acme.faq")
        store.promote("acme.faq", 2)
        counted.before_answer = pause
        first = asyncio.create_task(catalog.follow())
        await asyncio.to_thread(read.wait, 10)
        store.promote("acme.faq", 3)
        second = asyncio.create_task(catalog.follow())
        await asyncio.sleep(0.1)
        go_on.set()
        await first, await second
        assert champion(await catalog.get("acme.faq")) == 3

    asyncio.run(go())


def test_a_version_by_its_number_is_gone_once_it_was_deleted(store):
    fill(store, 3, "acme.faq")
    store.promote("acme.faq", 1)
    catalog = AdapterCatalog(Counted(store))

    async def go():
        await catalog.follow()
        assert (await catalog.version("acme.faq", 3)).version == 3
        assert await catalog.version("acme.faq", 9) is None
        store.delete_version("acme.faq", 3)
        await catalog.follow()
        assert await catalog.version("acme.faq", 3) is None

    asyncio.run(go())


def test_a_version_that_is_not_there_is_asked_for_once_until_its_adapter_changes(store, monkeypatch):
    fill(store, 1, "acme.faq"), fill(store, 1, "acme.other")
    asked = []
    monkeypatch.setattr(
        store, "get_version", lambda name, number: asked.append(number) or Store.get_version(store, name, number)
    )
    catalog = AdapterCatalog(store)

    async def go():
        await catalog.follow()
        for _ in range(3):
            assert await catalog.version("acme.faq", 2) is None
            assert await catalog.version("acme.faq", 10**9) is None
        assert asked == [2, 10**9]
        fill(store, 2, "acme.new"), store.promote("acme.other", 1)  # no matter of this one's
        await catalog.follow()
        assert await catalog.version("acme.faq", 2) is None
        assert asked == [2, 10**9]
        store.add_version(stub_version(2, "acme.faq"), store.made_of("acme.faq"))
        await catalog.follow()
        assert (await catalog.version("acme.faq", 2)).version == 2
        monkeypatch.setattr("pedro.serving.resolver.MAX_MISSING", 10)
        for number in range(100, 150):
            assert await catalog.version("acme.faq", number) is None
        assert len(catalog._no_version) == 10

    asyncio.run(go())


def test_while_the_store_is_away_what_is_known_holds_and_nothing_is_missed_afterwards(store):
    fill(store, 2, "acme.faq"), fill(store, 1, "acme.late")
    store.promote("acme.faq", 1)
    counted = Counted(store)
    catalog = AdapterCatalog(counted)

    async def go():
        await catalog.follow()
        await catalog.get("acme.faq"), await catalog.get("acme.none")
        counted.away = True
        store.promote("acme.faq", 2)
        for ask in (catalog.follow, lambda: catalog.get("acme.late")):
            with pytest.raises(UnavailableError):
                await ask()
        assert champion(await catalog.get("acme.faq")) == 1
        assert await catalog.get("acme.none") is None
        assert [known.adapter.name for known in await catalog.of_tenant("acme")] == ["acme.faq"]
        counted.away = False
        await catalog.follow()
        assert champion(await catalog.get("acme.faq")) == 2
        assert await catalog.get("acme.late")
        assert [known.adapter.name for known in await catalog.of_tenant("acme")] == ["acme.faq", "acme.late"]

    asyncio.run(go())


def test_where_the_feed_was_cut_or_the_database_put_back_everything_known_is_read_again(store, url):
    fill(store, 2, "acme.faq")
    store.promote("acme.faq", 1)
    counted = Counted(store)
    catalog = AdapterCatalog(counted)

    async def go():
        await catalog.follow()
        await catalog.get("acme.faq"), await catalog.get("acme.none")
        store.promote("acme.faq", 2)
        fill(store, 1, "acme.none")
        store.forget_changes(10**11)
        await catalog.follow()
        assert champion(await catalog.get("acme.faq")) == 2
        assert await catalog.get("acme.none")
        database = Database(url)
        with database.writing() as connection:
            connection.exec_driver_sql("UPDATE pedro_counters SET value = value + 1 WHERE name = 'epoch'")
        database.close()
        before = len(counted.looked_up)
        await catalog.follow()
        assert sorted(counted.looked_up[before:]) == ["acme.faq", "acme.none"]

    asyncio.run(go())


def test_memory_is_bounded_by_the_adapters_that_were_asked_for_last(store):
    for number in range(6):
        fill(store, 1, f"acme.a{number}")
    counted = Counted(store)
    catalog = AdapterCatalog(counted, max_known=3)

    async def go():
        await catalog.follow()
        for number in (0, 1, 2, 0, 3):
            await catalog.get(f"acme.a{number}")
        assert counted.looked_up == ["acme.a0", "acme.a1", "acme.a2", "acme.a3"]
        await catalog.get("acme.a0")
        assert len(counted.looked_up) == 4
        await catalog.get("acme.a1")
        assert len(counted.looked_up) == 5
        for number in range(30_000):
            catalog._remember(f"acme.n{number}", None)
        assert len(catalog._missing) == 20_000

    asyncio.run(go())
