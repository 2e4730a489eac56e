"""Which tenants are active, what each one's share of the slots is, and who asks for more.

A tenant is active while it asks for anything and for `head_room_s` after. Where several are, one that asks for more
slots than its share, and for more than a few, is `over`: capacity for the others' next requests is reserved at its
expense. A lone tenant is not.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable

from pedro.engine.sequence import Sequence, SequenceState

FEW = 4  # a tenant that asks for up to this part of all slots is no flood, however many tenants share them


class Tenant:
    """One tenant's counter, how many of its sequences wait and run, and those that can start now, oldest first."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.waiting = 0
        self.running = 0  # slots that it holds, in a prefill or after
        self.asked = 0  # slots that all its unfinished sequences take
        self.seen = 0.0  # when it last asked, or had anything unfinished
        self.was_over: float | None = None  # when it last asked for more than its share
        self.ready: list[tuple[int, int, Sequence]] = []  # a heap; what no longer waits is skipped
        self.requests: list[list[Sequence]] = []  # those that may not have begun, by arrival
        self.has_turn = False  # whether it stands in the heap of turns
        self.has_floor = False  # and in that of floors

    def drop_gone(self) -> bool:
        """Take what no longer waits from the top of the queue; whether anything is left in it."""
        while self.ready and self.ready[0][-1].state is not SequenceState.WAITING:
            heapq.heappop(self.ready)
        return bool(self.ready)

    def take_newest_request(self) -> list[Sequence] | None:
        """Take the newest request of which nothing has begun off the list; None where there is none."""
        while self.requests:
            request = self.requests.pop()
            if untouched(request):
                return request
        return None

    def tidy(self) -> None:
        """Forget what has ended or begun, once that is most of what is held."""
        if len(self.ready) > 2 * self.waiting + 16:
            self.ready = [entry for entry in self.ready if entry[-1].state is SequenceState.WAITING]
            heapq.heapify(self.ready)
        if len(self.requests) > 2 * self.waiting + 16:
            self.requests = [request for request in self.requests if untouched(request)]


def untouched(request: list[Sequence]) -> bool:
    """Whether all of the request waits and none of it ever ran."""
    return all(sequence.state is SequenceState.WAITING and not sequence.resumes for sequence in request)


def newest_of_longest(tenants: Iterable[Tenant], missing: int, load: float) -> list[Sequence] | None:
    """`missing` waiting sequences to end, or a few more: the newest requests of the tenants with the longest queues by
    their weights, as long as those are longer than `load`. Nothing that ever ran. None where there are not as many."""
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
    """Tenants by their counters, each once. Counters only grow, so an entry is put right when it comes up."""

    def __init__(self, flag: str, keep: Callable[[Tenant], bool]) -> None:
        self._flag, self._keep = flag, keep
        self._heap: list[tuple[float, int, Tenant]] = []
        self._ties = itertools.count()

    def add(self, tenant: Tenant) -> None:
        if not getattr(tenant, self._flag):
            setattr(tenant, self._flag, True)
            heapq.heappush(self._heap, (tenant.counter, next(self._ties), tenant))

    def least(self) -> Tenant | None:
        """The tenant with the least counter; those that `keep` refuses are dropped on the way."""
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
        """Take out the one that `least` gave."""
        tenant = heapq.heappop(self._heap)[-1]
        setattr(tenant, self._flag, False)
        return tenant


class Shares:
    """The active tenants, and the slots that each may count on."""

    def __init__(self, slots: int, head_room_s: float, clock: Callable[[], float]) -> None:
        self.active: OrderedDict[str, Tenant] = OrderedDict()  # by when they were last seen
        self._slots, self._head_room_s, self._clock = slots, head_room_s, clock
        self._holding = 0  # how many of them hold a slot
        self._weights = 0.0

    def come(self, tenant: Tenant, slots: int) -> None:
        """The tenant asks for `slots` more."""
        tenant.asked += slots
        self._see(tenant)
        if self.over(tenant):
            tenant.was_over = tenant.seen

    def go(self, tenant: Tenant, slots: int) -> None:
        """Work of the tenant that took `slots` has ended."""
        tenant.asked -= slots
        self._see(tenant)

    def hold(self, tenant: Tenant, slots: int) -> None:
        """The tenant takes slots, or gives them back where `slots` is below 0."""
        before, tenant.running = tenant.running, tenant.running + slots
        self._holding += bool(tenant.running) - bool(before)

    def forget(self) -> None:
        """Drop those that have asked for nothing for long enough."""
        limit = self._clock() - self._head_room_s
        while self.active and (tenant := next(iter(self.active.values()))).seen < limit:
            if tenant.asked or tenant.running:
                self._see(tenant)
            else:
                del self.active[tenant.name]
                self._weights = self._weights - tenant.weight if self.active else 0.0

    def of(self, tenant: Tenant) -> float:
        """How many slots the tenant may count on; never less than one."""
        return max(1.0, self._slots * tenant.weight / self._weights) if self._weights else float(self._slots)

    def over(self, tenant: Tenant) -> bool:
        """Whether the tenant asks for more than its share while others are active, and for more than a few slots."""
        return len(self.active) > 1 and tenant.asked > max(self.of(tenant), self._slots // FEW)

    def others_about(self) -> bool:
        """Whether a tenant that has not been over its share lately asks for something, or may any moment."""
        since = self._clock() - self._head_room_s
        return any(
            (tenant.was_over is None or tenant.was_over < since) and not self.over(tenant)
            for tenant in self.active.values()
        )

    @property
    def head_room(self) -> int:
        """Slots to keep free: one for each active tenant that holds none, up to a quarter of all."""
        return min(len(self.active) - self._holding, self._slots // 4)

    def _see(self, tenant: Tenant) -> None:
        tenant.seen = self._clock()
        if tenant.name not in self.active:
            self.active[tenant.name] = tenant
            self._weights += tenant.weight
        self.active.move_to_end(tenant.name)
