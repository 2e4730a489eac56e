"""The leases of one gateway: of the limits that several gateways share, by the store's buckets, taken ahead of need.

A request is admitted from what is held, without a question to the store. What runs low is topped up meanwhile, and
what is not used is given back. Only a request that finds too little waits for the store. No gateway holds more ahead
than its part of a tenth of the limit; a lease doubles where it is used up within `LEASE_S`, and where the limit is too
small to hold anything ahead each request asks.

While the store is away, what is held is used up; then each gateway admits its even share of the limit, for `AWAY_S`.
For one event loop. Questions go through one thread; those that come meanwhile go together in the next.
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

PATIENCE_S = 0.25  # how long a request waits for the store before it counts as away
AWAY_S = 600.0  # as long as keys are trusted without it
CLOSE_S = 5.0
MAX_LEASES = 10_000  # above this number those are forgotten that hold nothing
log = logging.getLogger("pedro.gateway")


class _Need:
    """One request that waits for the store: what it took of what was held, and what is missing."""

    def __init__(self, lease: Lease, amount: int, now: float) -> None:
        self.lease = lease
        self.drawn = lease.draw(amount, now)
        self.missing = amount - self.drawn
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def granted(self) -> bool:
        return self.answer.done() and not self.answer.cancelled() and self.answer.result()

    def settle(self, granted: bool) -> None:
        """The store's answer; where nobody waits any more, it goes back."""
        if not self.answer.done():
            self.answer.set_result(granted)
            if not granted:
                self._undraw()
        elif granted:
            self.lease.put(self.missing)

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if self.granted:
            self.lease.put(self.drawn + self.missing)
        elif not self.answer.done():
            self.answer.cancel()
            self._undraw()

    def _undraw(self) -> None:
        self.lease.put(self.drawn)


class Leases:
    """`gateways` share the limits, this is one of them. `clock` gives Unix seconds."""

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
        """The store did not answer when it was asked last."""
        return self._away_since is not None

    def find(self, subject: str, what: str, limit: int, now: float) -> Lease:
        """The lease of that limit, which may have changed."""
        lease = self._leases.get((subject, what))
        if lease is None:
            if len(self._leases) >= MAX_LEASES:
                self._leases = {key: lease for key, lease in self._leases.items() if not lease.empty}
            lease = self._leases[subject, what] = Lease(self, subject, what, limit, now)
        lease.limit = limit
        return lease

    def known(self, lease: Lease) -> Lease:
        """The one that now stands for its bucket."""
        return self._leases.setdefault((lease.subject, lease.what), lease)

    def stir(self, lease: Lease) -> None:
        """Have the store asked about it soon, while requests go on."""
        self._stirred[lease.subject, lease.what] = lease
        if not self.away:
            self._ask_store()

    async def take(self, wanted: Sequence[tuple[Lease, int]]) -> list[bool]:
        """Take so much of each of what the store has, each whole or not at all.

        Raises UnavailableError where the store has been away for too long.
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
        """Give back what is not used, and look again at what others use; called every `REFRESH_S`."""
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
        """Return when the store was told and asked all that there is."""
        while self._asking is not None and not self._asking.done():
            await asyncio.wait({self._asking})

    async def close(self) -> None:
        """Give everything back, as far as the store answers soon."""
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
            self._asking = asyncio.create_task(self._ask(), context=Context())  # about no request
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), context=Context())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            self.tick()

    async def _ask(self) -> None:
        """Ask the store until nothing is left to ask, or it does not answer."""
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
            except Exception as error:  # noqa: BLE001 (whatever it is, requests go on without it)
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
