"""Moves of aliases beside each other, broken off half way, and as a real sqlite MLflow store shows them."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import sqlalchemy
from serving_adapters import settings_at, stub_adapter
from typer.testing import CliRunner

from pedro.cli import app
from pedro.config import Settings
from pedro.errors import ConfigError, ConflictError, NotFoundError, PedroError
from pedro.registry import Registry
from pedro.store import aliases, exclusive
from pedro.training.job import move_alias
from pedro.training.promotion_gate import GateDecision

NAME = "acme.moved"


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
def settings(versions, tmp_path) -> Settings:
    """A copy of it, with version 2 as champion and version 1 as previous."""
    shutil.copytree(versions.home, tmp_path / "home")
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    registry = Registry.open(settings)
    registry.promote(NAME, 1)
    registry.promote(NAME, 2)
    return settings


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


def in_mlflow(registry: Registry) -> dict[str, int]:
    """The aliases that MLflow's pages show."""
    aliases = registry.client.get_registered_model(NAME).aliases
    return {alias: int(version) for alias, version in aliases.items()}


class Away:
    """MLflow's client while its server is away."""

    def __getattr__(self, name):
        from mlflow.exceptions import MlflowException

        raise MlflowException("no answer")


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
def test_a_move_beside_another_waits_for_it_and_loses_no_version(settings, monkeypatch, first, second, end):
    half_way, go_on = threading.Event(), threading.Event()
    announce = aliases.announce

    def pause(*arguments):
        monkeypatch.setattr(aliases, "announce", announce)
        half_way.set()
        go_on.wait(60)
        announce(*arguments)

    slow, other = Registry.open(settings), Registry.open(settings)
    assert slow.store.url == other.store.url
    monkeypatch.setattr(aliases, "announce", pause)  # all is written, and nothing committed
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, slow)
        assert half_way.wait(60)
        assert standing(settings) == (2, 1)
        two = pool.submit(second, other)
        with pytest.raises(TimeoutError):
            two.result(0.3)
        go_on.set()
        one.result(), two.result()
    assert standing(settings) == end
    slow.mirror()
    assert in_mlflow(slow) == slow.catalog()[NAME].aliases


@pytest.mark.parametrize(("move", "after"), [(rollback, (1, 2)), (promote(3), (3, 2))], ids=["rollback", "promote"])
def test_a_move_that_was_killed_anywhere_is_done_or_not_and_the_next_one_works(settings, move, after):
    """At each statement of its transaction."""

    class Killed(BaseException):
        pass

    seen, statements, again = [], 0, Registry.open(settings)
    while True:
        statements += 1
        left = [statements]
        registry = Registry.open(settings)

        @sqlalchemy.event.listens_for(registry.store._database._engine, "before_cursor_execute")
        def kill(*_, left=left):
            left[0] -= threading.current_thread() is threading.main_thread()
            if not left[0]:
                raise Killed

        try:
            move(registry)
        except Killed:
            seen.append(standing(settings))
        else:
            break
        champion, previous = standing(settings)
        assert again.rollback(NAME).version == previous
        assert standing(settings) == (previous, champion)
        again.promote(NAME, 1)
        again.promote(NAME, 2)
    assert len(seen) > 5
    assert set(seen) == {(2, 1)}
    assert standing(settings) == after


def test_mlflow_shows_each_move_and_is_not_waited_for(settings, caplog):
    registry = Registry.open(settings)
    registry.set_alias(NAME, "candidate", 4)
    assert in_mlflow(registry) == {"champion": 2, "previous": 1, "candidate": 4}
    registry.promote(NAME, 4)
    assert in_mlflow(registry) == {"champion": 4, "previous": 2}
    assert registry.store.unmirrored() == []
    away = Registry.open(settings)
    away.__dict__["client"] = Away()
    assert away.rollback(NAME).version == 2
    assert "could not be updated" in caplog.text
    assert standing(settings) == (2, 4)
    assert in_mlflow(registry) == {"champion": 4, "previous": 2}
    assert away.mirror() == [NAME] == registry.store.unmirrored()
    assert registry.mirror() == []
    assert in_mlflow(registry) == {"champion": 2, "previous": 4}


def test_a_deletion_that_mlflow_has_not_heard_of_holds_and_the_name_can_be_had_again(tmp_path):
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)

    def add(mark):
        run = registry.start_run(experiment="acme", name="job", params={}, tags={})
        return registry.register(run, stub_adapter(tmp_path / mark, mark, "sha256:bb"), "acme", "again")

    add("one"), add("two"), add("three")
    registry.promote("acme.again", 2)
    registry.delete("acme.again", 1)
    assert sorted(int(v.version) for v in registry.client.search_model_versions("name='acme.again'")) == [2, 3]
    away = Registry.open(settings)
    away.__dict__["client"] = Away()
    away.delete("acme.again", 3)
    assert [version.version for version in registry.versions("acme.again")] == [2]
    away.delete("acme.again")
    assert registry.models() == []
    with pytest.raises(NotFoundError):
        registry.get("acme.again")
    new = add("four")
    assert (new.version, registry.catalog()["acme.again"].aliases) == (1, {})
    assert [int(v.version) for v in registry.client.search_model_versions("name='acme.again'")] == [1]
    assert registry.store.unmirrored() == []


def test_a_version_that_somebody_deleted_in_mlflow_stops_no_move(settings, caplog):
    registry = Registry.open(settings)
    registry.client.delete_registered_model_alias(NAME, "champion")
    registry.client.set_registered_model_alias(NAME, "mine", "1")
    registry.promote(NAME, 3)
    assert in_mlflow(registry) == {"champion": 3, "previous": 2}
    assert standing(settings) == (3, 2)


def test_racing_moves_leave_mlflow_as_the_store_is(settings):
    registry = Registry.open(settings)
    registry.connect()

    def move(number):
        with suppress(PedroError):
            registry.rollback(NAME) if number % 3 else registry.promote(NAME, 1 + number % 4)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(move, range(30)))
    assert registry.mirror() == []
    assert in_mlflow(registry) == registry.catalog()[NAME].aliases


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


def test_of_many_that_want_the_lock_one_has_it(url):
    inside = SimpleNamespace(now=0, most=0)

    def enter(_):
        with exclusive(url, "acme.moved"):
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


def test_the_command_line_splits_an_alias_and_tells_how_it_was_moved(settings, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(settings.home))

    def pedro(*words, code=0):
        done = CliRunner().invoke(app, ["adapters", *words])
        assert (done.exit_code if not isinstance(done.exception, PedroError) else 1) == code, done.output
        return done

    assert "acme.moved:3 answers 12.5% of acme.moved" in pedro("canary", NAME, "3", "--weight", "0.125").output
    assert "v2 " in pedro("list").output
    listed = json.loads(pedro("list", "--json").stdout)
    assert listed[0]["canary"] == {"version": 3, "weight": 0.125}
    told = pedro("history", NAME).output
    for part in ("canary", "champion=v2 previous=v1 canary=v3 (12.5%)", "promote", "user:"):
        assert part in told
    moves = json.loads(pedro("history", NAME, "--limit", "2", "--json").stdout)
    assert [move["action"] for move in moves] == ["canary", "promote"]
    assert (
        "acme.moved:3 is asked 50.0% of what acme.moved answers" in pedro("shadow", NAME, "3", "--weight", "0.5").output
    )
    assert "shadow: v3 (50.0%): 0 answers as the champion's, 0 different" in pedro("show", NAME).output
    shown = {row["version"]: row.get("shadow") for row in json.loads(pedro("show", NAME, "--json").stdout)}
    assert shown[3]["weight"] == 0.5
    assert shown[1] is None
    assert "canary=v3 (12.5%) shadow=v3 (50.0%)" in pedro("history", NAME, "--limit", "1").output
    assert "is no longer a shadow" in pedro("shadow", NAME, "3", "--weight", "0").output
    assert "is no longer a canary" in pedro("canary", NAME, "3", "--weight", "0").output
    assert isinstance(pedro("canary", NAME, "2", "--weight", "0.5", code=1).exception, ConflictError)
    assert "canary" not in json.loads(pedro("list", "--json").stdout)[0]


@pytest.mark.parametrize("weight", [1.0, -0.1, float("nan")])
def test_a_weight_that_is_no_share_is_refused(settings, weight):
    with pytest.raises(ConfigError, match="weight"):
        Registry.open(settings).canary(NAME, 3, weight)


def test_a_move_asks_mlflow_no_more_than_it_must_and_says_where_the_aliases_stand(settings, monkeypatch):
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
    assert sorted(asked) == [
        "get_registered_model",
        "set_model_version_tag",
        "set_registered_model_alias",
        "set_registered_model_alias",
    ]
    assert registry.rollback(NAME).aliases == ("champion",)
    assert standing(settings) == (2, 3)
