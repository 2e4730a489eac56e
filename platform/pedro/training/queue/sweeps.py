"""How many trials of a sweep run concurrently: as many as fit when its driver starts, and at least one.

The section `sweep` of a sweep's spec in the store has `workers` per trial and `at_once`, the maximum of concurrent
trials; `resources.workers` is the total reserved until the driver ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pedro.training.queue.launcher import Claim

if TYPE_CHECKING:
    from pedro.store import JobRecord
    from pedro.training.queue.launcher import ClusterView


def widened(
    job: JobRecord,
    view: ClusterView,
    promised: Sequence[Mapping[str, float]],
    waiting: Sequence[JobRecord],
    most: int | None = None,
) -> JobRecord:
    """The sweep with workers for all trials that fit in addition to promised resources and other waiting jobs; `most`
    is how many more jobs its tenant may run."""
    others = [claim.total for claim in map(Claim.least, waiting) if view.holds(claim)]
    trial, free = Claim.least(job), view.free([*promised, *others])
    rooms = [int((free[name] + 1e-6) // amount) for name, amount in trial.total.items() if amount]
    asked = int(job.spec["sweep"]["at_once"])
    at_once = max(1, min(asked, asked if most is None else most, *rooms))
    resources: dict[str, Any] = {**job.spec["resources"], "workers": trial.workers * at_once}
    return replace(job, spec={**job.spec, "resources": resources})
