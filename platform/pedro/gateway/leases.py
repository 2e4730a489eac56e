"""The leases of one gateway on limits that several gateways share in the store's buckets, taken ahead of need.

A request is admitted from the lease, without querying the store. Leases that run low are refilled in the background,
and unused ones are returned. Only a request that finds too little waits for the store. A gateway leases at most its
part of a tenth of the limit; a lease doubles if it is used up within `LEASE_S`; if the limit is too small to lease
ahead, each request queries the store.

While the store is away, leases are used up first; then each gateway admits its even share of the limit, for `AWAY_S`.
For one event loop. Queries use one thread; those that arrive meanwhile are combined into the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING

from pedro.errors import UnavailableError
from pedro.gateway.lease import LEASE_S, REFRESH_S, Lease

if TYPE_CHECKING:
    from pedro.gateway.buckets import Clock
    from pedro.store import LeaseGrant, LeaseRequest, Store

PATIENCE_S = 0.25  # how long a request waits before the store counts as away
AWAY_S = 600.0  # as long as cached keys are accepted
CLOSE_S = 5.0
MAX_LEASES = 10_000  # above this number, empty ones are dropped
log = logging.getLogger("pedro.gateway")


class _Need:
    """A request that waits for the store: what it took from the lease, and what is missing."""

    def __init__(self, lease: Lease, amount: int, now: float) -> None:
        self.lease = lease
        self.drawn = lease.draw(amount, now)
        self.missing = amount - self.drawn
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def granted(self) -> bool:
        return self.answer.done() and not self.answer.cancelled() and self.answer.result()

    def settle(self, granted: bool) -> None:
        """Deliver the store's answer; if the request is gone, return the amount."""
        if not self.answer.done():
            self.answer.set_result(granted)
            if not granted:
                self._undraw()
        elif granted:
            self.lease.put(self.missing)

    def abandon(self) -> None:
        """The request no longer waits."""
        if self.granted:
            self.lease.put(self.drawn + self.missing)
        elif not self.answer.done():
            self.answer.cancel()
            self._undraw()

    def _undraw(self) -> None:
        self.lease.put(self.drawn)


class Leases:
    """`gateways` share the limits, including this one. `clock` returns Unix seconds."""

    def __init__(self, store: Store, gateways: int = 1, clock: Clock = time.time) -> None:
        self.part = 1 / gateways
        self._store = store
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-quotas")
        self._leases: dict[tuple[str, str], Lease] = {}
        self._needs: list[_Need] = []
        self._stirred: dict[tuple[str, str], Lease] = {}
        self._asking: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._away_since: float | None = None

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def away(self) -> bool:
        """Whether the store did not answer the last query."""
        return self._away_since is not None

    def find(self, subject: str, what: str, limit: int, now: float) -> Lease:
        """The lease of this limit, whose value may have changed."""
        lease = self._leases.get((subject, what))
        if lease is None:
            if len(self._leases) >= MAX_LEASES:
                self._leases = {key: lease for key, lease in self._leases.items() if not lease.empty}
            lease = self._leases[subject, what] = Lease(self, subject, what, limit, now)
        lease.limit = limit
        return lease

    def known(self, lease: Lease) -> Lease:
        """The current lease of its bucket."""
        return self._leases.setdefault((lease.subject, lease.what), lease)

    def stir(self, lease: Lease) -> None:
        """Query the store about it soon, in the background."""
        self._stirred[lease.subject, lease.what] = lease
        if not self.away:
            self._ask_store()

    async def take(self, wanted: Sequence[tuple[Lease, int]]) -> list[bool]:
        """Take these amounts from the store, each whole or not at all.

        Raises UnavailableError if the store has been away for too long.
        """
        now = self._clock()
        if self._away_since is not None:
            if now - self._away_since > AWAY_S:
                raise UnavailableError("The platform's database does not answer; try again.", code="database")
            return [lease.take(amount, now) for lease, amount in wanted]
        if any(lease.hopeless(amount, now) for lease, amount in wanted):
            return [False] * len(wanted)
        needs = [_Need(lease, amount, now) for lease, amount in wanted]
        self._needs += needs
        self._ask_store()
        try:
            _, late = await asyncio.wait([need.answer for need in needs], timeout=PATIENCE_S)
        except asyncio.CancelledError:
            for need in needs:
                need.abandon()
            raise
        if late:
            self._gone("slow")
        if not self.away:
            return [need.granted for need in needs]
        return [need.granted or self._alone(need, amount) for need, (_, amount) in zip(needs, wanted, strict=True)]

    def tick(self) -> None:
        """Return unused amounts and refresh others' usage; called every `REFRESH_S`."""
        now = self._clock()
        for lease in self._leases.values():
            lease.turn(now)
            idle = now - lease.taken_at > LEASE_S
            if idle:
                lease.let_go()
            if lease.back or (not idle and (lease.seen_at is None or now - lease.seen_at >= REFRESH_S)):
                self._stirred[lease.subject, lease.what] = lease
        if self._stirred or self.away:
            self._ask_store()

    async def settled(self) -> None:
        """Wait until all pending queries are done."""
        while self._asking is not None and not self._asking.done():
            await asyncio.wait({self._asking})

    async def close(self) -> None:
        """Return all leases, if the store answers soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.settled()
                for lease in self._leases.values():
                    lease.let_go()
                    if lease.back:
                        self.stir(lease)
                await self.settled()
        if self._keeper is not None:
            self._keeper.cancel()
        self._thread.shutdown(wait=False)

    def _alone(self, need: _Need, amount: int) -> bool:
        need.abandon()
        return need.lease.take(amount, self._clock())

    def _ask_store(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), context=Context())  # in no request's context
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), context=Context())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            self.tick()

    async def _ask(self) -> None:
        """Query the store until nothing is pending, or it does not answer."""
        again = True
        while again:
            now = self._clock()
            needs, self._needs = self._needs, []
            of_lease: dict[Lease, list[_Need]] = {lease: [] for lease in self._stirred.values()}
            self._stirred = {}
            for need in needs:
                if not need.answer.done():
                    of_lease.setdefault(self.known(need.lease), []).append(need)
            requests = [lease.request([need.missing for need in its], now) for lease, its in of_lease.items()]
            try:
                grants = await self._exchange(requests, now)
            except Exception as error:  # noqa: BLE001 (any error: requests continue without the store)
                for lease, request in zip(of_lease, requests, strict=True):
                    lease.back += request.back
                self._gone(repr(error))
                for need in needs:
                    need.settle(granted=False)
                return
            for (lease, its), grant in zip(of_lease.items(), grants, strict=True):
                lease.told(grant, now)
                for need, granted in zip(its, grant.granted, strict=True):
                    need.settle(granted)
            if self.away:
                self._returned()
            again = bool(self._needs or self._stirred)

    async def _exchange(self, requests: list[LeaseRequest], now: float) -> list[LeaseGrant]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._store.exchange, requests, now)

    def _gone(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = self._clock()
            log.warning("the database does not answer (%s): applying this gateway's share of each quota", reason)

    def _returned(self) -> None:
        log.warning("the database answers again: quotas are shared again")
        self._away_since = None
        now = self._clock()
        for lease in self._leases.values():
            lease.reported(now)
            if lease.back:
                self._stirred[lease.subject, lease.what] = lease
