"""What a gateway knows of keys follows the store: one question a key, and no key that was revoked is taken for good."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import sqlalchemy as sa

from pedro.errors import AuthenticationError, UnavailableError
from pedro.gateway import auth
from pedro.gateway.app import GatewaySettings
from pedro.gateway.auth import KeyCache, LastUsed
from pedro.store import Quota, Store, schema

OFTEN_S = 0.02
RARELY_S = 3600.0  # the feed is not due again in the time of a test


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A reading of the feed is waited for, however slow the machine is."""
    monkeypatch.setattr(auth, "PATIENCE_S", 60.0)


class Counted:
    """A store that counts who is asked for, can be away, and can be held up before it answers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked = 0
        self.away = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.before_answer = lambda: None

    def __getattr__(self, name):
        def ask(*arguments):
            self.go_on.wait()
            if self.away:
                raise UnavailableError("away")
            return getattr(self._store, name)(*arguments)

        return ask

    def authenticate(self, secret):
        if self.away:
            raise UnavailableError("away")
        self.asked += 1
        try:
            return self._store.authenticate(secret)
        finally:
            self.before_answer()


def run(scenario) -> None:
    async def within():
        async with asyncio.timeout(60):
            await scenario

    asyncio.run(within())


def test_a_key_is_asked_for_once_and_so_is_one_that_is_unknown(store):
    record, secret = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, OFTEN_S)

    async def go():
        for _ in range(5):
            assert await cache.find(secret) == (record, Quota())
            with pytest.raises(AuthenticationError):
                await cache.find("sk-pedro-nobody")
            await asyncio.sleep(OFTEN_S)
        assert counted.asked == 2

    run(go())
    cache.close()


def test_a_revoked_key_is_refused_by_every_gateway_when_the_feed_is_next_due_which_is_within_a_second(store):
    assert GatewaySettings().follow_keys_every_s <= 0.5
    made = [store.create_key("acme") for _ in range(3)]
    caches = [KeyCache(store, RARELY_S) for _ in range(3)]

    async def go():
        for cache in caches:
            for _, secret in made:
                await cache.find(secret)
        store.revoke_key(made[1][0].id)
        for cache in caches:
            assert (await cache.find(made[1][1]))[0] == made[1][0]  # it has not heard of it
            cache._due_at = 0.0
            with pytest.raises(AuthenticationError):
                await cache.find(made[1][1])
            for record, secret in (made[0], made[2]):
                assert (await cache.find(secret))[0] == record

    run(go())
    for cache in caches:
        cache.close()


def test_a_changed_quota_and_a_new_key_are_heard_of(store):
    record, secret = store.create_key("acme")
    other = store.create_key("globex")[1]
    cache = KeyCache(store, OFTEN_S)

    async def go():
        assert (await cache.find(secret))[1] == Quota()
        await cache.find(other)
        store.set_quota(tenant="acme", requests_per_minute=5)
        store.set_quota(key_id=record.id, tokens_per_minute=7)
        await asyncio.sleep(2 * OFTEN_S)
        key, of_tenant = await cache.find(secret)
        assert (key.quota, of_tenant) == (Quota(None, 7), Quota(5, None))
        assert (await cache.find(other))[1] == Quota()
        with pytest.raises(AuthenticationError):
            await cache.find("sk-pedro-later")
        new = store.create_key("acme")[1]
        await asyncio.sleep(2 * OFTEN_S)
        await cache.find(new)

    run(go())
    cache.close()


def test_a_revocation_between_question_and_answer_is_not_lost(store):
    record, secret = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, 0.0)
    read, go_on = threading.Event(), threading.Event()

    def pause():
        counted.before_answer = lambda: None
        read.set()
        go_on.wait(10)

    async def go():
        with pytest.raises(AuthenticationError):
            await cache.find("sk-pedro-first")
        counted.before_answer = pause
        asking = asyncio.create_task(cache.find(secret))
        await asyncio.to_thread(read.wait, 10)
        store.revoke_key(record.id)
        with pytest.raises(AuthenticationError):
            await cache.find("sk-pedro-second")  # reads the feed
        go_on.set()
        await asking  # it was good when it was asked for
        with pytest.raises(AuthenticationError):
            await cache.find(secret)

    run(go())
    cache.close()


def test_while_the_database_is_away_known_keys_are_good_for_a_while_and_others_cannot_be_told(store, monkeypatch):
    record, secret = store.create_key("acme")
    stranger = store.create_key("globex")[1]
    counted = Counted(store)
    cache = KeyCache(counted, OFTEN_S)

    async def go():
        await cache.find(secret)
        counted.away = True
        await asyncio.sleep(2 * OFTEN_S)
        for _ in range(5):
            assert (await cache.find(secret))[0] == record
        with pytest.raises(UnavailableError):
            await cache.find(stranger)
        monkeypatch.setattr(auth, "AWAY_S", 0.0)
        monkeypatch.setattr(auth, "AGAIN_AFTER_S", 0.0)
        cache._due_at = 0.0
        with pytest.raises(UnavailableError):
            await cache.find(secret)
        counted.away = False
        assert (await cache.find(secret))[0] == record

    run(go())
    cache.close()


def test_a_database_that_is_slow_holds_up_no_request_of_a_known_key(store, monkeypatch):
    record, secret = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, OFTEN_S)

    async def go():
        await cache.find(secret)
        monkeypatch.setattr(auth, "PATIENCE_S", 0.05)
        counted.go_on.clear()
        await asyncio.sleep(2 * OFTEN_S)
        for _ in range(10):
            assert (await cache.find(secret))[0] == record
        assert not cache._reading.done(), "the database has not answered yet"
        counted.go_on.set()

    run(go())
    cache.close()


def test_before_the_database_ever_answered_nobody_is_let_in(store):
    secret = store.create_key("acme")[1]
    counted = Counted(store)
    counted.away = True
    cache = KeyCache(counted, OFTEN_S)

    async def go():
        with pytest.raises(UnavailableError):
            await cache.find(secret)

    run(go())
    cache.close()


def test_where_the_feed_was_cut_every_key_is_asked_for_again(store):
    record, secret = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, 0.0)

    async def go():
        await cache.find(secret)
        store.revoke_key(record.id)
        store.forget_changes(10**11)
        with pytest.raises(AuthenticationError):
            await cache.find(secret)

    run(go())
    cache.close()


def test_what_a_process_of_an_earlier_release_changes_without_the_feed_is_seen_once_answers_are_old(store, monkeypatch):
    record, secret = store.create_key("acme")
    cache = KeyCache(store, RARELY_S)

    def change(revoked):
        with store._database.writing() as connection:
            connection.execute(sa.update(schema.keys).where(schema.keys.c.id == record.id).values(revoked=revoked))

    async def refused():
        with pytest.raises(AuthenticationError):
            await cache.find(secret)

    async def go():
        assert (await cache.find(secret))[0] == record
        change(1.0)
        assert (await cache.find(secret))[0] == record
        monkeypatch.setattr(auth, "FRESH_S", -1.0)
        await refused()
        monkeypatch.setattr(auth, "FRESH_S", 60.0)
        change(None)
        await refused()
        monkeypatch.setattr(auth, "FRESH_S", -1.0)
        assert (await cache.find(secret))[0] == record

    run(go())
    cache.close()


def test_an_old_answer_is_good_while_the_database_is_away(store, monkeypatch):
    record, secret = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, RARELY_S)

    async def go():
        await cache.find(secret)
        monkeypatch.setattr(auth, "FRESH_S", -1.0)
        counted.away = True
        assert (await cache.find(secret))[0] == record

    run(go())
    cache.close()


def test_a_flood_of_guessed_keys_is_turned_away_and_holds_up_neither_the_feed_nor_known_keys(store, monkeypatch):
    monkeypatch.setattr(auth, "MAX_LOOKUPS", 8)
    record, secret = store.create_key("acme")
    revoked, other = store.create_key("acme")
    counted = Counted(store)
    cache = KeyCache(counted, 0.0)
    go_on = threading.Event()

    async def go():
        await cache.find(secret)
        await cache.find(other)
        counted.before_answer = lambda: go_on.wait(60)
        guesses = [asyncio.create_task(cache.find(f"sk-pedro-{number}")) for number in range(20)]
        while cache._lookups < 8 or sum(guess.done() for guess in guesses) < 12:
            await asyncio.sleep(0.01)
        store.revoke_key(revoked.id)
        with pytest.raises((AuthenticationError, UnavailableError)):
            await cache.find(other)
        assert (await cache.find(secret))[0] == record
        go_on.set()
        ended = await asyncio.gather(*guesses, return_exceptions=True)
        kinds = [type(error) for error in ended]
        assert (kinds.count(AuthenticationError), kinds.count(UnavailableError)) == (8, 12)

    run(go())
    cache.close()


def test_known_keys_are_renewed_whatever_number_of_guesses_waits(store, monkeypatch):
    monkeypatch.setattr(auth, "MAX_LOOKUPS", 8)
    record, secret = store.create_key("acme")
    go_on = threading.Event()
    authenticate = store.authenticate

    def held_up(asked):
        if asked != secret:
            go_on.wait(60)
        return authenticate(asked)

    monkeypatch.setattr(store, "authenticate", held_up)
    cache = KeyCache(store, RARELY_S)

    async def go():
        await cache.find(secret)
        guesses = [asyncio.create_task(cache.find(f"sk-pedro-{number}")) for number in range(20)]
        while cache._lookups < 8:
            await asyncio.sleep(0.01)
        with store._database.writing() as connection:  # as a process of an earlier release may, which writes no feed
            connection.execute(sa.update(schema.keys).where(schema.keys.c.id == record.id).values(revoked=1.0))
        monkeypatch.setattr(auth, "FRESH_S", -1.0)
        with pytest.raises(UnavailableError):  # it was asked for, is no key any more, and now waits among the guesses
            await cache.find(secret)
        assert not cache._keys
        go_on.set()
        await asyncio.gather(*guesses, return_exceptions=True)

    run(go())
    cache.close()


def test_an_expired_key_is_refused_at_its_time_without_a_question(store, monkeypatch):
    ends = time.time() + 3600
    _, secret = store.create_key("acme", expires=ends)
    counted = Counted(store)
    cache = KeyCache(counted, RARELY_S)

    async def go():
        await cache.find(secret)
        counted.away = True
        monkeypatch.setattr(time, "time", lambda: ends - 0.001)
        await cache.find(secret)
        monkeypatch.setattr(time, "time", lambda: ends)
        with pytest.raises(AuthenticationError, match="expired"):
            await cache.find(secret)

    run(go())
    cache.close()


def test_that_keys_were_used_is_written_together_once_a_minute_and_at_the_end(store):
    keys = [store.create_key("acme")[0] for _ in range(3)]
    written = []

    class Watched:
        def mark_used(self, at):
            written.append(dict(at))
            store.mark_used(at)

    used = LastUsed(Watched(), OFTEN_S)

    async def go():
        for key in (keys[0], keys[1], keys[0]):
            used.note(key.id)
        assert written == []  # not in a request's way
        while not written:
            await asyncio.sleep(0.01)
        assert [set(at) for at in written] == [{keys[0].id, keys[1].id}]
        await asyncio.sleep(3 * OFTEN_S)
        assert len(written) == 1  # nothing was used since
        used.note(keys[2].id)
        await asyncio.to_thread(used.close)

    run(go())
    assert [key.last_used is not None for key in store.list_keys("acme")] == [True] * 3


def test_a_database_that_is_away_costs_no_more_than_the_time_of_last_use(store):
    counted = Counted(store)
    counted.away = True
    used = LastUsed(counted, OFTEN_S)

    async def go():
        used.note("key_1")
        await asyncio.sleep(2 * OFTEN_S)
        used.note("key_1")

    run(go())
    used.close()
