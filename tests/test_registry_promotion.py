"""Moves of aliases beside each other, and broken off half way: on a real sqlite MLflow store."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from serving_adapters import settings_at, stub_adapter

from pedro.config import Settings
from pedro.database import exclusive
from pedro.errors import ConflictError
from pedro.registry import Registry
from pedro.training.job import move_alias
from pedro.training.promotion_gate import GateDecision

NAME = "acme.moved"
WRITES = ("set_registered_model_alias", "delete_registered_model_alias")
WRITES += ("set_registered_model_tag", "delete_registered_model_tag", "set_model_version_tag")


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Settings:
    """Settings of a home with four versions of one adapter."""
    folder = tmp_path_factory.mktemp("moves")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    for number in range(1, 5):
        run = registry.start_run(experiment="acme", name="job", params={}, tags={})
        registry.register(run, stub_adapter(folder / str(number), f"sha256:{number}", "sha256:bb"), "acme", "moved")
    return settings


@pytest.fixture
def settings(versions) -> Settings:
    """The same with version 2 as champion and version 1 as previous."""
    registry = Registry.open(versions)
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    return versions


def standing(settings: Settings) -> tuple[int, int]:
    """(champion, previous) as a fresh process reads them, the same from every question."""
    registry = Registry.open(settings)
    aliases = registry.catalog()[NAME].aliases
    for alias, version in aliases.items():
        assert registry.get(NAME, alias).version == version
        assert alias in registry.get(NAME, version).aliases
    assert {one.version: one.aliases for one in registry.versions(NAME) if one.aliases} == {
        version: tuple(sorted(alias for alias in aliases if aliases[alias] == version)) for version in aliases.values()
    }
    return aliases["champion"], aliases["previous"]


class Interrupted:
    """MLflow's client; calls `before(n)` ahead of the n-th call that writes."""

    def __init__(self, client, before) -> None:
        self._client, self._before, self._count = client, before, 0

    def __getattr__(self, name):
        found = getattr(self._client, name)
        if name not in WRITES:
            return found

        def write(*args):
            self._count += 1
            self._before(self._count)
            return found(*args)

        return write


def interrupted(settings: Settings, before) -> Registry:
    registry = Registry.open(settings)
    registry.__dict__["client"] = Interrupted(registry.client, before)
    return registry


def promote(version, **how):
    return lambda registry: registry.promote(NAME, version, **how)


def rollback(registry):
    return registry.rollback(NAME)


@pytest.mark.parametrize(
    ("first", "second", "end"),
    [
        (rollback, promote(3), (3, 1)),
        (promote(3), rollback, (2, 3)),
        (promote(3), promote(4), (4, 3)),
        (rollback, rollback, (2, 1)),
    ],
    ids=["rollback, promote", "promote, rollback", "promote, promote", "rollback, rollback"],
)
def test_a_move_beside_another_waits_for_it_and_loses_no_version(settings, first, second, end):
    half_way, go_on = threading.Event(), threading.Event()

    def pause(count):
        if count == 2:
            half_way.set()
            go_on.wait(10)

    slow, other = interrupted(settings, pause), Registry.open(settings)
    other.connect()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, slow)
        assert half_way.wait(10)
        two = pool.submit(second, other)
        with pytest.raises(TimeoutError):
            two.result(0.3)
        go_on.set()
        one.result(), two.result()
    assert standing(settings) == end


@pytest.mark.parametrize(("move", "after"), [(rollback, (1, 2)), (promote(3), (3, 2))], ids=["rollback", "promote"])
def test_a_move_that_was_killed_anywhere_is_done_or_not_and_the_next_one_works(settings, move, after):
    class Killed(BaseException):
        pass

    seen, writes = [], 0
    while True:
        writes += 1

        def kill(count, at=writes):
            if count == at:
                raise Killed

        try:
            move(interrupted(settings, kill))
        except Killed:
            seen.append(standing(settings))
            registry = Registry.open(settings)
            champion, previous = seen[-1]
            assert registry.rollback(NAME).version == previous
            assert standing(settings) == (previous, champion)
            registry.promote(NAME, 1)
            registry.promote(NAME, 2)
        else:
            break
    assert set(seen) == {(2, 1), after}
    assert seen == sorted(seen, key=(2, 1).__ne__)
    assert standing(settings) == after


def test_of_two_jobs_that_pass_against_the_same_champion_the_later_stays_candidate(settings):
    registry = Registry.open(settings)
    better, worse = registry.get(NAME, 3), registry.get(NAME, 4)
    passed = GateDecision(True, "accuracy 0.9 against 0.8 of the champion")
    assert move_alias(registry, better, passed, judged_against=2)[0] == "champion"
    alias, decision = move_alias(registry, worse, passed, judged_against=2)
    assert (alias, decision.passed) == ("candidate", False)
    assert "the champion is version 3 by now, not version 2" in decision.reason
    assert standing(settings) == (3, 2)
    assert registry.get(NAME, "candidate").gate.startswith("refused: the champion is version 3")


def test_a_first_champion_is_not_taken_over_by_a_job_that_saw_none(settings):
    with pytest.raises(ConflictError, match="champion is version 2 by now, not none"):
        Registry.open(settings).promote(NAME, 4, expected=None)


def test_a_candidate_that_is_promoted_is_no_candidate_any_more_in_the_same_step(settings):
    Registry.open(settings).set_alias(NAME, "candidate", 3)
    assert Registry.open(settings).promote(NAME, 3).aliases == ("champion",)


@pytest.mark.parametrize("url", ["sqlite:///{}/x.db", os.environ.get("PEDRO_TEST_DATABASE_URL")])
def test_of_many_that_want_the_lock_one_has_it(url, tmp_path):
    if url is None:
        pytest.skip("no PEDRO_TEST_DATABASE_URL")
    inside = SimpleNamespace(now=0, most=0)

    def enter(_):
        with exclusive(url.format(tmp_path), "acme.moved"):
            inside.now += 1
            inside.most = max(inside.most, inside.now)
            threading.Event().wait(0.02)
            inside.now -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(16)))
    assert inside.most == 1


def test_a_rollback_that_was_meant_for_another_version_moves_nothing(settings):
    registry = Registry.open(settings)
    with pytest.raises(ConflictError, match="the previous version is 1 by now"):
        registry.rollback(NAME, expected=3)
    assert standing(settings) == (2, 1)
    registry.rollback(NAME, expected=1)
    assert standing(settings) == (1, 2)


def test_a_move_asks_the_store_no_more_than_it_must_and_says_where_the_aliases_stand(settings, monkeypatch):
    registry = Registry.open(settings)
    client, asked = registry.client, []

    class Counted:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                asked.append(name)
                return getattr(client, name)(*args, **kwargs)

            return call

    monkeypatch.setitem(registry.__dict__, "client", Counted())
    assert registry.promote(NAME, 3).aliases == ("champion",)
    assert standing(settings) == (3, 2)
    reads = [name for name in asked if name.startswith("get_")]
    assert len(reads) == 4, "the adapter and the version, before and after"
    assert len(asked) - len(reads) == 5
    assert registry.rollback(NAME).aliases == ("champion",)
    assert standing(settings) == (2, 3)
