"""Racing promotes, rollbacks, canaries, gates and deletes equal some serial order, whoever races on what database."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_entries import last_audit
from store_moves import NAME, Attempt, State, fill, play, stub_version

from pedro.errors import ConflictError, NotFoundError
from pedro.store import Inherited, RegisteredAdapter, Store, aliases

VERSIONS = 40
WORKER = Path(__file__).with_name("store_moves.py")


def race(url: str, count: int, processes: int, threads: int) -> list[Attempt]:
    """All attempts of so many processes with so many threads each, `count` together."""
    running = [
        subprocess.Popen(
            [sys.executable, WORKER, url, str(seed), str(count // processes), str(threads), str(VERSIONS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    ends = [process.communicate(timeout=900) for process in running]
    assert all(process.returncode == 0 for process in running), ends
    return [Attempt(**json.loads(line)) for out, _ in ends for line in out.splitlines()]


def check_serial(store: Store, attempts: list[Attempt], start: State, looks: list[RegisteredAdapter]) -> None:
    """The history is one order in which every attempt had its effect, or its error, within the time that it took."""
    by_actor = {one.actor: one for one in attempts}
    moves = sorted(store.alias_history(NAME, limit=10**6), key=lambda move: move.generation)
    moves = [move for move in moves if move.actor in by_actor]
    assert len(moves) == len({move.actor for move in moves}) == sum(not one.error for one in attempts)
    states, state = {0: start}, start
    for move in moves:
        one = by_actor[move.actor]
        assert not one.error, f"{one} failed, and moved {move}"
        assert one.seen < move.generation <= one.seen_after, f"{one} took effect outside of its time, at {move}"
        after = play(state, one.move, one.arguments)
        assert isinstance(after, State), f"{one} was refused by the reference ({after}) at {state}"
        seen = {"aliases": after.aliases}
        if after.canary is not None:
            seen["canary"] = {"version": after.canary[0], "weight": after.canary[1]}
        assert move.after == seen, f"{one} made {move.after} of {state}, not {seen}"
        states[move.generation] = state = after
    order = sorted(states)
    for one in attempts:
        if one.error:  # it must have been right to refuse it at some moment while it was under way
            first = max(number for number in order if number <= max(one.seen, 0))
            moments = [states[number] for number in order if first <= number <= one.seen_after]
            ends = [play(at, one.move, one.arguments) for at in moments]
            assert one.error in {end.__name__ for end in ends if isinstance(end, type)}, f"{one} was never wrong"
    for look in looks:
        number = max(number for number in order if number <= look.generation)
        assert look.aliases == states[number].aliases, f"a reader saw {look}, which never was"
    (final,) = store.list_adapters().values()
    assert final.aliases == state.aliases
    assert {version.version for version in store.list_versions(NAME)} == state.versions
    audit = [entry for entry in last_audit(store, "acme", limit=10**6) if entry.actor in by_actor]
    assert [(entry.actor, entry.after) for entry in reversed(audit)] == [(move.actor, move.after) for move in moves]


@pytest.mark.parametrize(
    ("count", "processes", "threads"),
    [(200, 2, 4), pytest.param(1000, 4, 8, marks=pytest.mark.slow)],
    ids=["200 moves", "1000 moves"],
)
def test_racing_moves_equal_some_serial_order(url, count, processes, threads):
    store = Store(url)
    fill(store, VERSIONS)
    looks, over = [], threading.Event()

    def look():
        reader = Store(url)
        while not over.wait(0.005):
            looks.append(reader.get_adapter(NAME))
        reader.close()

    watching = threading.Thread(target=look)
    watching.start()
    try:
        attempts = race(url, count, processes, threads)
    finally:
        over.set()
        watching.join()
    assert len(attempts) == count
    assert {one.move for one in attempts if not one.error} == {
        "promote", "rollback", "set_canary", "gate", "set_alias", "delete_version"
    }  # fmt: skip
    assert sum(bool(one.error) for one in attempts) > count // 20
    assert looks
    assert [one.generation for one in looks] == sorted(one.generation for one in looks)
    check_serial(store, attempts, State(frozenset(range(1, VERSIONS + 1)), {}), looks)
    store.close()


def test_the_checker_finds_a_move_that_was_lost(url):
    store = Store(url)
    fill(store, 3)
    done = [
        Attempt("one", "promote", {"version": 1}, "", store.position().generation, 10**6),
        Attempt("two", "promote", {"version": 2}, "", store.position().generation, 10**6),
    ]
    store.promote(NAME, 1, actor="one")
    store.promote(NAME, 2, actor="two")
    start = State(frozenset({1, 2, 3}), {})
    check_serial(store, done, start, [])
    refused = Attempt("three", "rollback", {}, "ConflictError", done[0].seen, done[0].seen)
    check_serial(store, [*done, refused], start, [])
    for wrong in (
        [done[0]],
        [*done, Attempt("three", "promote", {"version": 3}, "", 0, 10**6)],
        [done[0], Attempt("two", "promote", {"version": 3}, "", done[1].seen, 10**6)],
        [*done, Attempt("three", "promote", {"version": 3}, "ConflictError", done[1].seen, 10**6)],
    ):
        with pytest.raises(AssertionError):
            check_serial(store, wrong, start, [])
    store.close()


def test_all_versions_of_a_tenant_are_those_of_each_of_its_adapters(url):
    store = Store(url)
    fill(store, 3, "acme.one"), fill(store, 1, "acme.two"), fill(store, 2, "globex.one")
    store.promote("acme.one", 2)
    store.delete_version("acme.one", 3)
    assert store.list_all_versions("acme") == {name: store.list_versions(name) for name in ("acme.one", "acme.two")}
    assert set(store.list_all_versions()) == {"acme.one", "acme.two", "globex.one"}
    assert (store.count_adapters(), store.adapters_of_backbone("sha256:b")) == (
        3,
        ["acme.one", "acme.two", "globex.one"],
    )
    assert store.adapters_of_backbone("sha256:other") == []
    store.delete_adapter("globex.one")
    assert set(store.list_all_versions()) == {"acme.one", "acme.two"}
    assert (store.count_adapters(), store.adapters_of_backbone("sha256:b")) == (2, ["acme.one", "acme.two"])
    store.close()


def test_the_history_keeps_the_last_moves_of_an_adapter_and_the_audit_those_of_a_time(url, monkeypatch):
    monkeypatch.setattr(aliases, "KEEP_MOVES", 3)
    store = Store(url)
    fill(store, 2), fill(store, 1, "acme.other")
    store.promote("acme.other", 1)
    for number in (1, 2, 1, 2, 1):
        store.promote(NAME, number)
    assert [move.after["aliases"]["champion"] for move in store.alias_history(NAME)] == [1, 2, 1]
    assert len(store.alias_history("acme.other")) == 1
    moves = store.recent_moves(0.0)
    assert [name for name, _ in moves] == [NAME, NAME, NAME, "acme.other"]
    assert [move for name, move in moves if name == NAME] == store.alias_history(NAME)
    assert store.recent_moves(moves[0][1].at + 1) == []
    assert store.rollback(NAME).version == 2
    entries = last_audit(store, "acme")
    assert len(entries) == 7
    assert store.forget_audit(before=0) == 0
    assert store.forget_audit(before=entries[2].at) == 4
    assert last_audit(store, "acme") == entries[:3]
    store.close()


def test_a_name_deleted_and_made_again_is_another_adapter_with_a_history_of_its_own(url):
    store = Store(url)
    fill(store, 2)
    store.promote(NAME, 2)
    old = store.get_adapter(NAME)
    store.delete_adapter(NAME, actor="who")
    assert (store.get_adapter(NAME), store.list_versions(NAME)) == (None, [])
    for gone in (lambda: store.promote(NAME, 1), lambda: store.get_version(NAME, 2), lambda: store.alias_history(NAME)):
        with pytest.raises(NotFoundError):
            gone()
    with pytest.raises(ConflictError, match="was deleted while"):  # the registry has not been told yet
        store.add_version(stub_version(3), old.made)
    store.mirrored(store.to_mirror(NAME).adapter)
    fill(store, 1)
    new = store.get_adapter(NAME)
    assert (new.made > old.made, new.aliases, store.alias_history(NAME)) == (True, {}, [])
    assert [entry.action for entry in last_audit(store, "acme")] == ["adapter.delete", "adapter.promote"]
    store.close()


def test_a_version_that_an_import_entered_before_its_job_did_is_there_once(url):
    store = Store(url)
    before = store.made_of(NAME)
    store.take_over([Inherited(NAME, 1.0, {}, (stub_version(1),))])
    store.add_version(stub_version(1), before)
    assert [version.version for version in store.list_versions(NAME)] == [1]
    store.close()


def test_who_waits_for_a_change_of_a_server_hears_of_it_at_once_also_after_the_connection_was_lost(postgres):
    url = postgres.ready_database()
    store, other = Store(url), Store(url)
    store.wait_for_change(0.01)  # it listens from now on

    def heard(change):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.wait_for_change, 300)  # far longer than the test may last
            change()
            waiting.result(timeout=100)

    def listening(what="pid"):
        where = "datname = current_database() AND query LIKE 'LISTEN%'"
        with other._database.writing() as connection:
            return connection.execute(sa.text(f"SELECT {what} FROM pg_stat_activity WHERE {where}")).scalars().all()

    heard(lambda: other.create_key("acme"))
    other.create_key("acme")  # while nobody waits
    heard(lambda: None)
    before = listening()
    assert listening("pg_terminate_backend(pid)") == [True]
    while listening() in ([], before):
        store.wait_for_change(0.01)
    heard(lambda: other.create_key("acme"))
    store.close(), other.close()


def test_the_feed_tells_what_changed_after_a_place_and_when_it_cannot(url):
    store = Store(url)
    fill(store, 2)
    start = store.position()
    assert store.changes(start) == type(store.changes(start))(start, frozenset(), True)
    store.promote(NAME, 1)
    key, _ = store.create_key("acme")
    store.set_quota(tenant="acme", requests_per_minute=5)
    delta = store.changes(start)
    assert delta.changed == {("adapter", NAME), ("key", key.id), ("quota", "tenant:acme")}
    assert delta.position == store.position()
    store.revoke_key(key.id)
    assert store.changes(delta.position).changed == {("key", key.id)}
    assert store.forget_changes(before=0) == 0
    assert store.forget_changes(before=10**11) == 6
    assert (store.changes(start).complete, store.changes(store.position()).complete) == (False, True)
    store.revoke_key(key.id)  # again: nothing to tell
    assert store.changes(store.position()).changed == frozenset()
    store.close()
