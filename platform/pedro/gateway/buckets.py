"""What a limit leaves to be used: what every kind of bucket can do, and the one that lives in this process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pedro.store import window_end

Clock = Callable[[], float]


class Allowance(Protocol):
    """One limit of one tenant or key. Times are Unix seconds of the clock that is handed in."""

    what: str  # as the limit's column of the quotas is called
    limit: int

    @property
    def window(self) -> float:
        """The day or month that it is in, by its beginning; 0 for a limit a minute."""

    def left(self, now: float) -> float:
        """What may be used now, below zero a debt; of a shared one as of when the store was asked last."""

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is left; 0 if it is now."""

    def take(self, amount: int, now: float) -> bool:
        """Use `amount`, if there is so much at hand."""

    def give(self, amount: float, window: float) -> None:
        """Give back what was taken in that window and not used; below zero: what was used beyond it."""


class Bucket:
    """Conforms to `Allowance`: `limit` a minute, of which `share` is this process's; it refills evenly.

    `refills=False`: the share of a day's or month's limit, which is renewed by making another.
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
        """What is missing of all that it holds."""
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
        """Takes another limit: what is left stays, and what a higher one adds can be used at once."""
        left, old = self.left(now), self.capacity
        self._set(limit)
        self._level = min(self.capacity, left + max(0.0, self.capacity - old))

    def _set(self, limit: int) -> None:
        self.limit = limit
        self.capacity = max(1.0, limit * self._share)
        self._rate = limit * self._share / 60 if self._refills else 0.0


class LocalBuckets:
    """Buckets of this process, made when they are first asked for; a new one is full."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def find(self, subject: str, what: str, limit: int, now: float) -> Bucket:
        """The bucket of that limit, which may have changed."""
        bucket = self._buckets.get((subject, what))
        if bucket is None:
            if len(self._buckets) >= self._most:  # full ones are dropped: a new one is full as well
                self._buckets = {k: b for k, b in self._buckets.items() if b.left(now) < b.capacity}
            bucket = self._buckets[subject, what] = Bucket(what, limit, now)
        elif bucket.limit != limit:
            bucket.resize(limit, now)
        return bucket


def refill_s(what: str, missing: float, per_s: float, now: float) -> float:
    """Seconds until so much of a limit comes back."""
    if missing <= 0:
        return 0.0
    return missing / per_s if per_s else window_end(what, now) - now
