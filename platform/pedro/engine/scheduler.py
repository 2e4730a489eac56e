"""Decides who runs next. Touches no tensors, and knows nothing of models, adapters' weights or text.

Tenants are served fairly by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): a tenant's counter grows with the tokens it is given, and the tenant with the least is admitted next.
A tenant that comes back after a pause starts at the least counter of those waiting, so idling earns no credit.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pedro.engine.sequence import Sequence, State
from pedro.errors import OverloadedError

PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0  # cost of a prompt token and of an answer token (the paper's w_p, w_q)


@dataclass(frozen=True)
class Limits:
    """Bounds of the schedule. `prefill_tokens` is the prompt work of one step, in tokens through all layers."""

    slots: int
    num_layers: int
    prefill_tokens: int = 2048
    max_waiting: int = 1024
    max_waiting_per_tenant: int = 256
    weights: dict[str, float] = field(default_factory=dict)  # a tenant's share; 1 where not named


@dataclass(frozen=True)
class PrefillSlice:
    """Layers [first, last) of the prefill of `sequences`; `last` equal to the number of layers ends it."""

    sequences: tuple[Sequence, ...]
    first_layer: int
    last_layer: int
    ends: bool

    @property
    def begins(self) -> bool:
        return self.first_layer == 0


@dataclass(frozen=True)
class Plan:
    """One step: at most one slice of one prefill, and a token for every running sequence."""

    prefill: PrefillSlice | None
    decode: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


class Scheduler:
    """Queues by tenant and adapter, slots of the KV cache, and the running set. Not thread-safe: the engine locks."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_waiting = 0
        self.running: list[Sequence] = []
        self._queues: dict[str, dict[str | None, deque[Sequence]]] = {}
        self._waiting_of: dict[str, int] = {}
        self._counters: dict[str, float] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self._free = list(range(limits.slots))  # a heap: low slots first keeps the running set dense
        self._prefill: tuple[tuple[Sequence, ...], int] | None = None  # sequences, next layer

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request, all or none. Raises OverloadedError where a queue is full."""
        tenant, count = sequences[0].request.tenant, len(sequences)
        waiting = self._waiting_of.get(tenant, 0)
        if waiting + count > self.limits.max_waiting_per_tenant:
            raise OverloadedError(
                f"{waiting} of your requests are waiting and the limit is {self.limits.max_waiting_per_tenant}; "
                f"try again later or send fewer at once"
            )
        if self.num_waiting + count > self.limits.max_waiting:
            raise OverloadedError(f"the server's queue of {self.limits.max_waiting} is full; try again later")
        busy = [self._counters[t] for t in self._active_tenants() if t != tenant]
        if not busy and not waiting and not self.running:
            self._counters.clear()
        if not waiting:
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), min(busy, default=0.0))
        for sequence in sequences:
            self._queues.setdefault(tenant, {}).setdefault(sequence.request.adapter, deque()).append(sequence)
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, next(self._order), sequence))
        self._count_waiting(tenant, count)

    def schedule(self, admit: Callable[[Sequence], bool]) -> Plan:
        """The next step. `admit(sequence)` says whether its adapter can be used now, and if so holds on to it."""
        if self._prefill is None:
            batch = self._admit(admit)
            if batch:
                self._prefill = (batch, 0)
        return Plan(prefill=self._slice(), decode=tuple(self.running))

    def prefilled(self, sequences: tuple[Sequence, ...]) -> None:
        """The prefill of `sequences` ended: those not finished meanwhile run, the slots of the others are free."""
        self._prefill = None
        for sequence in sequences:
            if sequence.state is State.FINISHED:
                self._free_slot(sequence)
            else:
                sequence.to(State.RUNNING)
                self.running.append(sequence)

    def charge(self, sequence: Sequence, tokens: int = 1) -> None:
        """Count answer tokens against the sequence's tenant."""
        self._charge(sequence.request.tenant, tokens * ANSWER_WEIGHT)

    def finish(self, sequence: Sequence) -> None:
        """Take the sequence out, wherever it is. Its slot is free at once, or when the prefill it is part of ends."""
        was = sequence.state
        sequence.to(State.FINISHED)
        if was is State.WAITING:
            self._dequeue(sequence)
        elif was is State.RUNNING:
            self.running.remove(sequence)
            self._free_slot(sequence)

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
        queues = (queue.get(adapter, ()) for queue in self._queues.values())
        return [s for queue in queues for s in queue if s.state is State.WAITING]

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many sequences wait, by tenant."""
        return dict(self._waiting_of)

    @property
    def slots_free(self) -> int:
        return len(self._free)

    def _admit(self, admit: Callable[[Sequence], bool]) -> tuple[Sequence, ...]:
        batch: list[Sequence] = []
        blocked: set[tuple[str, str | None]] = set()
        tokens = 0
        while self._free:
            head = self._next(blocked)
            if head is None:
                break
            size = len(head.prefill_ids)
            if batch and tokens + size > self.limits.prefill_tokens:
                break
            tenant, adapter = head.request.tenant, head.request.adapter
            if not admit(head):
                blocked.add((tenant, adapter))
                continue
            self._dequeue(head)
            head.slot = heapq.heappop(self._free)
            head.to(State.PREFILLING)
            self._charge(tenant, size * PROMPT_WEIGHT)
            tokens += size
            batch.append(head)
        return tuple(batch)

    def _next(self, blocked: set[tuple[str, str | None]]) -> Sequence | None:
        """The oldest admissible head of the tenant with the least counter."""
        for tenant in sorted(self._queues, key=self._counters.__getitem__):
            heads = [q[0] for adapter, q in self._queues[tenant].items() if (tenant, adapter) not in blocked]
            if heads:
                return min(heads, key=lambda s: s.arrived)
        return None

    def _slice(self) -> PrefillSlice | None:
        """As many layers of the prefill as the step's budget allows; all of them where nobody waits for a token."""
        if self._prefill is None:
            return None
        sequences, first = self._prefill
        last = layers = self.limits.num_layers
        if self.running:
            tokens = sum(len(s.prefill_ids) for s in sequences)
            last = min(layers, first + max(1, math.floor(layers * self.limits.prefill_tokens / tokens)))
        self._prefill = (sequences, last)
        return PrefillSlice(sequences, first, last, ends=last == layers)

    def _dequeue(self, sequence: Sequence) -> None:
        """Take a waiting sequence out of its queue, and drop the queue if that empties it."""
        tenant, adapter = sequence.request.tenant, sequence.request.adapter
        self._queues[tenant][adapter].remove(sequence)
        if not self._queues[tenant][adapter]:
            del self._queues[tenant][adapter]
        if not self._queues[tenant]:
            del self._queues[tenant]
        self._count_waiting(tenant, -1)

    def _active_tenants(self) -> set[str]:
        return set(self._waiting_of) | {s.request.tenant for s in self.running}

    def _count_waiting(self, tenant: str, change: int) -> None:
        self.num_waiting += change
        self._waiting_of[tenant] = self._waiting_of.get(tenant, 0) + change
        if not self._waiting_of[tenant]:
            del self._waiting_of[tenant]

    def _charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self._counters.get(tenant, 0.0) + cost / self.limits.weights.get(tenant, 1.0)

    def _free_slot(self, sequence: Sequence) -> None:
        heapq.heappush(self._free, sequence.slot)
