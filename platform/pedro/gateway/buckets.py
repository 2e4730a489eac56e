"""What is left of a limit: the interface of buckets, and the bucket of a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pedro.store import window_end

Clock = Callable[[], float]


class Allowance(Protocol):
    """One limit of one tenant or key. Times are Unix seconds of the injected clock."""

    what: str  # the limit's column in the quotas table
    limit: int

    @property
    def window(self) -> float:
        """The start of the current day or month; 0 for limits per minute."""

    def left(self, now: float) -> float:
        """What may be used now, negative if overdrawn; of a shared limit as of the last query to the store."""

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is available; 0 if it is now."""

    def take(self, amount: int, now: float) -> bool:
        """Use `amount`, if that much is available locally."""

    def give(self, amount: float, window: float) -> None:
        """Return what was taken in that window and not used; negative: what was used beyond it."""


class Bucket:
    """Implements `Allowance`: `limit` per minute, of which `share` is this process's; it refills evenly.

    `refills=False`: the share of a daily or monthly limit, which is renewed by creating a new bucket.
    """

    window = 0.0

    def __init__(self, what: str, limit: int, now: float, *, share: float = 1.0, refills: bool = True) -> None:
        self.what = what
        self._share = share
        self._refills = refills
        self._at = now
        self._set(limit)
        self._level = self.capacity

    def left(self, now: float) -> float:
        self._level = min(self.capacity, self._level + max(0.0, now - self._at) * self._rate)
        self._at = now
        return self._level

    def spent(self, now: float) -> float:
        """How much is missing from a full bucket."""
        return self.capacity - self.left(now)

    def wait_s(self, amount: float, now: float) -> float:
        return refill_s(self.what, amount - self.left(now), self._rate, now)

    def take(self, amount: float, now: float) -> bool:
        if self.left(now) < amount:
            return False
        self._level -= amount
        return True

    def give(self, amount: float, window: float = 0.0) -> None:
        self._level = min(self.capacity, self._level + amount)

    def resize(self, limit: int, now: float) -> None:
        """Changes the limit: what is left is kept, and an increase can be used at once."""
        left, old = self.left(now), self.capacity
        self._set(limit)
        self._level = min(self.capacity, left + max(0.0, self.capacity - old))

    def _set(self, limit: int) -> None:
        self.limit = limit
        self.capacity = max(1.0, limit * self._share)
        self._rate = limit * self._share / 60 if self._refills else 0.0


class LocalBuckets:
    """Buckets of this process, created on first use; a new one is full."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def find(self, subject: str, what: str, limit: int, now: float) -> Bucket:
        """The bucket of this limit, whose value may have changed."""
        bucket = self._buckets.get((subject, what))
        if bucket is None:
            if len(self._buckets) >= self._most:  # drop full ones: a new one is full as well
                self._buckets = {k: b for k, b in self._buckets.items() if b.left(now) < b.capacity}
            bucket = self._buckets[subject, what] = Bucket(what, limit, now)
        elif bucket.limit != limit:
            bucket.resize(limit, now)
        return bucket


def refill_s(what: str, missing: float, per_s: float, now: float) -> float:
    """Seconds until this much of a limit has refilled."""
    if missing <= 0:
        return 0.0
    return missing / per_s if per_s else window_end(what, now) - now
