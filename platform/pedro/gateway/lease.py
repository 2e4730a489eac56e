"""One gateway's lease on a shared limit and its cached state. Makes no queries; see `leases.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pedro.gateway.buckets import Bucket, refill_s
from pedro.store import LeaseGrant, LeaseRequest, period_of, used_by, window_start

if TYPE_CHECKING:
    from pedro.gateway.leases import Leases

LEASE_SHARE = 0.1  # of a limit: at most this share is leased ahead by all gateways together
LEASE_S = 10.0  # a lease that is unused for this long is returned
REFRESH_S = 1.0  # maximum age of a gateway's data about others' usage


class Lease:
    """Implements `pedro.gateway.buckets.Allowance`: this gateway's lease on one bucket, and its cached state."""

    def __init__(self, leases: Leases, subject: str, what: str, limit: int, now: float) -> None:
        self.subject, self.what, self.limit = subject, what, limit
        self.window = window_start(what, now)
        self.taken_at = now  # when something was last taken
        self.seen_at: float | None = None  # when the store reported `_used`
        self.back = 0.0  # to be returned; negative: used beyond the lease
        self._leases = leases
        self._held = 0.0
        self._size = 0  # how much to lease ahead
        self._sized_at = -LEASE_S
        self._used = 0.0
        self._stand_in: Bucket | None = None  # while the store is away
        self._assumed = 0.0, now  # estimated usage when it went away

    @property
    def known(self) -> bool:
        """Whether the remaining amount is known."""
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
        lease = self._leases.known(self)  # this one may have been dropped
        if window != lease.window:
            return  # that window is over
        if lease._stand_in is not None:
            lease._stand_in.give(amount)
        elif amount > 0:
            lease.put(amount)
        else:
            covered = min(lease._held, -amount)
            lease._held -= covered
            lease.back += amount + covered

    def put(self, amount: float) -> None:
        """Add this much to the lease, up to its target size; return the rest."""
        kept = min(amount, max(0.0, self._size - self._held))
        self._held += kept
        self.back += amount - kept

    def draw(self, most: int, now: float) -> int:
        """Take from the lease, up to `most`."""
        self.turn(now)
        self.taken_at = now
        drawn = min(int(self._held), most)
        self._held -= drawn
        return drawn

    def turn(self, now: float) -> None:
        """Begin the next day or month: leases of the last one expire."""
        window = window_start(self.what, now)
        if window > self.window:
            self.window = window
            self._held, self.back, self._size, self._stand_in = 0.0, 0.0, 0, None

    def let_go(self) -> None:
        """Lease nothing ahead any more."""
        self.back += self._held
        self._held, self._size = 0.0, 0

    def hopeless(self, amount: int, now: float) -> bool:
        """Whether the store would refuse, by recent data."""
        asked_lately = self.seen_at is not None and now - self.seen_at < REFRESH_S
        return asked_lately and self.left(now) + 1e-6 < amount

    def request(self, needs: Sequence[int], now: float) -> LeaseRequest:
        """The next request to the store."""
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
        """Apply the store's answer."""
        self._used, self.seen_at = grant.used, now
        self.put(grant.ahead)

    def reported(self, now: float) -> None:
        """The store is back: report what was used meanwhile."""
        if self._stand_in is not None:
            used, since = self._assumed
            others = used_by(self.what, self.limit, used, since, now) * self._leases.part
            self.back -= max(0.0, self._stand_in.spent(now) - others)
            self._stand_in = None

    def _stands_in(self, amount: float, now: float) -> bool:
        """Take from this gateway's share of the rest, while the store is away."""
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
