"""How long things are kept: the environment's settings, read once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pedro.errors import ConfigError

DAY_S = 24 * 3600.0
GUARD_S = 3600.0
"""Nothing that was written within this time is removed, whatever is asked for: somebody may still be at it."""
LEFTOVER_S = DAY_S
"""Half-written files of a process that was killed; one that works still writes to them."""
DAYS = (  # of each field of `Retention`, where PEDRO_KEEP_…_DAYS does not say otherwise
    ("cache_s", 30.0),
    ("checkpoints_s", 14.0),
    ("artifacts_s", 30.0),
    ("datasets_s", 90.0),
    ("records_s", 400.0),
    ("usage_s", 1100.0),
    ("webhooks_s", 30.0),
)
VERSIONS = "PEDRO_KEEP_VERSIONS"
_AGE = re.compile(r"(\d+(?:\.\d+)?)(d|h|m|s)")
_UNITS = {"d": DAY_S, "h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Retention:
    """Seconds that things are kept after they were last of use."""

    cache_s: float
    """This host's copies of adapters and tokenised data, after they were last used."""
    checkpoints_s: float
    """Of jobs and trials that have ended."""
    artifacts_s: float
    """Files of MLflow runs that no version comes from any more."""
    datasets_s: float
    """Data files in the storage that nothing kept names."""
    records_s: float
    """Rows and logs of ended jobs and batches, MLflow runs without a version, revoked keys."""
    usage_s: float
    """Usage by day."""
    webhooks_s: float
    """Events of webhooks, after they were sent or given up."""
    versions: int | None = None
    """The newest so many of each adapter are kept; None keeps all."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Retention:
        """Raises ConfigError for what is not a number of days, or versions."""
        times: dict[str, Any] = {
            field: _number(env, f"PEDRO_KEEP_{field[:-2].upper()}_DAYS", days) * DAY_S for field, days in DAYS
        }
        versions = env.get(VERSIONS)
        if versions and (not versions.isascii() or not versions.isdecimal() or int(versions) < 1):
            raise ConfigError(f"{VERSIONS}: expected a whole number from 1 up, got {versions!r}", param=VERSIONS)
        return cls(**times, versions=int(versions) if versions else None)

    def older_than(self, seconds: float) -> Retention:
        """The same, but what can be made again or is of no use any more is kept for so long; records stay."""
        return replace(self, cache_s=seconds, checkpoints_s=seconds, artifacts_s=seconds, datasets_s=seconds)


def parse_age(text: str) -> float:
    """Seconds of `30d`, `12h`, `90m` or `45s`. Raises ConfigError."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--older-than: expected for instance 30d, 12h or 90m, got {text!r}", param="--older-than")
    return float(match[1]) * _UNITS[match[2]]


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not 0 <= days < 1e6:
        raise ConfigError(f"{name}: expected a number of days, got {text!r}", param=name)
    return days
