"""Adapters come and go without disturbing anybody: loads, failures, eviction, replacement."""

import json
import shutil
import threading
import time
from dataclasses import dataclass, replace

import pytest
from engine_models import (
    DIGEST,
    drain,
    make_adapter,
    make_engine,
    prompt,
    random_backbone,
    reference_greedy,
    request,
    run,
)

from pedro.adapter_directory import read_manifest, write_manifest
from pedro.engine.adapter_pool import AdapterPool
from pedro.errors import AdapterError, ConflictError, PedroError, UnavailableError


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    """Directories of adapters a0 to a3, and the models that carry them."""
    root = tmp_path_factory.mktemp("adapters")
    return root, {f"a{i}": make_adapter(model, root / f"a{i}", seed=i) for i in range(4)}


def size_of(root, model):
    engine = make_engine(model, load=lambda ref: root / ref)
    run(engine, request("r", prompt(4), 1, adapter="a0"))
    return engine.adapters.stats()["bytes"]


@dataclass
class Weights:
    nbytes: int = 10


class Shelf:
    """Loads that finish when told to."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}

    def hold(self, ref: str) -> threading.Event:
        return self.gates.setdefault(ref, threading.Event())

    def __call__(self, ref: str) -> Weights:
        self.loads.append(ref)
        if ref in self.gates:
            assert self.gates[ref].wait(60)
        if ref in self.errors:
            raise self.errors[ref]
        return Weights()


def wait_for(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
    return found


def make_pool(shelf, budget=25, loaders=2):
    return AdapterPool(shelf, budget, lambda: None, loaders)


def test_many_waiters_share_one_load():
    shelf = Shelf()
    gate = shelf.hold("a")
    pool = make_pool(shelf)
    for _ in range(20):
        pool.add_waiters("a")
        assert pool.acquire("a") is None
    gate.set()
    entries = [wait_for(lambda: pool.acquire("a")) for _ in range(20)]
    assert shelf.loads == ["a"]
    assert len({id(entry) for entry in entries}) == 1
    assert entries[0].refcount == 20


def test_a_slow_load_holds_up_no_other_adapter():
    shelf = Shelf()
    shelf.hold("slow")
    pool = make_pool(shelf)
    pool.add_waiters("slow")
    pool.add_waiters("quick")
    assert wait_for(lambda: pool.acquire("quick"))
    assert pool.acquire("slow") is None
    shelf.hold("slow").set()


def test_an_acquired_adapter_is_never_evicted():
    pool = make_pool(Shelf(), budget=20)
    held = wait_for(lambda: pool.acquire("a"))
    pool.release(wait_for(lambda: pool.acquire("b")))
    pool.release(wait_for(lambda: pool.acquire("c")))
    assert set(pool.residents()) == {"a", "c"}
    assert held.adapter is not None
    also = wait_for(lambda: pool.acquire("c"))
    pool.preload("d")
    time.sleep(0.05)
    assert pool.residents()["d"].state.value == "loading", "it waits for room"
    pool.release(also)
    wait_for(lambda: pool.residents()["d"].state.value == "ready")
    assert set(pool.residents()) == {"a", "d"}
    assert pool.stats()["bytes"] <= 20


def test_an_adapter_taken_out_before_its_turn_to_load_is_told_of_to_those_who_wait():
    shelf, changes = Shelf(), []
    gate = shelf.hold("slow")
    pool = AdapterPool(shelf, 30, lambda: changes.append(1), 1)
    pool.add_waiters("slow")
    pool.add_waiters("a")
    assert pool.evict("a")
    gate.set()
    wait_for(lambda: len(changes) == 2)
    assert shelf.loads == ["slow"]
    wait_for(lambda: pool.acquire("a"))


def test_the_least_recently_used_goes_first():
    pool = make_pool(Shelf(), budget=30)
    for ref in ("a", "b", "c", "a"):
        pool.release(wait_for(lambda ref=ref: pool.acquire(ref)))
    pool.release(wait_for(lambda: pool.acquire("d")))
    assert set(pool.residents()) == {"a", "c", "d"}
    assert pool.stats()["evictions"] == 1


def test_an_adapter_just_loaded_stays_until_one_who_waited_was_served():
    pool = make_pool(Shelf(), budget=10, loaders=2)
    pool.add_waiters("a")
    wait_for(lambda: (at := pool.residents().get("a")) and at.state.value == "ready")
    pool.add_waiters("b")
    time.sleep(0.05)
    assert pool.residents()["a"].state.value == "ready"
    pool.release(pool.acquire("a"))
    pool.remove_waiter("a")
    wait_for(lambda: pool.residents()["b"].state.value == "ready")
    assert set(pool.residents()) == {"b"}


def test_a_waiter_that_went_away_protects_nothing():
    pool = make_pool(Shelf(), budget=10)
    pool.add_waiters("a")
    wait_for(lambda: (at := pool.residents().get("a")) and at.state.value == "ready")
    pool.add_waiters("b")
    pool.remove_waiter("a")
    wait_for(lambda: "a" not in pool.residents() and pool.residents()["b"].state.value == "ready")


def test_taken_out_while_referenced_it_drains_and_loads_anew_for_others():
    shelf = Shelf()
    pool = make_pool(shelf, budget=100)
    held = wait_for(lambda: pool.acquire("a"))
    assert pool.evict("a")
    assert held.state.value == "draining"
    fresh = wait_for(lambda: pool.acquire("a"))
    assert fresh is not held
    assert (held.adapter is not None, shelf.loads) == (True, ["a", "a"])
    assert pool.stats()["bytes"] == 20, "both count while both are held"
    pool.release(held)
    assert (held.state.value, held.adapter, pool.stats()["bytes"]) == ("gone", None, 10)


def test_evicted_while_it_loads_it_never_becomes_ready():
    shelf, ended = Shelf(), []
    gate = shelf.hold("a")
    pool = AdapterPool(shelf, 25, lambda: ended.append(1), 2)
    pool.preload("a")
    wait_for(lambda: shelf.loads)
    pool.evict("a")
    gate.set()
    wait_for(lambda: ended)
    assert pool.residents() == {}
    assert pool.stats()["loads"] == 0


def test_what_is_away_for_a_moment_is_waited_for_by_those_who_need_it(monkeypatch):
    monkeypatch.setattr("pedro.engine.adapter_pool.RETRY_EVERY_S", 0.01)
    shelf = Shelf()
    shelf.errors["a"] = UnavailableError("the registry's artifact store does not answer")
    shelf.errors["b"] = OSError(28, "No space left on device")
    pool = make_pool(shelf, budget=30, loaders=1)
    pool.add_waiters("a")
    pool.add_waiters("b")
    wait_for(lambda: shelf.loads.count("a") > 2 and shelf.loads.count("b") > 2)
    pool.add_waiters("c")
    assert wait_for(lambda: pool.acquire("c")), "retries keep no loader from others"
    assert pool.take_failures() == []
    shelf.errors.clear()
    assert wait_for(lambda: pool.acquire("a"))
    assert wait_for(lambda: pool.acquire("b"))


def test_what_is_away_is_not_waited_for_by_nobody():
    shelf = Shelf()
    shelf.errors["a"] = OSError("no route to storage")
    pool = make_pool(shelf)
    pool.preload("a")
    ((_, error),) = wait_for(pool.take_failures)
    assert (error.status, error.code, error.param) == (503, "adapter_unavailable", "model")
    assert shelf.loads == ["a"]


def test_a_failed_load_is_not_tried_again_before_its_back_off(monkeypatch):
    monkeypatch.setattr("pedro.engine.adapter_pool.FIRST_BACKOFF_S", 60)
    monkeypatch.setattr("pedro.engine.adapter_pool.RETRY_FOR_S", 0)
    shelf = Shelf()
    shelf.errors["a"] = RuntimeError("secret path /srv/tenants/acme")
    pool = make_pool(shelf)
    pool.add_waiters("a")
    ((ref, error),) = wait_for(pool.take_failures)
    assert (ref, type(error)) == ("a", UnavailableError)
    assert "secret" not in error.message
    with pytest.raises(UnavailableError):
        pool.add_waiters("a")
    assert pool.acquire("a") is None
    assert shelf.loads == ["a"]
    del shelf.errors["a"]
    with pytest.raises(UnavailableError):
        pool.add_waiters("a")
    pool._failures["a"] = replace(pool._failures["a"], retry_at=time.monotonic())
    pool.add_waiters("a")
    assert wait_for(lambda: pool.acquire("a"))


def test_an_adapter_larger_than_the_budget_is_refused_and_operators_see_both_numbers(caplog):
    pool = make_pool(Shelf(), budget=5)
    pool.preload("a")
    ((_, error),) = wait_for(pool.take_failures)
    assert isinstance(error, AdapterError)
    assert "larger than the engine's memory" in error.message
    assert "5" not in error.message, "what the engine has is not for tenants"
    assert "takes 10 bytes of 5" in caplog.text


def test_a_pinned_adapter_survives_whatever_others_load_until_it_is_unpinned():
    pool = make_pool(Shelf(), budget=20)
    pool.pin("a")
    pool.pin("a")
    for ref in ("b", "c", "d"):
        pool.release(wait_for(lambda ref=ref: pool.acquire(ref)))
    assert set(pool.residents()) == {"a", "d"}
    assert [pool.residents()[ref].pinned for ref in ("a", "d")] == [True, False]
    pool.unpin("a")
    pool.unpin("never here")
    for ref in ("e", "f"):
        pool.load(ref)
    assert set(pool.residents()) == {"e", "f"}


def test_more_pinned_than_the_budget_holds_is_refused_and_undoes_nothing(caplog):
    pool = make_pool(Shelf(), budget=25)
    pool.pin("a")
    pool.pin("b")
    with pytest.raises(UnavailableError, match="c has no room beside the pinned adapters") as caught:
        pool.load("c")
    assert "pinned adapters hold 20 of the 25" in caplog.text
    assert "25" not in caught.value.message, "tenants meet this error: the figures are of others"
    pool.unpin("b")
    pool.load("c")
    held = pool.acquire("c")
    assert set(pool.residents()) == {"a", "c"}
    pool.pin("c")
    with pytest.raises(UnavailableError, match="unpin or unload"):
        pool.pin("d")
    assert {ref for ref, at in pool.residents().items() if at.pinned} == {"a", "c"}
    assert held.adapter is not None


def test_pinning_what_is_here_beyond_the_budget_of_others_is_a_conflict():
    pool = make_pool(Shelf(), budget=20)
    pool.pin("a")
    pool.load("b")
    pool.budget_bytes = 15
    with pytest.raises(ConflictError, match="15 bytes for all"):
        pool.pin("b")


def test_unloading_a_pinned_adapter_gives_its_room_back_at_once_or_once_nobody_holds_it():
    pool = make_pool(Shelf(), budget=20)
    pool.pin("a")
    pool.pin("b")
    held = pool.acquire("a")
    assert pool.evict("a")
    assert pool.evict("b")
    assert (pool.residents()["a"].state.value, pool.stats()["bytes"], pool.stats()["pinned"]) == ("draining", 10, 0)
    assert held.adapter is not None
    pool.release(held)
    assert (pool.residents(), pool.stats()["bytes"]) == ({}, 0)


def test_an_error_that_many_meet_does_not_gather_their_traces():
    shelf = Shelf()
    shelf.errors["a"] = AdapterError("damaged")
    pool = make_pool(shelf)
    depths = []
    for _ in range(5):
        with pytest.raises(AdapterError) as caught:
            pool.load("a")
        depths.append(len(caught.traceback))
    assert len(set(depths[1:])) == 1


def test_waiting_for_a_load_that_fails_raises_its_error():
    shelf = Shelf()
    shelf.errors["a"] = AdapterError("damaged")
    with pytest.raises(AdapterError, match="damaged"):
        make_pool(shelf).load("a")
    shelf.hold("slow")
    with pytest.raises(UnavailableError, match="not loaded yet"):
        make_pool(shelf).load("slow", timeout_s=0.02)
    shelf.hold("slow").set()


def test_the_books_balance_after_thousands_of_adapters_came_and_went():
    pool = make_pool(Shelf(), budget=64 * 10)
    order = [f"r{i * 7919 % 501}" for i in range(3000)]
    held = []
    for ref in order:
        pool.add_waiters(ref)
        entry = pool.acquire(ref)
        if entry is not None:
            held.append(entry)
        pool.remove_waiter(ref)
        if len(held) > 8:
            pool.release(held.pop(0))
    for entry in held:
        pool.release(entry)
    wait_for(lambda: not pool.stats()["loading"])
    at = pool.residents()
    assert pool.stats()["bytes"] == sum(entry.nbytes for entry in at.values()) <= 640
    assert pool.stats()["resident"] == len(at) == pool.stats()["loads"] - pool.stats()["evictions"]
    assert set(pool._evictable) == set(at)
    assert pool._evictable_bytes == pool.stats()["bytes"]


def test_a_closed_pool_wakes_its_loaders():
    pool = make_pool(Shelf(), budget=10)
    wait_for(lambda: pool.acquire("a"))
    pool.preload("b")
    pool.close()
    for thread in pool._threads:
        thread.join(60)
        assert not thread.is_alive()


def test_more_adapters_than_fit_are_all_served(model, store):
    root, references = store
    engine = make_engine(model, load=lambda ref: root / ref, adapter_bytes=2 * size_of(root, model) + 10, max_batch=2)
    requests = [request(f"r{i}", prompt(5 + i, i), 4, adapter=f"a{i % 4}", tenant=f"t{i % 4}") for i in range(16)]
    answers = run(engine, *requests)
    for i in range(16):
        expected = reference_greedy(references[f"a{i % 4}"], prompt(5 + i, i), 4)
        assert answers[f"r{i}"].token_ids[: len(expected)] == expected
    assert engine.adapters.stats()["bytes"] <= engine.adapters.stats()["budget_bytes"]


def test_eviction_and_replacement_change_nothing_for_a_running_request(model, store, tmp_path):
    root, references = store
    shutil.copytree(root / "a0", tmp_path / "live")
    engine = make_engine(model, load=lambda ref: tmp_path / "live")
    expected = reference_greedy(references["a0"], prompt(7), 12)
    assert len(expected) > 6
    engine.add(request("running", prompt(7), 12, adapter="live"))
    answers = drain(engine, until=lambda a: "running" in a and len(a["running"].token_ids) >= 3)
    shutil.rmtree(tmp_path / "live")
    shutil.copytree(root / "a1", tmp_path / "live")
    engine.adapters.evict("live")
    assert engine.adapters.residents() == {}
    engine.add(request("new", prompt(7), 12, adapter="live"))
    rest = drain(engine)
    made = answers["running"].token_ids + rest["running"].token_ids
    assert made[: len(expected)] == expected
    replaced = reference_greedy(references["a1"], prompt(7), 12)
    assert rest["new"].token_ids[: len(replaced)] == replaced
    assert made != rest["new"].token_ids


def test_one_failed_load_fails_its_own_requests_only(model, store, monkeypatch):
    monkeypatch.setattr("pedro.engine.adapter_pool.RETRY_FOR_S", 0)
    root, _ = store
    asked = threading.Event()

    def load(ref):
        assert asked.wait(60)
        if ref == "broken":
            raise OSError("no route to storage")
        return root / ref

    engine = make_engine(model, load=load)
    for i in range(3):
        engine.add(request(f"bad{i}", prompt(6), 4, adapter="broken", tenant=f"t{i}"))
        engine.add(request(f"good{i}", prompt(6), 4, adapter="a0", tenant=f"t{i}"))
        engine.add(request(f"bare{i}", prompt(6), 4, tenant=f"t{i}"))
    asked.set()
    answers = drain(engine)
    for i in range(3):
        assert isinstance(answers[f"bad{i}"].last.error, UnavailableError)
        assert answers[f"bad{i}"].token_ids == []
        assert len(answers[f"good{i}"].token_ids) == len(answers[f"bare{i}"].token_ids) == 4
    with pytest.raises(UnavailableError):
        engine.add(request("again", prompt(6), 4, adapter="broken"))
    assert engine.stats()["waiting"] == 0


def test_an_adapter_of_another_backbone_is_refused_with_both_digests(model, tmp_path):
    make_adapter(model, tmp_path / "foreign", seed=1, digest="sha256:another")
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    engine.add(request("r", prompt(6), 4, adapter="foreign"))
    error = drain(engine)["r"].last.error
    assert isinstance(error, AdapterError)
    assert "sha256:another" in error.message
    assert DIGEST in error.message


def test_a_method_that_mixed_batches_do_not_serve_is_refused_by_name(model, tmp_path):
    make_adapter(model, tmp_path / "other", seed=1, method="lpt")
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    engine.add(request("r", prompt(6), 4, adapter="other"))
    error = drain(engine)["r"].last.error
    assert isinstance(error, AdapterError)
    assert "LATE_PROMPT" in error.message


def test_weights_that_do_not_fit_their_config_are_refused(model, store, tmp_path):
    root, _ = store
    shutil.copytree(root / "a0", tmp_path / "a0")
    path = tmp_path / "a0" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 7}))
    for message in ("config_digest: the config is", "expected [32, 7]"):
        engine = make_engine(model, load=lambda ref: tmp_path / ref)
        engine.add(request("r", prompt(6), 4, adapter="a0"))
        error = drain(engine)["r"].last.error
        assert isinstance(error, AdapterError)
        assert message in error.message
        write_manifest(path.parent, read_manifest(path.parent))


def test_a_request_cancelled_while_its_adapter_loads_leaves_nothing_behind(model, store):
    root, _ = store
    gate = threading.Event()

    def load(ref):
        assert gate.wait(60)
        return root / ref

    engine = make_engine(model, load=load)
    engine.add(request("r", prompt(6), 4, adapter="a0"))
    engine.step()
    engine.cancel("r")
    assert drain(engine)["r"].last.finish_reason == "cancelled"
    gate.set()
    wait_for(lambda: engine.adapters.stats()["resident"])
    assert (engine.stats()["waiting"], engine.adapters.residents()["a0"].refcount) == (0, 0)


def test_unknown_adapters_are_never_answered_by_the_bare_backbone(model):
    def load(ref):
        raise PedroError(f"no such adapter {ref}")

    engine = make_engine(model, load=load)
    engine.add(request("r", prompt(6), 4, adapter="nobody's"))
    last = drain(engine)["r"].last
    assert (last.finish_reason, last.completion_tokens) == ("error", 0)
