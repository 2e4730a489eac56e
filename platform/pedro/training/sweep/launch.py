"""Queues a sweep, or resumes the last one of its spec, for `pedro sweep`. Needs no cluster."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from pedro.backbones.sharing import offer_backbone
from pedro.errors import ConflictError, NotFoundError, PedroError
from pedro.store import JobStatus, Store
from pedro.stored_files import remove
from pedro.training.job import stage
from pedro.training.parent import with_pinned_parent
from pedro.training.queue.process import hand_over
from pedro.training.sweep.records import Records, SweepRecord, recall, remember
from pedro.training.sweep.report import rows_of
from pedro.training.sweep.variants import planned_count, probes, variant
from pedro.training.uploaded_files import with_uploaded_files

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import JobRecord
    from pedro.training.sweep.spec import SweepSpec

RESTS = (JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
AT_ONCE_IN_PODS = 4
"""Concurrent trials if each has its own pods, and the free room is unknown."""


def submit(spec: SweepSpec, settings: Settings, store: Store, *, priority: int = 0) -> str:
    """Queue a new sweep and return its id, once a controller has it. Raises as `create` does; then none is queued."""
    record = create(spec, settings)
    try:
        _enter(record, settings, store, priority)
    except PedroError:  # its tenant is being erased, its parent was deleted, or the database is away
        remove(Records(settings.storage, record.id).location)
        raise
    hand_over(record.id, settings, store)
    return record.id


def resume(spec: SweepSpec, settings: Settings, store: Store, *, priority: int = 0) -> str:
    """Queue the last sweep of exactly this spec and data again; its finished trials are not repeated.

    Raises NotFoundError if there is none, ConflictError if it has not ended.
    """
    sweep_id = recall(settings.storage, staged(spec, settings))
    record = Records(settings.storage, sweep_id).record() if sweep_id else None
    if record is None:
        raise NotFoundError(
            f"--resume: no sweep of exactly this spec and data was started in {settings.storage}; pass the same file "
            "and the same key=value overrides, or omit --resume to start a new one",
            param="--resume",
        )
    try:
        job = store.get_job(record.id)
    except NotFoundError:  # of an earlier release, without the queue
        _enter(record, settings, store, priority)
    else:
        if job.status not in RESTS:
            message = f"--resume: {record.id} is {job.status}; `pedro jobs logs {record.id} --follow` follows it"
            raise ConflictError(message, param="--resume")
        store.let_job_continue(record.id, RESTS)
    hand_over(record.id, settings, store)
    return record.id


def create(spec: SweepSpec, settings: Settings) -> SweepRecord:
    """Record a new sweep, its data copied to the storage.

    A parent is pinned to one version, and its method used, as for a job. Raises DataError for unreadable data,
    ConflictError while its tenant is being erased, NotFoundError or ConfigError for an unusable parent.
    """
    store = Store(settings.database_url)
    store.check_not_erased(spec.base.tenant)
    store.close()
    base = with_pinned_parent(spec.base, settings)
    asked = staged(spec, settings)
    pinned = asked
    if base.parent is not None:
        start = {"parent": base.parent, "method": base.method}
        pinned = asked.model_copy(update={"base": asked.base.model_copy(update=start)})
    record = SweepRecord(f"sweep-{uuid.uuid4().hex[:12]}", pinned.to_dict())
    Records(settings.storage, record.id).write_record(record)
    remember(settings.storage, asked, record.id)  # before resolving: the parent's name may mean another version later
    return record


def result_of(job: JobRecord, settings: Settings) -> dict[str, Any]:
    """The result of a sweep, with all its trials (`SweepResult`)."""
    return {**(job.result or {}), "trials": rows_of(Records(settings.storage, job.id).trials())}


def staged(spec: SweepSpec, settings: Settings) -> SweepSpec:
    """The spec with its data copied to the storage."""
    changes: dict[str, Any] = {"base": stage(with_uploaded_files(spec.base, settings), settings.storage)}
    return spec.model_copy(update=changes)


def job_spec(spec: SweepSpec, settings: Settings) -> dict[str, Any]:
    """A sweep's spec for the queue: its trials' spec, with the largest one's resources (`queue/sweeps.py`)."""
    base = spec.to_dict()["base"]
    if any(key.partition(".")[0] == "resources" for key in spec.space):
        tried = [variant(spec, parameters).resources.model_dump() for _, parameters in probes(spec)]
        base["resources"] = {name: max(each[name] for each in tried) for name in tried[0]}
    trials = planned_count(spec)
    most = spec.concurrency or (AT_ONCE_IN_PODS if settings.launcher == "kuberay" else trials)
    section = {"name": spec.name, "workers": base["resources"]["workers"], "at_once": min(most, trials)}
    return {**base, "sweep": section}


def _enter(record: SweepRecord, settings: Settings, store: Store, priority: int) -> None:
    """The sweep's row, after storing the backbones that it needs."""
    spec = Records(settings.storage, record.id).spec()
    tried = spec.space.get("backbone")
    for backbone in {spec.base.backbone, *map(str, tried.values if tried else ())}:
        offer_backbone(settings, backbone)
    fields = job_spec(spec, settings)
    store.create_job(spec.base.tenant, spec.base.adapter, fields, record.id, queued=True, priority=priority)
