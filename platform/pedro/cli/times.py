"""Times as people write them on a command line: `90d`, `24h`, `2027-01-31`."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from pedro.errors import ConfigError

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
LONGEST_S = 100 * 365 * 86_400
_DURATION = re.compile(r"([0-9]{1,12})([smhdw])")


def duration(text: str, field: str) -> float:
    """Seconds of `24h` or `90d`. Raises ConfigError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) * SECONDS[match[2]] > LONGEST_S:
        raise ConfigError(f"{field}: expected a time such as 30m, 24h or 90d, got {text[:80]!r}", param=field)
    return float(int(match[1]) * SECONDS[match[2]])


def from_now(text: str, field: str) -> float:
    """Unix seconds of what is so far ahead (`90d`), or of a date (UTC). Raises ConfigError."""
    return _moment(text, field, 1)


def ago(text: str, field: str) -> float:
    """Unix seconds of what was so long ago (`24h`), or of a date (UTC). Raises ConfigError."""
    return _moment(text, field, -1)


def shown(seconds: float | None, otherwise: str = "-") -> str:
    """A moment in UTC, to the minute."""
    return otherwise if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _moment(text: str, field: str, direction: int) -> float:
    if _DURATION.fullmatch(text.strip()):
        return time.time() + direction * duration(text, field)
    try:
        moment = datetime.fromisoformat(text.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{field}: expected a time such as 24h or 90d, or a date such as 2027-01-31, got {text[:80]!r}",
            param=field,
        ) from None
