"""Shadows in the store: when one begins and ends, and what is counted of it; on sqlite and on PostgreSQL."""

import pytest
from audit_entries import last_audit
from store_moves import NAME, fill

from pedro.errors import ConfigError, ConflictError, NotFoundError
from pedro.store import Shadow, ShadowCounts, Store

ONE = ShadowCounts(same=1, seconds=2.0, champion_seconds=1.0)


@pytest.fixture
def store(url):
    opened = Store(url)
    fill(opened, 4)
    opened.promote(NAME, 1)
    opened.promote(NAME, 2)
    yield opened
    opened.close()


def standing(store):
    return store.get_adapter(NAME).standing


def test_a_shadow_stands_beside_champion_and_canary_until_it_is_ended(store):
    store.set_canary(NAME, 3, 0.1)
    store.set_shadow(NAME, 4, 1.0)
    assert standing(store).shadow == Shadow(4, 1.0)
    assert standing(store).to_dict() == {
        "aliases": {"champion": 2, "previous": 1},
        "canary": {"version": 3, "weight": 0.1},
        "shadow": {"version": 4, "weight": 1.0},
    }
    assert 4 in store.look_up([NAME])[NAME].versions, "gateways know it without asking again"
    store.set_shadow(NAME, 4, 0)
    assert (standing(store).shadow, standing(store).canary.version) == (None, 3)
    assert [move.action for move in store.alias_history(NAME, 2)] == ["shadow", "shadow"]
    assert last_audit(store, "acme")[0].action == "adapter.shadow"


@pytest.mark.parametrize(
    ("version", "weight", "error"),
    [(2, 0.5, ConflictError), (4, 1.5, ConfigError), (4, -0.1, ConfigError), (9, 0.5, NotFoundError)],
)
def test_what_is_no_share_or_no_other_version_is_refused(store, version, weight, error):
    with pytest.raises(error):
        store.set_shadow(NAME, version, weight)
    fill(store, 1, "acme.new")
    with pytest.raises(ConflictError, match="has no champion that a shadow"):
        store.set_shadow("acme.new", 1, 0.5)
    assert standing(store).shadow is None


@pytest.mark.parametrize("move", ["promote", "rollback", "delete_version"])
def test_it_ends_with_its_version_and_with_its_champion(store, move):
    store.set_shadow(NAME, 4, 0.5)
    assert store.add_shadow_answers(NAME, 4, 2, ONE)
    with pytest.raises(ConflictError, match=f"{NAME}:4 is shadow"):
        store.retire_version(NAME, 4, 0.0)
    getattr(store, move)(NAME, *({"promote": [3], "delete_version": [4]}.get(move, [])))
    assert standing(store).shadow is None
    assert not store.add_shadow_answers(NAME, 4, 2, ONE)
    assert store.shadow_answers(NAME) is None


def test_only_what_the_two_that_stand_together_answered_is_counted_and_another_begins_with_nothing(store):
    assert not store.add_shadow_answers(NAME, 4, 2, ONE)
    assert not store.add_shadow_answers("acme.unknown", 4, 2, ONE)
    store.set_shadow(NAME, 4, 0.5)
    assert store.shadow_answers(NAME) == ShadowCounts()
    assert not store.add_shadow_answers(NAME, 3, 2, ONE)
    assert not store.add_shadow_answers(NAME, 4, 1, ONE)
    assert store.add_shadow_answers(NAME, 4, 2, ONE)
    store.set_shadow(NAME, 4, 0.1)  # another weight goes on
    assert store.add_shadow_answers(NAME, 4, 2, ShadowCounts(different=1, errors=2, skipped=3, seconds=1.0))
    assert store.shadow_answers(NAME) == ShadowCounts(1, 1, 2, 3, 3.0, 1.0)
    assert store.shadow_answers(NAME).to_dict() == {
        "same": 1, "different": 1, "errors": 2, "skipped": 3, "mean_seconds": 1.5, "champion_mean_seconds": 0.5
    }  # fmt: skip
    store.set_shadow(NAME, 3, 0.1)
    assert store.shadow_answers(NAME) == ShadowCounts()
    store.set_alias(NAME, "champion", 1)  # another champion beside it
    assert store.add_shadow_answers(NAME, 3, 1, ONE)
    assert store.shadow_answers(NAME) == ONE
    store.delete_adapter(NAME)
    assert store.shadow_answers(NAME) is None
    store.mirrored(store.to_mirror(NAME).adapter)
    fill(store, 4)
    store.promote(NAME, 1)
    store.set_shadow(NAME, 3, 0.1)
    assert store.shadow_answers(NAME) == ShadowCounts(), "a name made again is another adapter"
