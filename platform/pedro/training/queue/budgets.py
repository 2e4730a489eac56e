"""Which tenants have trained all the hours of their day or month: their jobs wait until it is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.store import TRAINING_LIMITS, period_of, utc, window_end, window_start

if TYPE_CHECKING:
    from pedro.store import Store

HOUR_S = 3600.0


def used_up(store: Store, now: float) -> dict[str, str]:
    """Tenants whose budget of training is used up, each with what its jobs wait for; of two budgets, the later end.

    What a budget leaves is no bound on the job that is started on it: that runs to its end.
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
