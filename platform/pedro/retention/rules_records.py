"""Which records may go: rows and logs of ended jobs, old versions, runs without a version, batches, keys, usage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from pedro.errors import ConflictError, NotFoundError
from pedro.registry.purge import KeptRun, adapter_bytes, kept_runs, purge_adapter, purge_run, run_bytes
from pedro.retention.finding import Finding
from pedro.retention.policy import GUARD_S
from pedro.retention.view import days, leftover
from pedro.stored_files import part, parts, remove
from pedro.training.storage import join

if TYPE_CHECKING:
    from pedro.retention.view import View
    from pedro.store import OldVersion

CHAMPION_S = 90 * 24 * 3600.0
"""Who was champion within this time may be what somebody wants back."""


def jobs(view: View) -> Iterator[Finding]:
    """Rows of jobs that ended long ago, with their specs and logs."""
    limit = max(view.policy.records_s, GUARD_S)
    for job_id, job in list(view.jobs.items()):
        record = job.record
        ended = record.finished
        if not record.status.final or ended is None:
            yield Finding("jobs", job_id, 0, f"it is {job.status}")
        elif view.age(ended) <= limit:
            yield Finding("jobs", job_id, 0, f"it ended within {days(limit)}")
        else:
            reason = f"it ended more than {days(limit)} ago"
            yield Finding("jobs", job_id, _job_bytes(view, job_id), reason, partial(_forget_job, view, job_id, limit))


def job_logs(view: View) -> Iterator[Finding]:
    """Specs and logs of jobs that have no row."""
    for found in parts(join(view.settings.storage, "jobs")):
        if not leftover(found) and found.name not in view.jobs:
            stays = view.needs_files(view.owner_of(found.name))
            yield view.by_age("job logs", found, view.policy.records_s, "written to", stays)


def versions(view: View) -> Iterator[Finding]:
    """Checkpoints whose job's row is gone; and versions beyond the newest so many of each adapter, where a number was
    set, in which checkpoints do not count."""
    keep = view.policy.versions
    for _, group in groupby(view.store.version_ages(), key=lambda one: one.ref):
        place = -1
        for version in group:
            place += not version.checkpoint_of
            name = str(version.ref.at(version.version))
            stays = _why_kept(view, version, place, keep)
            if stays:
                yield Finding("versions", name, version.bytes, stays)
            else:
                reason = f"not among the newest {keep}, behind no alias"
                if version.checkpoint_of:
                    reason = "a checkpoint of a job whose row is gone, behind no alias"
                yield Finding("versions", name, version.bytes, reason, partial(_retire, view, version))


def _why_kept(view: View, version: OldVersion, place: int, keep: int | None) -> str:
    if version.named_by:
        return f"it is {' and '.join(version.named_by)}"
    if who := view.parents.get(str(version.ref.at(version.version))):
        return f"{who} goes on from it"
    if version.checkpoint_of:
        if version.checkpoint_of in view.jobs:
            return f"a checkpoint of {version.checkpoint_of}, whose row is kept"
        return _recently(view, version)
    if keep is None:
        return "all versions are kept (PEDRO_KEEP_VERSIONS)"
    if place < keep:
        return f"among the newest {keep}"
    return _recently(view, version)


def _recently(view: View, version: OldVersion) -> str:
    if version.promoted is not None and view.age(version.promoted) <= CHAMPION_S:
        return f"it was champion within {days(CHAMPION_S)}"
    if view.age(version.created) <= GUARD_S:
        return f"it was registered within {days(GUARD_S)}"
    return ""


def runs(view: View) -> Iterator[Finding]:
    """MLflow runs that no version comes from: their files after a while, what they measured much later."""
    records, artifacts = max(view.policy.records_s, GUARD_S), max(view.policy.artifacts_s, GUARD_S)
    for run in kept_runs(view.registry):
        name, age = f"{run.experiment} {run.id}", view.age(run.ended)
        stays = _why_run_stays(view, run)
        if stays or age <= min(records, artifacts):
            yield Finding("runs", name, 0, stays or f"it ended within {days(min(records, artifacts))}")
        elif age > records:
            reason = f"no version comes from it, and it ended more than {days(records)} ago"
            yield Finding("runs", name, run_bytes(run), reason, partial(_purge, view, run, True))
        elif size := adapter_bytes(view.registry, run):
            reason = f"no version comes from it, and it ended more than {days(artifacts)} ago; its figures stay"
            yield Finding("adapters", name, size, reason, partial(_purge, view, run, False))


def _why_run_stays(view: View, run: KeptRun) -> str:
    if run.id in view.runs_with_version:
        return "a version comes from it"
    sweep = view.owner_of(run.job)
    if sweep in view.sweeps and view.needs_files(sweep):
        return "its sweep runs"
    return view.needs_files(run.job) if run.job else ""


def batches(view: View) -> Iterator[Finding]:
    """Batches that ended long ago; their files are uploads, with times of their own."""
    limit = max(view.policy.records_s, GUARD_S)
    if count := view.store.count_ended_batches(view.now - limit):
        reason = f"ended more than {days(limit)} ago"
        forget = partial(view.store.forget_ended_batches, view.now - limit)
        yield Finding("batches", f"{count} batches", 0, reason, lambda: forget() > 0)


def webhook_deliveries(view: View) -> Iterator[Finding]:
    """Events that webhook endpoints took long ago, or never did."""
    limit = max(view.policy.webhooks_s, GUARD_S)
    if count := view.store.count_ended_deliveries(view.now - limit):
        reason = f"sent, or given up, more than {days(limit)} ago"
        forget = partial(view.store.forget_ended_deliveries, view.now - limit)
        yield Finding("webhook events", f"{count} events", 0, reason, lambda: forget() > 0)


def keys_and_usage(view: View) -> Iterator[Finding]:
    """Keys that ended long ago, and usage of days that nobody bills any more."""
    revoked, day = view.now - max(view.policy.records_s, GUARD_S), view.now - view.policy.usage_s
    old = view.store.count_old(revoked, day)
    if old["keys"]:
        reason = f"revoked or expired more than {days(view.policy.records_s)} ago"
        yield Finding("keys", f"{old['keys']} keys", 0, reason, lambda: view.store.forget_keys(revoked) > 0)
    if old["usage"]:
        reason = f"of more than {days(view.policy.usage_s)} ago"
        yield Finding("usage", f"{old['usage']} rows", 0, reason, lambda: view.store.forget_usage(day) > 0)


def _job_bytes(view: View, job_id: str) -> int:
    found = part(join(view.settings.storage, "jobs", job_id))
    return 0 if found is None else found.bytes


def _forget_job(view: View, job_id: str, limit: float) -> bool:
    if not view.store.forget_job(job_id, time.time() - limit):
        return False
    view.jobs.pop(job_id)  # what it names is named by nobody now
    remove(join(view.settings.storage, "jobs", job_id))
    return True


def _retire(view: View, version: OldVersion) -> bool:
    """The store decides: who became champion meanwhile stays. Files go with the runs that no version comes from."""
    try:
        view.registry.retire(version.ref.name, version.version, view.now - CHAMPION_S)
    except (ConflictError, NotFoundError):
        return False
    view.runs_with_version.discard(version.run_id)
    return True


def _purge(view: View, run: KeptRun, whole: bool) -> bool:
    if run.id in {run_id for _, run_id in view.store.content_in_use()}:  # registered meanwhile
        return False
    if whole:
        purge_run(view.registry, run)
    else:
        purge_adapter(view.registry, run)
    return True
