"""How many trials of a sweep run at once: as many as there is room for when its driver is started, and at least one.

The section `sweep` of a sweep's spec in the store has `workers`, those of one trial, and `at_once`, the most trials;
`resources.workers` beside it is what all of them hold together, until the driver ends.
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
    """The sweep with workers for all trials that fit beside what is promised and what other jobs wait for; `most`, the
    jobs that its tenant may still run at once."""
    others = [claim.total for claim in map(Claim.least, waiting) if view.holds(claim)]
    trial, free = Claim.least(job), view.free([*promised, *others])
    rooms = [int((free[name] + 1e-6) // amount) for name, amount in trial.total.items() if amount]
    asked = int(job.spec["sweep"]["at_once"])
    at_once = max(1, min(asked, asked if most is None else most, *rooms))
    resources: dict[str, Any] = {**job.spec["resources"], "workers": trial.workers * at_once}
    return replace(job, spec={**job.spec, "resources": resources})
