"""What the prefix cache holds, whose it is, and what goes where room is needed. Touches no tensors.

Where room is needed, an entry goes that nobody refers to, the least recently used: of a tenant that has used nothing
for `IDLE_S`, else of the one that has most; but never of one that has no more than the tenant that needs room, which
then gives of its own or gets none. So whoever has no more than an equal part of what may go, half of the budget at
least, and uses it, loses nothing to others, however much they send.

An entry that somebody refers to is never evicted. Running requests refer to what they read in place until they end: to
`READ_IN_PLACE` of the budget at most, all together. The rest stays free for what others send; what a request finds
beyond is copied into its slot, as it is where nothing is read in place.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.engine.modulation import SlotRows

READ_IN_PLACE = 0.5
IDLE_S = 600.0
EntryKey = tuple[Hashable, bytes]  # the parent and a block's own tokens; vectors have none


@dataclass(eq=False)
class PrefixEntry:
    """A block, with its number and its place in `KVBlocks`, or the vectors of a prompt."""

    key: EntryKey
    tenant: str | None
    adapter: str | None
    nbytes: int
    number: int
    place: int = -1
    rows: SlotRows | None = None
    refcount: int = 0
    gone: bool = False  # nobody finds it any more


class _Tenant:
    """What a tenant has here: bytes, those that somebody refers to, when it last used any, and the entries that may go,
    least recently used first."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.held_bytes = 0
        self.seen = 0.0
        self.unused: OrderedDict[EntryKey, PrefixEntry] = OrderedDict()


class PrefixEntries:
    """The entries, within `budget_bytes`; blocks have one of `places` each. Where several are named, they are one
    prompt's: parents come before their children, and go after them, since without its parent a block is not found."""

    def __init__(self, budget_bytes: int, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.held_bytes = 0  # of entries that somebody refers to
        self.bytes_by_adapter: Counter[str | None] = Counter()
        self.evictions = 0
        self.changes = 0  # as long as this is the same, so are answers to all questions
        self.free = list(range(places))  # a heap, so that neighbours can be copied together
        self._entries: dict[EntryKey, PrefixEntry] = {}
        self._tenants: OrderedDict[str | None, _Tenant] = OrderedDict()  # least recently seen first
        self._numbers = itertools.count()
        self._clock = clock

    def __len__(self) -> int:
        return len(self._entries)

    def all(self) -> list[PrefixEntry]:
        """All that can be found."""
        return list(self._entries.values())

    def get(self, key: EntryKey) -> PrefixEntry | None:
        """The entry with this key."""
        return self._entries.get(key)

    def take(
        self, key: EntryKey, tenant: str | None, adapter: str | None, nbytes: int, rows: SlotRows | None = None
    ) -> PrefixEntry | None:
        """A new entry, a block unless it has `rows`, that nobody finds before `add`; None if there is no room."""
        while self.used_bytes + nbytes > self.budget_bytes:
            going = self._next_to_go(tenant)
            if going is None:
                return None
            self.drop(going)
        place = heapq.heappop(self.free) if rows is None else -1
        entry = PrefixEntry(key, tenant, adapter, nbytes, next(self._numbers), place, rows)
        self._tenants.setdefault(tenant, _Tenant())
        self._account(entry, nbytes)
        return entry

    def add(self, entries: Sequence[PrefixEntry]) -> None:
        """From now on these new ones are found."""
        self._entries.update((entry.key, entry) for entry in entries)
        self.touch(entries)

    def touch(self, entries: Sequence[PrefixEntry]) -> None:
        """These are used now."""
        self.refer(entries)
        self.let_go(entries)

    def refer(self, entries: Sequence[PrefixEntry]) -> None:
        """These stay until `let_go`, called as often."""
        for entry in entries:
            if not entry.refcount:
                self.held_bytes += entry.nbytes
                tenant = self._tenants[entry.tenant]
                tenant.held_bytes += entry.nbytes
                tenant.unused.pop(entry.key, None)
            entry.refcount += 1
            self.changes += 1

    def let_go(self, entries: Sequence[PrefixEntry]) -> None:
        """The opposite of `refer`; used last is what is let go last."""
        for entry in reversed(entries):
            self.changes += 1
            entry.refcount -= 1
            if not entry.refcount:
                self.held_bytes -= entry.nbytes
                self._tenants[entry.tenant].held_bytes -= entry.nbytes
                if entry.gone:
                    self._give_back(entry)
                else:
                    self._tenants[entry.tenant].unused[entry.key] = entry
        if entries and (tenant := self._tenants.get(entries[0].tenant)) is not None:
            tenant.seen = self._clock()
            self._tenants.move_to_end(entries[0].tenant)

    def readable(self, entries: Sequence[PrefixEntry]) -> int:
        """How many of these, from the first on, a request may refer to for as long as it runs. None while more is held
        than may be for long, as it is until requests begin."""
        room = READ_IN_PLACE * self.budget_bytes - self.held_bytes
        for count, entry in enumerate(entries):
            room -= 0 if entry.refcount else entry.nbytes
            if room < 0:
                return count
        return len(entries)

    def drop(self, entry: PrefixEntry) -> None:
        """Let an entry not be found any more; its memory is free once nobody refers to it."""
        del self._entries[entry.key]
        self._tenants[entry.tenant].unused.pop(entry.key, None)
        entry.gone = True
        self.evictions += 1
        self.changes += 1
        if not entry.refcount:
            self._give_back(entry)

    def _next_to_go(self, asking: str | None) -> PrefixEntry | None:
        """The entry to drop so that the tenant `asking` has room; None if there is none that may go."""
        owners = [tenant for tenant in self._tenants.values() if tenant.unused]
        own = self._tenants.get(asking)
        if not owners:
            return None
        idle = self._clock() - IDLE_S
        giving = next((tenant for tenant in owners if tenant.seen <= idle and not tenant.held_bytes), None)
        if giving is None:
            giving = max(owners, key=lambda tenant: tenant.nbytes)
            if own is not None and giving.nbytes <= own.nbytes:
                giving = own
        return next(iter(giving.unused.values()), None)

    def _give_back(self, entry: PrefixEntry) -> None:
        if entry.place >= 0:
            heapq.heappush(self.free, entry.place)
        self._account(entry, -entry.nbytes)

    def _account(self, entry: PrefixEntry, nbytes: int) -> None:
        self.used_bytes += nbytes
        self.bytes_by_adapter[entry.adapter] += nbytes
        if not self.bytes_by_adapter[entry.adapter]:
            del self.bytes_by_adapter[entry.adapter]
        tenant = self._tenants[entry.tenant]
        tenant.nbytes += nbytes
        if not tenant.nbytes:
            del self._tenants[entry.tenant]
