"""The order of queued jobs: higher priorities first, then the tenant that used the cluster least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.store import JobRecord


def in_turn(waiting: Sequence[JobRecord], held: Mapping[str, int], history: Mapping[str, float]) -> JobRecord | None:
    """The next job to start: of the highest priority; among those, of the tenant with the fewest jobs on the cluster
    (`held`), then with the fewest worker-seconds so far (`history`); of one tenant's, the oldest."""

    def place(job: JobRecord) -> tuple[float, int, float, float, str]:
        tenant = job.tenant
        return -job.priority, held.get(tenant, 0), history.get(tenant, 0.0), job.created, job.id

    return min(waiting, key=place, default=None)
