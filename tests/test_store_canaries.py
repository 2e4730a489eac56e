"""A canary that does worse than the champion beside it is withdrawn, once; one that does as well stays."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from audit_entries import last_audit
from scipy import stats
from store_moves import NAME, fill

from pedro.gateway.backend import GenerateCall
from pedro.serving.backend import share_of
from pedro.store import AnswerCounts, Store
from pedro.store.canary_rule import LEAST, LEVEL, judge_errors, judge_scores

CHAMPION, CANARY = 1, 2


@pytest.fixture
def store(url):
    opened = Store(url)
    fill(opened, 3)
    opened.promote(NAME, CHAMPION)
    opened.set_canary(NAME, CANARY, 0.1)
    yield opened
    opened.close()


def weight(store):
    standing = store.get_adapter(NAME).standing
    return None if standing.canary is None else standing.canary.weight


def moves(store):
    return [move for move in store.alias_history(NAME) if move.action == "withdraw"]


def answers(count, errors=0):
    return AnswerCounts(count, errors)


def withdrawn(seed, failing, canaries):
    """How many are withdrawn within 6,000 requests, 10 % of them theirs, beside a champion that fails at 2 %."""
    chance = np.random.default_rng(seed)
    found = 0
    for _ in range(canaries):
        canary, champion, looks = answers(0), answers(0), 0
        for met in chance.binomial(100, 0.1, size=60):
            canary += answers(int(met), int(chance.binomial(met, failing)))
            champion += answers(100 - int(met), int(chance.binomial(100 - met, 0.02)))
            looks, reason = judge_errors(canary, champion, looks)
            if reason:
                found += 1
                break
    return found


def test_a_bad_canary_is_withdrawn_and_one_as_good_as_the_champion_is_not():
    assert withdrawn(1, failing=0.3, canaries=50) == 50
    assert withdrawn(2, failing=0.02, canaries=1000) <= 1000 * LEVEL


@pytest.mark.parametrize(("canary", "champion"), [((50, 5), (500, 10)), ((80, 80), (90, 0)), ((400, 3), (300, 2))])
def test_failures_are_compared_by_fishers_exact_test(canary, champion):
    (n, errors), (others, their_errors) = canary, champion
    p = stats.fisher_exact([[errors, n - errors], [their_errors, others - their_errors]], "greater").pvalue
    looks, reason = judge_errors(answers(*canary), answers(*champion), 0)
    assert looks == 1
    assert bool(reason) == (p < LEVEL / 2)
    assert not reason or f"{errors} of {n} answers of the canary failed, of the champion {their_errors}" in reason
    assert not reason or f"p = {p:.2g} at level 0.005" in reason


def test_nothing_is_compared_before_both_sides_have_enough_and_then_at_each_doubling():
    assert judge_errors(answers(LEAST - 1, LEAST - 1), answers(5000), 0) == (0, "")
    assert judge_errors(answers(5000, 5000), answers(LEAST - 1), 0) == (0, "")
    assert judge_errors(answers(LEAST, LEAST), answers(LEAST), 0)[1]
    assert judge_errors(answers(2 * LEAST - 1, LEAST), answers(5000), 1) == (1, "")
    assert "at level 0.0025" in judge_errors(answers(2 * LEAST, LEAST), answers(5000), 1)[1]


@pytest.mark.parametrize(("mean", "bad"), [(0.2, True), (0.7, False), (0.9, False)])
def test_scores_are_compared_by_welchs_test(mean, bad):
    chance = random.Random(3)
    ours, theirs = ([min(1.0, max(0.0, chance.gauss(at, 0.2))) for _ in range(200)] for at in (mean, 0.7))
    canary, champion = (sum(map(AnswerCounts.scored, side), AnswerCounts()) for side in (ours, theirs))
    looks, reason = judge_scores(canary, champion, 0)
    assert (looks, bool(reason)) == (1, bad)
    assert bad == (stats.ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue < LEVEL / 2)
    alike = sum([AnswerCounts.scored(1.0)] * LEAST, AnswerCounts())
    assert judge_scores(alike, alike, 0) == (1, "")


def test_a_canary_is_withdrawn_by_one_move_with_the_numbers_in_history_and_audit(store):
    assert store.add_answers(NAME, {CHAMPION: answers(500, 5), CANARY: answers(49, 20)}) == (True, False)
    assert weight(store) == 0.1
    assert store.add_answers(NAME, {CANARY: answers(1)}) == (True, True)
    assert weight(store) is None
    (move,) = moves(store)
    assert move.actor == "platform:canary"
    assert move.reason.startswith(
        "20 of 50 answers of the canary failed, of the champion 5 of 500: Fisher's exact test"
    )
    entry = next(entry for entry in last_audit(store) if entry.action == "adapter.withdraw")
    assert (entry.tenant, entry.subject, entry.actor) == ("acme", NAME, "platform:canary")
    assert entry.before["canary"] == {"version": CANARY, "weight": 0.1}
    assert entry.after == {"aliases": {"champion": CHAMPION}, "reason": move.reason}


def test_of_several_gateways_one_withdraws(store):
    gateways = [Store(store.url) for _ in range(4)]
    sides = {CHAMPION: answers(60), CANARY: answers(60, 60)}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: gateways[number % 4].add_answers(NAME, sides), range(16)))
    for gateway in gateways:
        gateway.close()
    assert sum(done for _, done in found) == len(moves(store)) == 1
    assert weight(store) is None


def test_what_was_found_is_done_by_the_next_count_where_the_process_died_in_between(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Store, "withdraw_canary", lambda *_, **__: False)
        store.add_answers(NAME, {CHAMPION: answers(60), CANARY: answers(60, 60)})
    assert weight(store) == 0.1
    assert store.add_answers(NAME, {CHAMPION: answers(1)}) == (True, True)
    assert weight(store) is None


def test_aliases_that_moved_meanwhile_are_left_as_they_are(store):
    seen = store.get_adapter(NAME).generation
    store.set_canary(NAME, 3, 0.5)
    assert not store.withdraw_canary(NAME, CANARY, "", generation=seen)
    assert not store.withdraw_canary("acme.nothing", CANARY, "", generation=seen)
    assert weight(store) == 0.5
    assert moves(store) == []


def test_each_canary_and_each_champion_begins_with_no_answers_and_another_weight_goes_on(store):
    most, rest = {CHAMPION: answers(40), CANARY: answers(40, 40)}, {CHAMPION: answers(10), CANARY: answers(10, 10)}
    store.add_answers(NAME, most)
    store.set_canary(NAME, CANARY, 0)
    assert store.add_answers(NAME, {CANARY: answers(9)}) == (False, False)  # it is none any more
    store.set_canary(NAME, CANARY, 0.2)
    assert store.add_answers(NAME, rest) == (True, False)
    store.set_canary(NAME, 3, 0.2)
    assert store.add_answers(NAME, {CHAMPION: answers(40), CANARY: answers(40, 40), 3: answers(3)}) == (True, False)
    store.set_canary(NAME, CANARY, 0.1)
    store.add_answers(NAME, most)
    store.set_canary(NAME, CANARY, 0.2)
    assert store.add_answers(NAME, rest) == (True, True)
    assert moves(store)[0].reason.startswith("50 of 50 answers of the canary failed, of the champion 0 of 50:")
    store.delete_adapter(NAME)
    assert store.add_answers(NAME, {CANARY: answers(9)}) == (False, False)


def test_a_canary_gets_its_share_of_5000_requests_and_every_user_the_same_version_each_time():
    def share(user):
        return share_of(GenerateCall(f"cmpl-{random.random()}-0", "acme", NAME, "hello", user=user), CANARY)

    users = [f"user {number}" for number in range(5000)]
    met = [share(user) < 0.1 for user in users]
    assert 0.09 <= sum(met) / len(met) <= 0.11
    assert [share(user) < 0.1 for user in users] == met
