"""How a limit is used up and renewed: a minute's evenly, as time goes by; a day's and a month's at once, when the next
one begins in UTC. Times are Unix seconds; a limit is called as its column of the quotas is.
"""

from __future__ import annotations

import calendar
import time

DAY_S = 86_400.0


def kind_of(what: str) -> str:
    """requests, tokens or training_hours."""
    return what.partition("_per_")[0]


def period_of(what: str) -> str:
    """minute, day or month."""
    return what.partition("_per_")[2]


def window_start(what: str, at: float) -> float:
    """When the day or month that `at` is in began; 0 for a limit a minute, which has no such window."""
    period = period_of(what)
    if period == "day":
        return at // DAY_S * DAY_S
    if period == "month":
        date = time.gmtime(at)
        return float(calendar.timegm((date.tm_year, date.tm_mon, 1, 0, 0, 0)))
    return 0.0


def window_end(what: str, at: float) -> float:
    """When the next day or month begins."""
    assert period_of(what) != "minute", "a limit a minute has no window"
    return window_start(what, window_start(what, at) + (1.0 if period_of(what) == "day" else 31.0) * DAY_S)


def used_by(what: str, limit: int, used: float, since: float, now: float) -> float:
    """What of `used`, as it was at `since`, is still used at `now`."""
    if period_of(what) == "minute":
        return max(0.0, used - max(0.0, now - since) * limit / 60)
    return used if window_start(what, max(now, since)) == window_start(what, since) else 0.0
