"""What one gateway holds of one limit that several share, and what it knows of it. Asks nobody; see `leases.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pedro.gateway.buckets import Bucket, refill_s
from pedro.store import LeaseGrant, LeaseRequest, period_of, used_by, window_start

if TYPE_CHECKING:
    from pedro.gateway.leases import Leases

LEASE_SHARE = 0.1  # of a limit: the most that all gateways together hold ahead of need
LEASE_S = 10.0  # a lease that is not used for so long is given back
REFRESH_S = 1.0  # how old a gateway's knowledge of what others use may be


class Lease:
    """Conforms to `pedro.gateway.buckets.Allowance`: of one bucket, what this gateway holds and what it knows of it."""

    def __init__(self, leases: Leases, subject: str, what: str, limit: int, now: float) -> None:
        self.subject, self.what, self.limit = subject, what, limit
        self.window = window_start(what, now)
        self.taken_at = now  # the last time that something was taken
        self.seen_at: float | None = None  # when the store told `_used`
        self.back = 0.0  # to be given back; below zero: used beyond what was held
        self._leases = leases
        self._held = 0.0
        self._size = 0  # to be held ahead
        self._sized_at = -LEASE_S
        self._used = 0.0
        self._stand_in: Bucket | None = None  # while the store is away
        self._assumed = 0.0, now  # what was taken to be used when it went

    @property
    def known(self) -> bool:
        """Whether anything can be said of what is left."""
        return self.seen_at is not None or self._stand_in is not None

    @property
    def empty(self) -> bool:
        return not self._held and not self.back and self._stand_in is None

    def left(self, now: float) -> float:
        self.turn(now)
        if self._stand_in is not None:
            return self._held + self._stand_in.left(now)
        return self.limit - self._used_now(now) + self._held + self.back

    def wait_s(self, amount: float, now: float) -> float:
        per_s = self.limit / 60 if period_of(self.what) == "minute" else 0.0
        if self._stand_in is not None:
            per_s *= self._leases.part
        return refill_s(self.what, amount - self.left(now), per_s, now)

    def take(self, amount: int, now: float) -> bool:
        self.turn(now)
        self.taken_at = now
        held = min(self._held, amount)
        if held < amount and not self._stands_in(amount - held, now):
            return False
        self._held -= held
        if self._held < self._size / 2:
            self._leases.stir(self)
        return True

    def give(self, amount: float, window: float) -> None:
        lease = self._leases.known(self)  # this one may have been forgotten
        if window != lease.window:
            return  # that day is over
        if lease._stand_in is not None:
            lease._stand_in.give(amount)
        elif amount > 0:
            lease.put(amount)
        else:
            covered = min(lease._held, -amount)
            lease._held -= covered
            lease.back += amount + covered

    def put(self, amount: float) -> None:
        """Hold so much more, as far as it is to be held ahead; the rest goes back."""
        kept = min(amount, max(0.0, self._size - self._held))
        self._held += kept
        self.back += amount - kept

    def draw(self, most: int, now: float) -> int:
        """Take what is held, up to `most`."""
        self.turn(now)
        self.taken_at = now
        drawn = min(int(self._held), most)
        self._held -= drawn
        return drawn

    def turn(self, now: float) -> None:
        """Begin the next day or month: what was held of the last one is over."""
        window = window_start(self.what, now)
        if window > self.window:
            self.window = window
            self._held, self.back, self._size, self._stand_in = 0.0, 0.0, 0, None

    def let_go(self) -> None:
        """Hold nothing ahead any more."""
        self.back += self._held
        self._held, self._size = 0.0, 0

    def hopeless(self, amount: int, now: float) -> bool:
        """Whether the store would say no, as far as is known and was asked lately."""
        asked_lately = self.seen_at is not None and now - self.seen_at < REFRESH_S
        return asked_lately and self.left(now) + 1e-6 < amount

    def request(self, needs: Sequence[int], now: float) -> LeaseRequest:
        """What to ask the store now."""
        self.turn(now)
        most = int(self.limit * LEASE_SHARE * self._leases.part)
        if most < 2:
            self.let_go()
        elif needs or self._held < self._size / 2:
            grows = now - self._sized_at <= LEASE_S
            self._size = min(most, max(*needs, 1, self._size * 2 if grows else self._size // 2))
            self._sized_at = now
        back, self.back = self.back, 0.0
        ahead = max(0, int(self._size - self._held))
        share = self._leases.part / 2
        return LeaseRequest(self.subject, self.what, self.limit, back, tuple(needs), ahead, share)

    def told(self, grant: LeaseGrant, now: float) -> None:
        """What the store answered."""
        self._used, self.seen_at = grant.used, now
        self.put(grant.ahead)

    def reported(self, now: float) -> None:
        """The store is back: what was used meanwhile is to be told."""
        if self._stand_in is not None:
            used, since = self._assumed
            others = used_by(self.what, self.limit, used, since, now) * self._leases.part
            self.back -= max(0.0, self._stand_in.spent(now) - others)
            self._stand_in = None

    def _stands_in(self, amount: float, now: float) -> bool:
        """Take of this gateway's share of what is left, while the store is away."""
        if not self._leases.away:
            return False
        if self._stand_in is None:
            part, refills = self._leases.part, period_of(self.what) == "minute"
            self._stand_in = Bucket(self.what, self.limit, now, share=part, refills=refills)
            self._assumed = self._used_now(now), now
            self._stand_in.give(-self._used_now(now) * part)
        return self._stand_in.take(amount, now)

    def _used_now(self, now: float) -> float:
        return 0.0 if self.seen_at is None else used_by(self.what, self.limit, self._used, self.seen_at, now)
