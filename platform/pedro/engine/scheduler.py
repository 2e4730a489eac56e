"""Decides who runs next. Touches no tensors.

Tenants are served fairly by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024): a tenant's counter grows with the tokens it is given, and the tenant with the least is admitted next.
A tenant that returns after a pause starts at the lowest counter of the active ones, so idling earns no credit. If no
slot is free and a waiting tenant has fallen too far behind a running one, the latter's youngest sequence is preempted;
immediately so if the waiting tenant has less than its share and the running one more. Nothing is preempted if a slot
will be free sooner than the sequence could be read again. The same applies to blocks of the KV cache; and if running
sequences need more blocks than there are, the youngest ones of the tenant that is furthest ahead are preempted.

For a tenant that requests more than its share (`Shares.over`), capacity is reserved for the next request of others
before it arrives: some slots stay free, its steps are kept short, its prefills can be paused, and it does not decode
during the prefills of others. None of this applies to a lone tenant. Scheduling a step is cheap: tenants and sequences
wait in heaps, and sequences that wait for an adapter are parked until `unpark`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from bisect import insort
from collections.abc import Callable, Iterator
from operator import attrgetter

from pedro.engine.schedule import KVRoom, PrefillChunk, PrefillGroup, PrefillProgress, SchedulerLimits, SchedulerOutput
from pedro.engine.sequence import Sequence, SequenceState
from pedro.engine.shares import ByCounter, Shares, Tenant, newest_of_longest
from pedro.engine.victims import SOON, Room, to_grow, to_start
from pedro.errors import OverloadedError, RateLimitError

PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0  # cost of a prompt token and of an answer token (the paper's w_p, w_q)
NEWS = 0.25  # weight of the newest prompt in the moving average of lengths
MAX_PREFILLS = 2  # one in progress, and one that is paused


class Scheduler:
    """Queues by tenant, slots of the KV cache, and the running set. Not thread-safe: the engine locks."""

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.num_waiting = 0
        self.running: list[Sequence] = []  # by slot
        self._tenants: dict[str, Tenant] = {}
        self._shares = Shares(limits.slots, limits.head_room_s, clock)
        self._turns = ByCounter("has_turn", Tenant.drop_gone)
        self._floors = ByCounter("has_floor", lambda tenant: bool(tenant.waiting or tenant.running))
        self._parked: dict[str, list[Sequence]] = {}  # by the adapter they wait for
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()
        self._free = list(range(limits.slots))  # a heap: assigning low slots first keeps the running set dense
        self.kv = KVRoom(limits)
        self._prefills: list[PrefillProgress] = []  # the last is in progress; one before it is paused
        self._steps = 0
        self._sat_out = False  # whether tenants over their share were skipped in the last step
        self.foresee: Callable[[Sequence], bool] = lambda _: True  # whether its adapter is ready; sets what is cached
        self.newcomer_tokens: float | None = None  # average prompt length for which capacity is reserved
        # the engine lowers these while others wait, from measured costs
        self.chunk_tokens = limits.prefill_tokens  # per step, of a prefill beside running sequences
        self.lone_tokens = limits.prefill_tokens  # of one while no sequence decodes
        self.short_tokens = limits.prefill_tokens  # of one in a short step
        self.short_rows = limits.slots  # slots decoded in a short step
        self.step_tokens = math.inf  # prompt tokens that can be read in the time of a decode step

    def add(self, sequences: list[Sequence]) -> list[Sequence]:
        """Queue the sequences of one request, all or none. Returns sequences that must end to make room for them: if
        the server's queue is full, whole requests from the end of the longest tenant's queue.

        Raises RateLimitError if the tenant's own queue is full, OverloadedError if the server's is.
        """
        name, count = sequences[0].request.tenant, len(sequences)
        tenant = self._tenants.get(name)
        waiting = tenant.waiting if tenant else 0
        if waiting + count > self.limits.max_waiting_per_tenant:
            raise RateLimitError(
                f"{waiting} of your requests are waiting and the limit is {self.limits.max_waiting_per_tenant}; "
                f"try again later or send fewer at once"
            )
        weight = self.limits.weights.get(name, 1.0)
        missing = self.num_waiting + count - self.limits.max_waiting
        load = (waiting + count) / weight
        shed = newest_of_longest(self._tenants.values(), missing, load) if missing > 0 else []
        if shed is None:
            raise OverloadedError(f"the server's queue of {self.limits.max_waiting} is full; try again later")
        floor = self._floors.least()
        if floor is None:
            self._forget_idle()
        tenant = self._tenants.setdefault(name, Tenant(name, weight))
        if floor is not None and not tenant.waiting and not tenant.running:
            tenant.counter = max(tenant.counter, floor.counter)
        for sequence in sequences:
            sequence.order = next(self._order)
            self._queue(sequence)
            self._shares.come(tenant, sequence.width)
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, next(self._order), sequence))
        tenant.requests.append(sequences)
        return shed

    def schedule(self, admit: Callable[[Sequence], bool]) -> SchedulerOutput:
        """The next step. `admit(sequence)` says whether its adapter is ready, and if so acquires it once, with what is
        cached for the sequence. `foresee` says so before, and acquires nothing."""
        self._shares.forget()
        self._steps += 1
        preempted = self._go_on()
        if self.num_waiting and len(self._prefills) < MAX_PREFILLS:
            groups = self._admit(admit, preempted)
            if groups:
                self._prefills.append(PrefillProgress(groups, tuple({self._of(group[0]) for group in groups})))
        return self._plan(tuple(preempted))

    def unpark(self) -> None:
        """Adapters were loaded or removed: reconsider all sequences that wait for one."""
        parked, self._parked = self._parked, {}
        for sequences in parked.values():
            for sequence in sequences:
                if sequence.state is SequenceState.WAITING:
                    self._make_ready(sequence)

    def prefilled(self, groups: tuple[PrefillGroup, ...]) -> None:
        """The prefill of `groups` ended: unfinished sequences run, the slots of the others are freed."""
        ended = self._prefills.pop()
        assert ended.groups is groups, "prefills end inside out"
        for sequence in itertools.chain.from_iterable(groups):
            if sequence.state is SequenceState.FINISHED:
                self._leave(sequence)
            else:
                sequence.to(SequenceState.RUNNING)
                insort(self.running, sequence, key=attrgetter("slot"))

    def charge(self, sequence: Sequence, tokens: int = 1) -> None:
        """Count answer tokens against the sequence's tenant."""
        tenant = self._of(sequence)
        tenant.counter += tokens * ANSWER_WEIGHT / tenant.weight

    def finish(self, sequence: Sequence) -> None:
        """Remove the sequence in any state. Its slots are free at once, or when the prefill it is part of ends."""
        was = sequence.state
        sequence.to(SequenceState.FINISHED)
        self._shares.go(self._of(sequence), sequence.width)
        if was is SequenceState.WAITING:
            self._forget(sequence)
        elif was is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._leave(sequence)

    def expired(self, now: float) -> Iterator[Sequence]:
        """The unfinished sequences whose deadline has passed; each is returned once."""
        if len(self._deadlines) > 4 * (self.num_waiting + self.limits.slots):  # mostly finished sequences
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not SequenceState.FINISHED]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state is not SequenceState.FINISHED:
                yield sequence

    def next_deadline(self) -> float | None:
        """The next deadline, on the monotonic clock."""
        return self._deadlines[0][0] if self._deadlines else None

    def waiting_for(self, adapter: str) -> list[Sequence]:
        """The waiting sequences with this adapter, of every tenant."""
        ready = (entry[-1] for tenant in self._tenants.values() for entry in tenant.ready)
        candidates = itertools.chain(ready, self._parked.get(adapter, ()))
        return list(dict.fromkeys(s for s in candidates if s.state is SequenceState.WAITING and s.awaits == adapter))

    def waiting_by_tenant(self) -> dict[str, int]:
        """How many sequences wait, by tenant."""
        return {name: tenant.waiting for name, tenant in self._tenants.items() if tenant.waiting}

    @property
    def slots_free(self) -> int:
        return len(self._free)

    def _go_on(self) -> list[Sequence]:
        """Reserve the blocks that running sequences need for the next step; returns those that must be preempted."""
        preempted: list[Sequence] = []
        self.kv.trim(self.running)
        for sequence in self.kv.short(self.running):
            while sequence.blocks and self.kv.missing(sequence) > 0:
                preempted.append(to_grow(self.running, self._of))
                self._preempt(preempted[-1])
            if sequence.blocks:
                self.kv.take(sequence)
        return preempted

    def _admit(self, admit: Callable[[Sequence], bool], preempted: list[Sequence]) -> tuple[PrefillGroup, ...]:
        """Start what slots and prefill budget allow, the tenant with the lowest counter first.

        A sequence that needs more slots than are free keeps its turn and is not overtaken. But a tenant over its share
        that already runs is overtaken by others until they are `preempt_after` ahead of it.
        """
        groups: list[PrefillGroup] = []
        tokens = length = 0
        passed: list[Tenant] = []
        over = False  # whether these groups' tenants are over their share: the two kinds never share a prefill
        while (tenant := self._turns.least()) is not None:
            head = tenant.ready[0][-1]
            if passed and tenant.counter > passed[0].counter + self.limits.preempt_after:
                break
            if head.awaits in self._parked or not self.foresee(head):
                self._park(tenant)  # it must not block others before its adapter is loaded
                continue
            full = self.limits.too_much(tokens + head.unread, length + head.length, lone=not self.running)
            if head in preempted or (groups and (full or self._shares.over(tenant) != over)):
                break
            victims = self._victims(tenant, head) if self._may_interrupt(tenant, head) else None
            if not victims and self._must_leave_room(tenant) and (victims is None or head.width > self._room(tenant)):
                passed.append(self._turns.take_least())
                continue
            if victims is None:
                break
            if not admit(head):
                self._park(tenant)
                continue
            for victim in victims:
                self._preempt(victim)
            preempted += victims
            over = self._shares.over(tenant)
            groups.append(self._start(tenant, head, admit))
            tokens, length = tokens + head.unread, length + head.length
        for tenant in passed:
            self._turns.add(tenant)
        return tuple(groups)

    def _may_interrupt(self, tenant: Tenant, head: Sequence) -> bool:
        """Whether the prefill in progress, if any, may be paused for that of `head`: its tenants are over their share,
        or those who would wait for `head` do so for less, in total, than `head` would for them."""
        if not self._prefills:
            return True
        under_way = self._prefills[-1]
        favoured = not self._shares.over(tenant) and all(map(self._shares.over, under_way.tenants))
        most = min(other.counter for other in under_way.tenants) + (self.limits.preempt_after if favoured else 0)
        if tenant in under_way.tenants or tenant.counter > most:
            return False
        return favoured or max(2, len(under_way.groups)) * head.unread <= under_way.tokens - under_way.done

    def _must_leave_room(self, tenant: Tenant) -> bool:
        """Whether some free slots are reserved from this tenant for others. A tenant that runs nothing may use any."""
        return tenant.running > 0 and self._shares.over(tenant)

    def _room(self, tenant: Tenant) -> int:
        """The number of free slots that the tenant may use."""
        return len(self._free) - (self._shares.head_room if self._must_leave_room(tenant) else 0)

    def _start(self, tenant: Tenant, head: Sequence, admit: Callable[[Sequence], bool]) -> PrefillGroup:
        """Assign slots to `head`, and to those siblings that can share its prefill, while there are any."""
        group = [head]
        self._occupy(tenant, head)
        for sibling in head.siblings if not head.resumes else ():
            fresh = sibling.state is SequenceState.WAITING and not sibling.resumes
            if not fresh or self._room(tenant) <= 0 or not self.foresee(sibling):
                continue
            sibling.borrowed = head.borrowed
            if self.kv.missing(sibling, self.kv.growing(self.running)) <= 0 and admit(sibling):
                sibling.borrowed = head.borrowed  # at least, of what `head` will hold
                self._occupy(tenant, sibling)
                group.append(sibling)
        if not head.resumes:  # a preempted sequence is charged for its prompt once
            tenant.counter += head.unread * PROMPT_WEIGHT / tenant.weight
            if not self._shares.over(tenant):
                mean = self.newcomer_tokens or head.unread
                self.newcomer_tokens = mean + NEWS * (head.unread - mean)
        return tuple(group)

    def _occupy(self, tenant: Tenant, sequence: Sequence) -> None:
        self._count_waiting(tenant, -1)
        self._shares.hold(tenant, sequence.width)
        self.kv.take(sequence)
        sequence.take([heapq.heappop(self._free) for _ in range(sequence.width)])
        sequence.to(SequenceState.PREFILLING)

    def _victims(self, tenant: Tenant, head: Sequence) -> list[Sequence] | None:
        """The running sequences to preempt for `head`; None if there are not enough.

        Of tenants that are far ahead; or, if `tenant` is within its share, of those that exceed theirs.
        """
        slots = head.width - len(self._free)
        if slots <= 0 and self.kv.missing(head, self.kv.growing(self.running)) <= 0:
            return []
        room = Room(head, self.kv, slots, self.running)
        most = tenant.counter + self.limits.preempt_after
        within = tenant.running + head.width <= self._shares.of(tenant)
        candidates = []
        for sequence in self.running:
            owner = self._of(sequence)
            ahead = owner.counter > most and sequence.preemptible
            holds_more = owner.counter >= tenant.counter and owner.running > self._shares.of(owner)
            settled = sequence.preemptible or not (tenant.running or self._shares.over(tenant))
            if ahead or (within and holds_more and settled and sequence.width == 1):
                candidates.append((not ahead, sequence))
        victims = to_start(room, candidates, self._of, self._shares)
        return None if victims is None or self._ends_before(room, victims) else victims

    def _ends_before(self, room: Room, victims: list[Sequence]) -> bool:
        """Whether enough slots and blocks will be free before the victims could be read again."""
        again = sum(victim.length for victim in victims)
        return room.there(
            [s for s in self.running if s.tokens_left <= SOON and s.tokens_left * self.step_tokens <= again]
        )

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._leave(sequence)
        sequence.to(SequenceState.WAITING)
        self._queue(sequence)

    def _plan(self, preempted: tuple[Sequence, ...]) -> SchedulerOutput:
        """The step. Tenants over their share do not decode during the prefill of one that is not, though never for two
        consecutive steps; while others are active they get short steps: a few rows in turn, or part of a prefill."""
        prefill = self._prefills[-1] if self._prefills else None
        holding = {self._of(sequence) for sequence in self.running}.union(*(p.tenants for p in self._prefills))
        over = {tenant for tenant in holding if self._shares.over(tenant)}
        favoured = prefill is not None and not over.issuperset(prefill.tenants)
        short = bool(over) and self._shares.others_about()
        rows, rest = self.running, []
        if short:
            rows, rest = [s for s in rows if self._of(s) not in over], [s for s in rows if self._of(s) in over]
        self._sat_out = bool(rest) and prefill is not None and not self._sat_out
        reads = prefill is not None
        if rest and not self._sat_out:
            rows = sorted([*rows, *self._in_turn(rest, len(rows))], key=attrgetter("slot"))
            reads = favoured
        for sequence in rows:
            sequence.stepped = self._steps
        if not reads or prefill is None:
            return SchedulerOutput(None, tuple(rows), preempted)
        until = prefill.tokens
        if rows:
            until = min(until, prefill.done + self.chunk_tokens)
        elif favoured or not short:
            until = min(until, prefill.done + self.lone_tokens)
        if short and not favoured:
            until = min(until, prefill.done + self.short_tokens)
        part = PrefillChunk(prefill.groups, prefill.done, until, ends=until == prefill.tokens)
        prefill.done = until
        return SchedulerOutput(part, tuple(rows), preempted)

    def _in_turn(self, sequences: list[Sequence], others: int) -> list[Sequence]:
        """As many as fit into a short step beside `others`, those that waited longest for a token first."""
        room = max(1, self.short_rows - others)
        chosen: list[Sequence] = []
        for sequence in sorted(sequences, key=attrgetter("stepped")):
            if chosen and sequence.width > room:
                break
            chosen.append(sequence)
            room -= sequence.width
        return chosen

    def _of(self, sequence: Sequence) -> Tenant:
        return self._tenants[sequence.request.tenant]

    def _forget_idle(self) -> None:
        """Nothing waits or runs: reset counters, and keep only recently seen tenants."""
        self._turns.least()  # drops all entries, which have old counters
        self._tenants = dict(self._shares.active)
        for tenant in self._tenants.values():
            tenant.counter = 0.0

    def _queue(self, sequence: Sequence) -> None:
        tenant = self._of(sequence)
        self._count_waiting(tenant, 1)
        self._make_ready(sequence)
        self._floors.add(tenant)

    def _make_ready(self, sequence: Sequence) -> None:
        tenant = self._of(sequence)
        heapq.heappush(tenant.ready, (sequence.order, next(self._order), sequence))
        self._turns.add(tenant)

    def _park(self, tenant: Tenant) -> None:
        """Set the tenant's oldest sequence aside until adapters are loaded or removed."""
        sequence = heapq.heappop(tenant.ready)[-1]
        adapter = sequence.awaits
        assert adapter is not None, "sequences only wait for adapters"
        self._parked.setdefault(adapter, []).append(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """A waiting sequence ended. Queues are cleaned once most of their entries have ended."""
        tenant = self._of(sequence)
        self._count_waiting(tenant, -1)
        parked = self._parked.get(sequence.awaits or "", [])
        if sequence in parked:
            parked.remove(sequence)
            if not parked:
                del self._parked[sequence.awaits or ""]
        tenant.tidy()

    def _leave(self, sequence: Sequence) -> None:
        """The sequence no longer runs: its slots are free. It still lists them, so that they can be saved."""
        self._shares.hold(self._of(sequence), -sequence.width)
        self.kv.give_back(sequence)
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)

    def _count_waiting(self, tenant: Tenant, change: int) -> None:
        self.num_waiting += change
        tenant.waiting += change
