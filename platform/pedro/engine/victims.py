"""Which running sequences are preempted so that others can start or grow.

Sequences that generated few tokens since their last start, or will end soon, are spared if another can be preempted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.engine.schedule import KVRoom
    from pedro.engine.sequence import Sequence
    from pedro.engine.shares import Shares, Tenant

SOON = 32  # tokens: a sequence with no more left than these ends soon


def to_grow(running: Iterable[Sequence], owner: Callable[[Sequence], Tenant]) -> Sequence:
    """The sequence to preempt if running ones need more blocks than there are: the youngest of the tenant furthest
    ahead."""
    alone = (one for one in running if one.width == 1)
    return max(alone, key=lambda one: (one.preemptible, one.tokens_left > SOON, owner(one).counter, one.order))


class Room:
    """The slots and blocks that `head` needs, and whether preempting others provides them."""

    def __init__(self, head: Sequence, kv: KVRoom, slots: int, running: list[Sequence]) -> None:
        """`slots` are missing in addition to the free ones."""
        self._slots, self._head, self._kv = slots, head, kv
        self._growing = kv.growing(running)

    def there(self, gone: list[Sequence]) -> bool:
        """Whether there is room once these running sequences are preempted."""
        blocks = self._kv.missing(self._head, self._growing - self._kv.growing(gone))
        return self._slots <= sum(s.width for s in gone) and blocks <= sum(s.blocks for s in gone)


def to_start(
    room: Room, candidates: list[tuple[bool, Sequence]], owner: Callable[[Sequence], Tenant], shares: Shares
) -> list[Sequence] | None:
    """The candidates to preempt; None if they are not enough. A candidate paired with True is of a tenant within its
    share."""
    victims: list[Sequence] = []
    taken: Counter[str] = Counter()  # slots, by tenant

    def rank(candidate: tuple[bool, Sequence]) -> tuple[bool, float, int]:
        return candidate[1].preemptible, owner(candidate[1]).counter, candidate[1].order

    for keeps_share, victim in sorted(candidates, key=rank, reverse=True):
        if room.there(victims):
            break
        tenant = owner(victim)
        if keeps_share and tenant.running - taken[tenant.name] - victim.width < shares.of(tenant):
            continue
        taken[tenant.name] += victim.width
        victims.append(victim)
    return victims if room.there(victims) else None
