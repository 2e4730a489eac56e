"""A fleet of engine replicas behind gateways, simulated call by call with the router's own placement.

Each replica shares its speed among the calls in its slots, keeps the adapters that were asked for last, and loads
others while the calls for them wait. What calls and loads cost is handed in. Knows no engine, no HTTP.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pedro.serving.router import key_of, pick, ranks

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOADERS = 4  # adapters that a replica loads at once, as the engine's pool
NEWS_S = 0.03  # after so long a gateway hears of the others' calls: a slice of the protocol
SAMPLES = 200  # of all replicas' loads in the time that counts


@dataclass(frozen=True)
class Costs:
    """Of one replica: `rates[b]` calls/s with b of them in its slots, the adapters that it has room for, and a load."""

    rates: tuple[float, ...]
    room: int
    load_s: float  # from a call that misses to its adapter
    load_cpu_s: float  # of it, what the engine lacks meanwhile

    @property
    def slots(self) -> int:
        return len(self.rates) - 1


@dataclass(frozen=True)
class Demand:
    """Calls of `tenants` by Zipf's law 1/k^`zipf` at `share` of what replicas can do; the first `warm` do not count."""

    replicas: int
    tenants: int
    zipf: float
    share: float
    warm: int
    calls: int
    gateways: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Placement:
    """Chooses a replica of those that live, given how an adapter likes them and their loads as a gateway knows them."""

    name: str
    choose: Callable[[NDArray[np.uint64], NDArray[np.int64], random.Random], int]


def by_adapter(share: float, name: str = "by adapter") -> Placement:
    """The router's, with another bound on what one replica takes."""
    return Placement(name, lambda liked, loads, _: pick(liked, loads, share))


def _at_random(_liked: Any, loads: Any, rng: random.Random) -> int:
    return rng.randrange(len(loads))


def _least_of_two(_liked: Any, loads: Any, rng: random.Random) -> int:
    one, other = rng.randrange(len(loads)), rng.randrange(len(loads))
    return one if loads[one] <= loads[other] else other


ROUTER = Placement("by adapter", lambda liked, loads, _: pick(liked, loads))
AT_RANDOM = Placement("at random", _at_random)
LEAST_OF_TWO = Placement("least of two", _least_of_two)
AT_HOME = Placement("at home only", lambda liked, _loads, _rng: int(liked.argmax()))


@dataclass
class _Replica:
    active: list[tuple[float, int]] = field(default_factory=list)  # heap: the work at which a call ends, and the call
    queue: deque[int] = field(default_factory=deque)
    resident: OrderedDict[int, None] = field(default_factory=OrderedDict)  # asked for longest ago first
    loading: dict[int, list[int]] = field(default_factory=dict)  # who waits for an adapter
    to_load: deque[int] = field(default_factory=deque)
    loaders: int = 0
    work: float = 0.0  # done for each active call since the start, in mean calls
    since: float = 0.0
    epoch: int = 0  # of the next end that is foreseen


@dataclass
class Seen:
    """What became of the calls that count. A wait is the time until a call has slot and adapter."""

    hits: list[bool] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)  # when each was placed, from the first that counts
    waits_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    loads: int = 0
    lives: list[Any] = field(default_factory=list)  # loads of all living replicas over their mean
    hot_on: int = 0  # replicas that have the most wanted adapter at the end
    held: int = 0  # different adapters that are resident somewhere at the end
    held_twice: int = 0
    again: int = 0  # calls whose replica died

    def row(self) -> dict[str, float | int]:
        """Its figures."""
        lives = np.concatenate(self.lives) if self.lives else np.ones(1)
        waits, ends = np.array(self.waits_s or [0.0]), np.array(self.ends_s or [0.0])
        return {
            "hit_share": round(float(np.mean(self.hits)), 4),
            "loads_a_call": round(self.loads / len(self.hits), 4),
            "wait_p50_ms": round(1000 * float(np.quantile(waits, 0.5)), 1),
            "wait_p99_ms": round(1000 * float(np.quantile(waits, 0.99)), 1),
            "answer_p50_s": round(float(np.quantile(ends, 0.5)), 3),
            "answer_p99_s": round(float(np.quantile(ends, 0.99)), 3),
            "load_p50": round(float(np.quantile(lives, 0.5)), 3),
            "load_p99": round(float(np.quantile(lives, 0.99)), 3),
            "hot_on": self.hot_on,
            "held": self.held,
            "held_twice": self.held_twice,
        }


class Fleet:
    """One run. `die` replicas go for good in the middle of the calls that count."""

    def __init__(self, costs: Costs, demand: Demand, placement: Placement, die: int = 0) -> None:
        rng = np.random.default_rng(demand.seed)
        count = demand.warm + demand.calls
        weights = 1.0 / np.arange(1, demand.tenants + 1) ** demand.zipf
        self._tenants = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(count)).clip(
            max=demand.tenants - 1
        )
        self._keys = rng.integers(2**64, size=demand.tenants, dtype=np.uint64)  # as good as those of names
        rate = demand.share * demand.replicas * costs.rates[-1]
        self._arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
        self._sizes = rng.exponential(1.0, count).tolist()  # answers' lengths differ so
        self._seeds = np.array([key_of(f"replica-{n}") for n in range(demand.replicas)], dtype=np.uint64)
        self._costs, self._demand, self._place = costs, demand, placement.choose
        self._rng = random.Random(demand.seed)  # noqa: S311
        self._replicas = [_Replica() for _ in range(demand.replicas)]
        self._alive = np.arange(demand.replicas)
        self._own = np.zeros((demand.gateways, demand.replicas), dtype=np.int64)  # unfinished calls by gateway
        self._others = np.zeros_like(self._own)
        self._told = 0.0
        self._events: list[tuple[float, int, int, int]] = []  # when, replica, epoch of an end or -1, tenant of a load
        self._at: dict[int, int] = {}  # the replica of each unfinished call
        self._die, self._seen = die, Seen()
        self._begin = self._arrivals[demand.warm]

    def run(self) -> Seen:
        """Until the last call has come; who waits then has waited so long."""
        seen, warm, last = self._seen, self._demand.warm, self._arrivals[-1]
        dies_at = self._begin + (last - self._begin) / 2 if self._die else float("inf")
        every = (last - self._begin) / SAMPLES
        sample_at = self._begin
        for call, moment in enumerate(self._arrivals):
            self._until(moment)
            if moment >= dies_at:
                self._kill(moment)
                dies_at = float("inf")
            while moment >= sample_at:
                lives = self._own.sum(axis=0)[self._alive]
                seen.lives.append(lives / max(lives.mean(), 1e-9))
                sample_at += every
            self._arrive(call, moment, counts=call >= warm)
        seen.waits_s += [last - self._arrivals[call] for call in self._unstarted() if call >= warm]
        self._look()
        return seen

    def _arrive(self, call: int, moment: float, counts: bool) -> None:
        """Place a call as one of the gateways would, which knows its own calls now and the others' since a while."""
        if moment >= self._told:
            self._others = self._own.sum(axis=0) - self._own
            self._told = moment + NEWS_S
        gateway, tenant = call % self._demand.gateways, int(self._tenants[call])
        view = (self._own[gateway] + self._others[gateway])[self._alive]
        liked = ranks(int(self._keys[tenant]), self._seeds[self._alive])
        number = int(self._alive[self._place(liked, view, self._rng)])
        self._own[gateway, number] += 1
        self._at[call] = number
        replica = self._replicas[number]
        hit = tenant in replica.resident
        if counts:
            self._seen.hits.append(hit)
            self._seen.at_s.append(moment - self._begin)
        if hit:
            replica.resident.move_to_end(tenant)
            self._admit(number, call, moment)
        elif tenant in replica.loading:
            replica.loading[tenant].append(call)
        else:
            self._seen.loads += counts
            replica.loading[tenant] = [call]
            replica.to_load.append(tenant)
            self._load(number, moment)

    def _until(self, moment: float) -> None:
        """All that happens before."""
        while self._events and self._events[0][0] <= moment:
            when, number, epoch, tenant = heapq.heappop(self._events)
            replica = self._replicas[number]
            if epoch < 0:
                if tenant in replica.loading:  # else it died
                    self._loaded(number, tenant, when)
            elif epoch == replica.epoch:
                self._end(number, when)

    def _load(self, number: int, moment: float) -> None:
        replica = self._replicas[number]
        while replica.to_load and replica.loaders < LOADERS:
            replica.loaders += 1
            event = (moment + self._costs.load_s, number, -1, replica.to_load.popleft())
            heapq.heappush(self._events, event)

    def _loaded(self, number: int, tenant: int, moment: float) -> None:
        replica = self._replicas[number]
        replica.loaders -= 1
        if len(replica.resident) >= self._costs.room:
            replica.resident.popitem(last=False)
        replica.resident[tenant] = None
        self._advance(replica, moment)
        if active := len(replica.active):
            replica.work -= self._costs.load_cpu_s * self._costs.rates[active] / active
            self._foresee(number, moment)
        for call in replica.loading.pop(tenant):
            self._admit(number, call, moment)
        self._load(number, moment)

    def _admit(self, number: int, call: int, moment: float) -> None:
        """Give the call a slot, or a place in the queue."""
        replica = self._replicas[number]
        if len(replica.active) >= self._costs.slots:
            replica.queue.append(call)
            return
        self._advance(replica, moment)
        self._start(replica, call, moment)
        self._foresee(number, moment)

    def _start(self, replica: _Replica, call: int, moment: float) -> None:
        heapq.heappush(replica.active, (replica.work + self._sizes[call], call))
        if call >= self._demand.warm:
            self._seen.waits_s.append(moment - self._arrivals[call])

    def _end(self, number: int, moment: float) -> None:
        replica = self._replicas[number]
        self._advance(replica, moment)
        _, call = heapq.heappop(replica.active)
        self._own[call % self._demand.gateways, number] -= 1
        del self._at[call]
        if call >= self._demand.warm:
            self._seen.ends_s.append(moment - self._arrivals[call])
        if replica.queue:
            self._start(replica, replica.queue.popleft(), moment)
        self._foresee(number, moment)

    def _advance(self, replica: _Replica, moment: float) -> None:
        if active := len(replica.active):
            replica.work += (moment - replica.since) * self._costs.rates[active] / active
        replica.since = moment

    def _foresee(self, number: int, moment: float) -> None:
        """Note when the next call will end if none comes before."""
        replica = self._replicas[number]
        replica.epoch += 1
        if active := len(replica.active):
            left = max(0.0, replica.active[0][0] - replica.work) * active / self._costs.rates[active]
            heapq.heappush(self._events, (moment + left, number, replica.epoch, -1))

    def _kill(self, moment: float) -> None:
        """Some replicas die together; their calls are issued again, from their start."""
        dead = self._rng.sample(range(len(self._replicas)), self._die)
        lost = sorted(call for call, number in self._at.items() if number in set(dead))
        self._alive = np.setdiff1d(self._alive, dead)
        for number in dead:
            self._replicas[number] = _Replica(epoch=self._replicas[number].epoch + 1)
            self._own[:, number] = 0
        self._told = 0.0
        self._seen.again = len(lost)
        for call in lost:
            self._arrive(call, moment, counts=False)

    def _unstarted(self) -> list[int]:
        waiting = [call for replica in self._replicas for call in replica.queue]
        return waiting + [c for replica in self._replicas for calls in replica.loading.values() for c in calls]

    def _look(self) -> None:
        held: dict[int, int] = {}
        for replica in self._replicas:
            for tenant in replica.resident:
                held[tenant] = held.get(tenant, 0) + 1
        self._seen.hot_on, self._seen.held = held.get(0, 0), len(held)
        self._seen.held_twice = sum(count > 1 for count in held.values())


def share_moved(replicas: int, tenants: int, seed: int = 0) -> float:
    """The share of adapters whose first replica is another once one has gone. Asserts that no others moved."""
    seeds = np.array([key_of(f"replica-{n}") for n in range(replicas)], dtype=np.uint64)
    keys: Sequence[int] = np.random.default_rng(seed).integers(2**64, size=tenants, dtype=np.uint64).tolist()
    moved = 0
    for key in keys:
        liked = ranks(key, seeds)
        before, after = int(liked.argmax()), int(liked[:-1].argmax())
        assert before in (after, replicas - 1), "an adapter moved whose replica is still there"
        moved += before != after
    return moved / tenants
