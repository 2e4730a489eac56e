"""Which tenants have used up their daily or monthly training hours: their jobs wait for the next period."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.store import TRAINING_LIMITS, period_of, utc, window_end, window_start

if TYPE_CHECKING:
    from pedro.store import Store

HOUR_S = 3600.0


def used_up(store: Store, now: float) -> dict[str, str]:
    """Tenants whose training budget is used up, each with the reason for waiting; of two budgets, the one ending later.

    A budget does not limit a job once it has started: it runs to its end.
    """
    quotas = store.training_budgets()
    found: dict[str, str] = {}
    for what in TRAINING_LIMITS if quotas else ():
        trained = store.trained_seconds(window_start(what, now), now)
        for tenant, quota in quotas.items():
            limit = getattr(quota, what)
            if limit is not None and trained.get(tenant, 0.0) >= limit * HOUR_S:
                found[tenant] = (
                    f"waits: the {period_of(what)}'s budget of {limit:,} hours of training is used up; it is renewed "
                    f"at {utc(window_end(what, now))}"
                )
    return found
