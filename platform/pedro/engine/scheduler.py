"""Decides who runs next. Touches no tensors, and knows nothing of models, adapters' weights or text.

Tenants are served fairly by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): a tenant's counter grows with the tokens it is given, and the tenant with the least is admitted next.
A tenant that comes back after a pause starts at the least counter of those active, so idling earns no credit.
Where no slot is free and a waiting tenant has fallen too far behind a running one, the latter's youngest sequence
waits again. No step costs more than a glance at the queues: tenants and sequences wait in heaps, and what waits
for an adapter is parked until `unpark`.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from pedro.engine.sequence import Sequence, State
from pedro.errors import OverloadedError, RateLimitError

PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0  # cost of a prompt token and of an answer token (the paper's w_p, w_q)
Group = tuple[Sequence, ...]  # share one prefill: the first is read, the others copy it


@dataclass(frozen=True)
class Limits:
    """Bounds of the schedule. `prefill_tokens` is the most prompt work of one step, in tokens through all layers.

    A waiting tenant that is more than `preempt_after` weighted tokens behind a running one takes a slot from it.
    """

    slots: int
    prefill_tokens: int = 2048
    max_waiting: int = 1024
    max_waiting_per_tenant: int = 256
    preempt_after: int = 1024
    weights: dict[str, float] = field(default_factory=dict)  # a tenant's share; 1 where not named


@dataclass(frozen=True)
class PrefillSlice:
    """The next part of the prefill of `groups`: until so many tokens' worth of work, through all layers, is done."""

    groups: tuple[Group, ...]
    begins: bool
    until: int
    ends: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.groups for sequence in group]


@dataclass(frozen=True)
class Plan:
    """One step: at most one slice of one prefill, and a token for every running sequence.

    Before all that the slots of `preempted` must be saved: each sequence still names the slots it lost.
    """

    prefill: PrefillSlice | None
    decode: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


class _Tenant:
    """One tenant's counter, how many of its sequences wait and run, and those that can start now, oldest first."""

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.waiting = 0
        self.running = 0  # or in a prefill
        self.ready: list[tuple[int, int, Sequence]] = []  # a heap; what does not wait any more is skipped
        self.has_turn = False  # whether it stands in the heap of turns
        self.has_floor = False  # and in that of floors


class _ByCounter:
    """Tenants by their counters, each once. Counters only grow, so an entry is put right when it comes up."""

    def __init__(self, flag: str, keep: Callable[[_Tenant], bool]) -> None:
        self._flag, self._keep = flag, keep
        self._heap: list[tuple[float, int, _Tenant]] = []
        self._ties = itertools.count()

    def add(self, tenant: _Tenant) -> None:
        if not getattr(tenant, self._flag):
            setattr(tenant, self._flag, True)
            heapq.heappush(self._heap, (tenant.counter, next(self._ties), tenant))

    def least(self) -> _Tenant | None:
        """The tenant with the least counter; those that `keep` refuses are dropped on the way."""
        while self._heap:
            counter, _, tenant = self._heap[0]
            if not self._keep(tenant):
                heapq.heappop(self._heap)
                setattr(tenant, self._flag, False)
            elif counter < tenant.counter:
                heapq.heapreplace(self._heap, (tenant.counter, next(self._ties), tenant))
            else:
                return tenant
        return None


class Scheduler:
    """Queues by tenant, slots of the KV cache, and the running set. Not thread-safe: the engine locks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_waiting = 0
        self.running: list[Sequence] = []  # by slot
        self._tenants: dict[str, _Tenant] = {}
        self._turns = _ByCounter("has_turn", _drop_gone)
        self._floors = _ByCounter("has_floor", lambda tenant: bool(tenant.waiting or tenant.running))
        self._parked: dict[str, list[Sequence]] = {}  # by the adapter they wait for
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self._free = list(range(limits.slots))  # a heap: low slots first keeps the running set dense
        self._prefill: tuple[tuple[Group, ...], int] | None = None  # and the tokens' worth of work done
        self.slice_tokens = limits.prefill_tokens  # the engine lowers it to what the running ones can bear

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request, all or none.

        Raises RateLimitError where the tenant's own queue is full, OverloadedError where the server's is.
        """
        name, count = sequences[0].request.tenant, len(sequences)
        tenant = self._tenants.get(name)
        waiting = tenant.waiting if tenant else 0
        if waiting + count > self.limits.max_waiting_per_tenant:
            raise RateLimitError(
                f"{waiting} of your requests are waiting and the limit is {self.limits.max_waiting_per_tenant}; "
                f"try again later or send fewer at once"
            )
        if self.num_waiting + count > self.limits.max_waiting:
            raise OverloadedError(f"the server's queue of {self.limits.max_waiting} is full; try again later")
        floor = self._floors.least()
        if floor is None:
            self._tenants.clear()
        tenant = self._tenants.get(name) or _Tenant(name, self.limits.weights.get(name, 1.0))
        self._tenants[name] = tenant
        if floor is not None and not tenant.waiting and not tenant.running:
            tenant.counter = max(tenant.counter, floor.counter)
        for sequence in sequences:
            sequence.order = next(self._order)
            self._queue(sequence)
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, next(self._order), sequence))

    def schedule(self, admit: Callable[[Sequence], bool]) -> Plan:
        """The next step. `admit(sequence)` says whether its adapter can be used now, and if so holds on to it, once."""
        preempted: list[Sequence] = []
        if self._prefill is None and self.num_waiting:
            groups = self._admit(admit, preempted)
            if groups:
                self._prefill = (groups, 0)
        return Plan(self._slice(), tuple(self.running), tuple(preempted))

    def unpark(self) -> None:
        """Adapters came or went: all that wait for one are looked at again."""
        parked, self._parked = self._parked, {}
        for sequences in parked.values():
            for sequence in sequences:
                if sequence.state is State.WAITING:
                    self._make_ready(sequence)

    def prefilled(self, groups: tuple[Group, ...]) -> None:
        """The prefill of `groups` ended: those not finished meanwhile run, the slots of the others are free."""
        self._prefill = None
        for sequence in itertools.chain.from_iterable(groups):
            if sequence.state is State.FINISHED:
                self._leave(sequence)
            else:
                sequence.to(State.RUNNING)
                insort(self.running, sequence, key=attrgetter("slot"))

    def charge(self, sequence: Sequence, tokens: int = 1) -> None:
        """Count answer tokens against the sequence's tenant."""
        tenant = self._tenants[sequence.request.tenant]
        tenant.counter += tokens * ANSWER_WEIGHT / tenant.weight

    def finish(self, sequence: Sequence) -> None:
        """Take the sequence out, wherever it is. Its slots are free at once, or when the prefill it is part of ends."""
        was = sequence.state
        sequence.to(State.FINISHED)
        if was is State.WAITING:
            self._forget(sequence)
        elif was is State.RUNNING:
            self.running.remove(sequence)
            self._leave(sequence)

    def expired(self, now: float) -> Iterator[Sequence]:
        """The unfinished sequences whose deadline has passed; each is given once."""
        if len(self._deadlines) > 4 * (self.num_waiting + self.limits.slots):  # mostly of sequences long finished
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.FINISHED]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state is not State.FINISHED:
                yield sequence

    def next_deadline(self) -> float | None:
        """When the next deadline falls, on the monotonic clock."""
        return self._deadlines[0][0] if self._deadlines else None

    def waiting_for(self, adapter: str) -> list[Sequence]:
        """The sequences that wait with this adapter, of every tenant."""
        ready = (entry[-1] for tenant in self._tenants.values() for entry in tenant.ready)
        found = itertools.chain(ready, self._parked.get(adapter, ()))
        return list(dict.fromkeys(s for s in found if s.state is State.WAITING and s.awaits == adapter))

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many sequences wait, by tenant."""
        return {name: tenant.waiting for name, tenant in self._tenants.items() if tenant.waiting}

    @property
    def slots_free(self) -> int:
        return len(self._free)

    def _admit(self, admit: Callable[[Sequence], bool], preempted: list[Sequence]) -> tuple[Group, ...]:
        """Start what the slots and the prefill budget allow, the tenant with the least counter first.

        What needs more slots than are free keeps its turn: others do not pass it, so that it starts in the end.
        """
        groups: list[Group] = []
        tokens = 0
        while (tenant := self._turns.least()) is not None:
            head = tenant.ready[0][-1]
            if head.awaits in self._parked or (head.width > 1 and not admit(head)):
                self._park(tenant)  # what needs many slots holds up nobody before its adapter is there
                continue
            if head in preempted or (groups and tokens + head.length > self.limits.prefill_tokens):
                break
            victims = self._victims(tenant, head.width - len(self._free))
            if victims is None:
                break
            if not admit(head):
                self._park(tenant)
                continue
            for victim in victims:
                self._preempt(victim)
            preempted += victims
            groups.append(self._start(tenant, head, admit))
            tokens += head.length
        return tuple(groups)

    def _start(self, tenant: _Tenant, head: Sequence, admit: Callable[[Sequence], bool]) -> Group:
        """Give slots to `head`, and to its siblings that can share its prefill as far as there are some."""
        group = [head]
        self._occupy(tenant, head)
        for sibling in head.siblings if not head.resumes else ():
            fresh = sibling.state is State.WAITING and not sibling.resumes
            if fresh and self._free and admit(sibling):
                self._occupy(tenant, sibling)
                group.append(sibling)
        if not head.resumes:  # a preempted one pays for its prompt once
            tenant.counter += head.length * PROMPT_WEIGHT / tenant.weight
        return tuple(group)

    def _occupy(self, tenant: _Tenant, sequence: Sequence) -> None:
        self._count_waiting(tenant, -1)
        tenant.running += 1
        sequence.take([heapq.heappop(self._free) for _ in range(sequence.width)])
        sequence.turn = next(self._order)
        sequence.to(State.PREFILLING)

    def _victims(self, tenant: _Tenant, missing: int) -> list[Sequence] | None:
        """`missing` running sequences that must make room for `tenant`; None if there are not as many."""
        if missing <= 0:
            return []
        most = tenant.counter + self.limits.preempt_after
        found = []
        for sequence in self.running:
            counter = self._tenants[sequence.request.tenant].counter
            if counter > most and sequence.preemptible:
                found.append((counter, sequence.turn, sequence))
        return [s for _, _, s in heapq.nlargest(missing, found)] if len(found) >= missing else None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._leave(sequence)
        sequence.to(State.WAITING)
        self._queue(sequence)

    def _slice(self) -> PrefillSlice | None:
        """As much of the prefill as the step's budget allows; all of it where nobody waits for a token."""
        if self._prefill is None:
            return None
        groups, done = self._prefill
        until = tokens = sum(group[0].length for group in groups)
        if self.running:
            until = min(tokens, done + min(self.limits.prefill_tokens, self.slice_tokens))
        self._prefill = (groups, until)
        return PrefillSlice(groups, done == 0, until, ends=until == tokens)

    def _queue(self, sequence: Sequence) -> None:
        tenant = self._tenants[sequence.request.tenant]
        self._count_waiting(tenant, 1)
        self._make_ready(sequence)
        self._floors.add(tenant)

    def _make_ready(self, sequence: Sequence) -> None:
        tenant = self._tenants[sequence.request.tenant]
        heapq.heappush(tenant.ready, (sequence.order, next(self._order), sequence))
        self._turns.add(tenant)

    def _park(self, tenant: _Tenant) -> None:
        """Set the tenant's oldest sequence aside until adapters came or went."""
        sequence = heapq.heappop(tenant.ready)[-1]
        adapter = sequence.awaits
        assert adapter is not None, "only an adapter can be waited for"
        self._parked.setdefault(adapter, []).append(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """A waiting sequence ended. Queues are cleaned once most of what they hold has."""
        tenant = self._tenants[sequence.request.tenant]
        self._count_waiting(tenant, -1)
        parked = self._parked.get(sequence.awaits or "", [])
        if sequence in parked:
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.awaits or ""]
        if len(tenant.ready) > 2 * tenant.waiting + 16:
            tenant.ready = [entry for entry in tenant.ready if entry[-1].state is State.WAITING]
            heapq.heapify(tenant.ready)

    def _leave(self, sequence: Sequence) -> None:
        """The sequence runs no more: its slots are free. It still names them, so that they can be saved."""
        self._tenants[sequence.request.tenant].running -= 1
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)

    def _count_waiting(self, tenant: _Tenant, change: int) -> None:
        self.num_waiting += change
        tenant.waiting += change


def _drop_gone(tenant: _Tenant) -> bool:
    """Take what does not wait any more from the top of the tenant's queue; whether anything is left in it."""
    while tenant.ready and tenant.ready[0][-1].state is not State.WAITING:
        heapq.heappop(tenant.ready)
    return bool(tenant.ready)
