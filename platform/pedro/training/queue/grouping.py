"""Which queued jobs start together in one worker: those with `share` and the same key (`sharing.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pedro.store import JobKind
from pedro.training.queue.turns import in_turn
from pedro.training.sharing import MOST_JOBS, MOST_ROWS, group_key, rows_of_pass

if TYPE_CHECKING:
    from pedro.store import JobRecord

GATHER_S = 2.0
"""How long a sharing job waits for others that are queued at the same time."""
SHARED = "shared-"
"""Prefix of the submission id of a shared driver."""


def key_of(job: JobRecord, across_tenants: bool = False) -> str | None:
    """Jobs with the same key may start together; None for a job with its own driver."""
    tenant = None if across_tenants else job.tenant
    return group_key(job.spec, tenant) if job.kind == JobKind.FINE_TUNING else None


def may_be_grouped(job: JobRecord) -> bool:
    """Whether others may start with it: a restarted job trains alone, so that it cannot end theirs again."""
    return job.attempt == 1


def group_of(
    job: JobRecord,
    waiting: Sequence[JobRecord],
    held: Mapping[str, int],
    history: Mapping[str, float],
    may_start: Callable[[JobRecord, Mapping[str, int]], bool],
    across_tenants: bool = False,
) -> list[JobRecord]:
    """The job, and those of `waiting` that start with it, in order; as many as fit into one worker.

    `may_start` says whether a tenant's limit allows the job in addition to these.
    """
    if not may_be_grouped(job):
        return [job]
    group, rows, counts = [job], rows_of_pass(job.spec), Counter(held)
    counts[job.tenant] += 1
    key = key_of(job, across_tenants)
    others = [other for other in waiting if may_be_grouped(other) and key_of(other, across_tenants) == key]
    while len(group) < MOST_JOBS and (other := in_turn(others, counts, history)):
        others.remove(other)
        if rows + rows_of_pass(other.spec) <= MOST_ROWS and may_start(other, counts):
            group.append(other)
            rows += rows_of_pass(other.spec)
            counts[other.tenant] += 1
    return group
