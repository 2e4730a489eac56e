"""Which tenants are active, the share of slots of each, and which exceed it.

A tenant is active while it has requests and for `head_room_s` after. If several are active, one that requests more
slots than its share, and more than a few, is `over`: capacity for the others' next requests is reserved at its expense.
A lone tenant never is.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable

from pedro.engine.sequence import Sequence, SequenceState

FEW = 4  # requests for up to 1/FEW of all slots are never over, however many tenants share them


class Tenant:
    """One tenant's counter, how many of its sequences wait and run, and those ready to start, oldest first."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.waiting = 0
        self.running = 0  # slots in use, during and after prefill
        self.asked = 0  # slots that all its unfinished sequences need
        self.seen = 0.0  # when it last sent a request or had one unfinished
        self.was_over: float | None = None  # when it was last over its share
        self.ready: list[tuple[int, int, Sequence]] = []  # a heap; entries that no longer wait are skipped
        self.requests: list[list[Sequence]] = []  # those that may not have started, by arrival
        self.has_turn = False  # whether it is in the heap of turns
        self.has_floor = False  # and in that of floors

    def drop_gone(self) -> bool:
        """Drop entries that no longer wait from the top of the queue; returns whether any are left."""
        while self.ready and self.ready[0][-1].state is not SequenceState.WAITING:
            heapq.heappop(self.ready)
        return bool(self.ready)

    def take_newest_request(self) -> list[Sequence] | None:
        """Pop the newest request that has not started; None if there is none."""
        while self.requests:
            request = self.requests.pop()
            if untouched(request):
                return request
        return None

    def tidy(self) -> None:
        """Drop requests that have ended or started, once these are most of the list."""
        if len(self.ready) > 2 * self.waiting + 16:
            self.ready = [entry for entry in self.ready if entry[-1].state is SequenceState.WAITING]
            heapq.heapify(self.ready)
        if len(self.requests) > 2 * self.waiting + 16:
            self.requests = [request for request in self.requests if untouched(request)]


def untouched(request: list[Sequence]) -> bool:
    """Whether all sequences of the request wait and none has ever run."""
    return all(sequence.state is SequenceState.WAITING and not sequence.resumes for sequence in request)


def newest_of_longest(tenants: Iterable[Tenant], missing: int, load: float) -> list[Sequence] | None:
    """`missing` waiting sequences to end, or a few more: the newest requests of the tenants with the longest queues by
    weight, as long as those are longer than `load`. Never one that has run. None if there are not enough."""
    queues = [(-tenant.waiting / tenant.weight, at, tenant) for at, tenant in enumerate(tenants)]
    heapq.heapify(queues)
    taken: list[tuple[Tenant, list[Sequence]]] = []
    while missing > 0 and queues and -queues[0][0] > load:
        length, at, tenant = heapq.heappop(queues)
        request = tenant.take_newest_request()
        if request is not None:
            taken.append((tenant, request))
            missing -= len(request)
            heapq.heappush(queues, (length + len(request) / tenant.weight, at, tenant))
    if missing > 0:
        for tenant, request in reversed(taken):
            tenant.requests.append(request)
        return None
    return [sequence for _, request in taken for sequence in request]


class ByCounter:
    """Tenants by counter, each once. Counters only grow, so a stale entry is corrected when it reaches the top."""

    def __init__(self, flag: str, keep: Callable[[Tenant], bool]) -> None:
        self._flag, self._keep = flag, keep
        self._heap: list[tuple[float, int, Tenant]] = []
        self._ties = itertools.count()

    def add(self, tenant: Tenant) -> None:
        if not getattr(tenant, self._flag):
            setattr(tenant, self._flag, True)
            heapq.heappush(self._heap, (tenant.counter, next(self._ties), tenant))

    def least(self) -> Tenant | None:
        """The tenant with the lowest counter; tenants rejected by `keep` are dropped."""
        while self._heap:
            counter, _, tenant = self._heap[0]
            if not self._keep(tenant):
                self.take_least()
            elif counter < tenant.counter:
                heapq.heapreplace(self._heap, (tenant.counter, next(self._ties), tenant))
            else:
                return tenant
        return None

    def take_least(self) -> Tenant:
        """Remove the tenant that `least` returned."""
        tenant = heapq.heappop(self._heap)[-1]
        setattr(tenant, self._flag, False)
        return tenant


class Shares:
    """The active tenants, and each one's share of the slots."""

    def __init__(self, slots: int, head_room_s: float, clock: Callable[[], float]) -> None:
        self.active: OrderedDict[str, Tenant] = OrderedDict()  # least recently seen first
        self._slots, self._head_room_s, self._clock = slots, head_room_s, clock
        self._holding = 0  # how many of them use a slot
        self._weights = 0.0

    def come(self, tenant: Tenant, slots: int) -> None:
        """The tenant requests `slots` more."""
        tenant.asked += slots
        self._see(tenant)
        if self.over(tenant):
            tenant.was_over = tenant.seen

    def go(self, tenant: Tenant, slots: int) -> None:
        """A request of the tenant for `slots` has ended."""
        tenant.asked -= slots
        self._see(tenant)

    def hold(self, tenant: Tenant, slots: int) -> None:
        """The tenant takes slots, or releases them if `slots` is negative."""
        before, tenant.running = tenant.running, tenant.running + slots
        self._holding += bool(tenant.running) - bool(before)

    def forget(self) -> None:
        """Drop tenants that have been idle for long enough."""
        limit = self._clock() - self._head_room_s
        while self.active and (tenant := next(iter(self.active.values()))).seen < limit:
            if tenant.asked or tenant.running:
                self._see(tenant)
            else:
                del self.active[tenant.name]
                self._weights = self._weights - tenant.weight if self.active else 0.0

    def of(self, tenant: Tenant) -> float:
        """The tenant's share of slots; never less than one."""
        return max(1.0, self._slots * tenant.weight / self._weights) if self._weights else float(self._slots)

    def over(self, tenant: Tenant) -> bool:
        """Whether the tenant requests more than its share while others are active, and more than a few slots."""
        return len(self.active) > 1 and tenant.asked > max(self.of(tenant), self._slots // FEW)

    def others_about(self) -> bool:
        """Whether a tenant that was not recently over its share has requests, or may send one any moment."""
        since = self._clock() - self._head_room_s
        return any(
            (tenant.was_over is None or tenant.was_over < since) and not self.over(tenant)
            for tenant in self.active.values()
        )

    @property
    def head_room(self) -> int:
        """Slots to keep free: one for each active tenant without any, up to a quarter of all."""
        return min(len(self.active) - self._holding, self._slots // 4)

    def _see(self, tenant: Tenant) -> None:
        tenant.seen = self._clock()
        if tenant.name not in self.active:
            self.active[tenant.name] = tenant
            self._weights += tenant.weight
        self.active.move_to_end(tenant.name)
