"""Whose cached prompts go where room is needed: by count, and beside a slow reference."""

import random

from pedro.engine.prefix_entries import IDLE_S, PrefixEntries


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def entries_of(units, clock=None):
    """Room for so many entries of one unit each."""
    return PrefixEntries(100 * units, units, clock or Clock())


def keep(entries, tenant, *names):
    """Keep entries of these names, one by one; gives those that found room."""
    kept = []
    for name in names:
        taken = entries.take((tenant, name), tenant, None, 100)
        if taken is not None:
            entries.add([taken])
            kept.append(taken)
    return kept


def has(entries, tenant):
    return sorted(entry.key[1] for entry in entries.all() if entry.tenant == tenant)


def test_a_flood_takes_nothing_from_who_has_no_more_than_an_equal_part():
    entries = entries_of(10)
    keep(entries, "quiet", *"abcd")
    keep(entries, "flood", *range(100))
    assert has(entries, "quiet") == list("abcd")
    assert has(entries, "flood") == list(range(94, 100)), "the least recently used of its own go"


def test_who_has_most_gives_to_who_comes_until_they_have_alike():
    entries = entries_of(10)
    keep(entries, "first", *range(10))
    keep(entries, "second", *range(20))
    assert (len(has(entries, "first")), len(has(entries, "second"))) == (5, 5)
    keep(entries, "third", *range(20))
    assert sorted(len(has(entries, name)) for name in ("first", "second", "third")) == [3, 3, 4]


def test_a_lone_tenant_has_all_of_it():
    entries = entries_of(10)
    keep(entries, "one", *range(30))
    assert has(entries, "one") == list(range(20, 30))


def test_who_was_not_seen_for_long_gives_first_whatever_it_has():
    clock = Clock()
    entries = entries_of(10, clock)
    keep(entries, "gone", *"ab")
    clock.now += IDLE_S - 1
    keep(entries, "busy", *range(9))
    assert has(entries, "gone") == list("ab")
    clock.now += 2
    keep(entries, "busy", "more")
    assert has(entries, "gone") == ["b"]


def test_what_is_referred_to_stays_and_at_most_half_may_be_for_long():
    entries = entries_of(10)
    read = keep(entries, "reader", *range(10))
    assert entries.readable(read) == 5
    entries.refer(read[:5])
    assert entries.readable(read[5:]) == 0
    assert entries.readable(read[3:7]) == 2, "what others read costs nothing more"
    keep(entries, "other", *range(20))
    assert has(entries, "reader") == list(range(5))
    assert has(entries, "other") == list(range(15, 20))
    assert keep(entries, "reader", "new") == [], "it takes none from who has no more, and its own are read"
    entries.let_go(read[:5])
    assert entries.held_bytes == 0
    assert len(keep(entries, "reader", "new")) == 1


def test_what_is_held_until_requests_begin_lets_nobody_refer_to_more_than_half():
    entries = entries_of(10)
    read = keep(entries, "reader", *range(8))
    entries.refer(read)  # by one that has not begun, of which it may keep five
    assert entries.readable(read) == 0
    entries.refer(read[:5])
    entries.let_go(read)
    assert entries.readable(read) == 5


def test_a_tenant_that_has_something_read_is_not_idle():
    clock = Clock()
    entries = entries_of(10, clock)
    read = keep(entries, "reads", *"ab")
    entries.refer(read[:1])
    clock.now += IDLE_S + 1
    keep(entries, "busy", *range(20))
    assert has(entries, "reads") == list("ab")


def test_the_end_of_a_prompt_goes_before_its_beginning_however_it_was_used():
    entries = entries_of(4)
    made = [entries.take(("t", at), "t", None, 100) for at in range(4)]
    entries.add(made)
    entries.refer(made[:2])
    entries.refer(made[:3])
    entries.let_go(made[:2])
    entries.let_go(made[:3])
    going = []
    for name in "abcd":
        before = set(has(entries, "t"))
        taken = entries.take(("t", name), "t", None, 100)
        going += before - set(has(entries, "t"))
        assert taken is not None
    assert going == [3, 2, 1, 0]


def test_what_is_dropped_while_it_is_read_gives_its_room_back_with_its_reader():
    entries = entries_of(2)
    (one,) = keep(entries, "t", "one")
    entries.refer([one])
    entries.drop(one)
    assert (entries.get(one.key), entries.used_bytes, len(entries.free)) == (None, 100, 1)
    entries.let_go([one])
    assert (entries.used_bytes, entries.held_bytes, len(entries.free)) == (0, 0, 2)
    assert entries.bytes_by_adapter == {}


def slow_choice(entries, last_used, seen, asking, now):
    """What must go, from the rule as it is written down: looks at everything."""
    free = [entry for entry in entries.all() if not entry.refcount]
    size = {name: sum(e.nbytes for e in entries.all() if e.tenant == name) for name in (asking, *seen)}
    owners = {entry.tenant for entry in free}
    if not owners:
        return None
    reading = {entry.tenant for entry in entries.all() if entry.refcount}
    idle = [name for name in owners - reading if seen[name] <= now - IDLE_S]
    if idle:
        given = {min(idle, key=seen.__getitem__)}
    else:
        most = max(size[name] for name in owners)
        given = {name for name in owners if size[name] == most} if most > size[asking] else {asking}
    return [min((e for e in free if e.tenant == name), key=last_used.__getitem__, default=None) for name in given]


def test_what_goes_is_what_the_rule_says_over_any_history():
    for seed in range(20):
        rng, clock = random.Random(seed), Clock()
        entries = entries_of(12, clock)
        last_used, seen, held, ticks = {}, {}, [], iter(range(10**6))
        for number in range(200):
            clock.now += rng.choice((1.0, 1.0, 1.0, IDLE_S / 2))
            tenant = rng.choice("aaabc")
            expected = slow_choice(entries, last_used, seen, tenant, clock.now)
            if rng.random() < 0.6:
                if entries.used_bytes == entries.budget_bytes:
                    going = entries._next_to_go(tenant)
                    assert going in (expected or [None]), (seed, number)
                made = keep(entries, tenant, number)
            else:
                made = rng.sample(entries.all(), min(len(entries), 1))
                entries.refer(made)
                held.append(made)
                if len(held) > 3:
                    made = held.pop(rng.randrange(len(held)))
                    entries.let_go(made)
                else:
                    made = []
            for entry in made:
                last_used[entry], seen[entry.tenant] = next(ticks), clock.now
        for made in held:
            entries.let_go(made)
        assert entries.held_bytes == 0
        assert entries.used_bytes == 100 * len(entries) == 1200 - 100 * len(entries.free)
