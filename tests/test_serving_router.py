"""Which replica a call goes to: adapters have homes, and no home takes more than its share."""

from collections import Counter

import numpy as np
import pytest

from pedro.refs import ModelRef
from pedro.serving.router import SHARE, choose, key_of, pick, ranks

REPLICAS = [f"replica-{i}" for i in range(4)]


def spread(calls, replicas=REPLICAS):
    """Route calls that never end, one after the other; where each adapter went."""
    loads = dict.fromkeys(replicas, 0)
    homes = {}
    for ref in calls:
        replica = choose(ref, loads)
        loads[replica] += 1
        homes.setdefault(ref, Counter())[replica] += 1
    return homes, loads


def test_an_adapter_with_little_load_has_one_home_and_homes_are_spread():
    idle = dict.fromkeys(REPLICAS, 0)
    homes = {ref: choose(ref, idle) for ref in (ModelRef.parse(f"acme.a{i}:1") for i in range(400))}
    assert homes == {ref: choose(ref, idle) for ref in homes}
    assert all(60 < count < 140 for count in Counter(homes.values()).values())


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_a_hot_adapter_is_never_pinned_to_one_replica_and_takes_no_more_than_a_share_of_each(num_replicas):
    homes, loads = spread([ModelRef.parse("acme.hot:1")] * 100, REPLICAS[:num_replicas])
    assert len(homes[ModelRef.parse("acme.hot:1")]) == num_replicas
    assert max(loads.values()) <= SHARE * 100 / num_replicas + 1


def test_cold_adapters_keep_their_homes_beside_a_hot_one():
    idle = dict.fromkeys(REPLICAS, 0)
    cold = [ModelRef.parse(f"acme.cold{i}:1") for i in range(40)]
    calls = [ref for one in cold for ref in (ModelRef.parse("acme.hot:1"), ModelRef.parse("acme.hot:1"), one)]
    homes, loads = spread(calls)
    assert max(loads.values()) <= SHARE * len(calls) / len(REPLICAS) + 1
    at_home = sum(homes[ref][choose(ref, idle)] for ref in cold)
    assert at_home > len(cold) / 2


def test_a_replica_that_leaves_moves_only_what_was_its_own():
    idle = dict.fromkeys(REPLICAS, 0)
    fewer = dict.fromkeys(REPLICAS[:-1], 0)
    for i in range(200):
        before = choose(ModelRef.parse(f"acme.a{i}:1"), idle)
        assert before == REPLICAS[-1] or choose(ModelRef.parse(f"acme.a{i}:1"), fewer) == before


def test_a_choice_is_the_best_liked_replica_below_the_bound_however_many_there_are():
    names = [f"r{i}" for i in range(50)]
    loads = {name: i % 5 for i, name in enumerate(names)}  # 2 in the mean: up to 2 may take one more
    liked = ranks(key_of("acme.a:1"), np.array([key_of(name) for name in names], dtype=np.uint64))
    order = sorted(range(50), key=lambda i: int(liked[i]), reverse=True)
    expected = next(i for i in order if loads[names[i]] < 3)
    assert pick(liked, np.array(list(loads.values()))) == expected
    assert choose(ModelRef.parse("acme.a:1"), loads) == names[expected]
    assert pick(liked, np.array(list(loads.values())), share=9.0) == order[0]


def test_the_bare_backbone_goes_to_the_least_loaded_replica():
    assert choose(None, {"a": 3, "b": 1, "c": 2}) == "b"
    _, loads = spread([None] * 40)
    assert set(loads.values()) == {10}


def test_calls_of_other_ingresses_count():
    loads = {"a": 50, "b": 0}
    assert {choose(ModelRef.parse(f"acme.a{i}:1"), loads) for i in range(20)} == {"b"}
