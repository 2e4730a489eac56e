"""Which running sequences wait again so that others can start, or grow.

One that has made few tokens since it last started, or that ends soon, is spared where another will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.engine.schedule import KVRoom
    from pedro.engine.sequence import Sequence
    from pedro.engine.shares import Shares, Tenant

SOON = 32  # tokens: what has no more left may be waited for


def to_grow(running: Iterable[Sequence], owner: Callable[[Sequence], Tenant]) -> Sequence:
    """The one that waits again where running sequences need more blocks than there are: the youngest of the tenant that
    is most ahead."""
    alone = (one for one in running if one.width == 1)
    return max(alone, key=lambda one: (one.preemptible, one.tokens_left > SOON, owner(one).counter, one.order))


class Room:
    """What `head` needs of slots and blocks, and whether it has that once others are gone."""

    def __init__(self, head: Sequence, kv: KVRoom, slots: int, running: list[Sequence]) -> None:
        """`slots` are missing beside those that are free."""
        self._slots, self._head, self._kv = slots, head, kv
        self._growing = kv.growing(running)

    def there(self, gone: list[Sequence]) -> bool:
        """Whether there is room without those of the running sequences."""
        blocks = self._kv.missing(self._head, self._growing - self._kv.growing(gone))
        return self._slots <= sum(s.width for s in gone) and blocks <= sum(s.blocks for s in gone)


def to_start(
    room: Room, candidates: list[tuple[bool, Sequence]], owner: Callable[[Sequence], Tenant], shares: Shares
) -> list[Sequence] | None:
    """Those of the candidates that make room; None if there are not as many. A candidate that comes with True is of a
    tenant that keeps its share."""
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
