"""Starts a sweep on a cluster, or resumes one: what `pedro sweep` calls. Needs the cluster's URL alone."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pedro.backbones.sharing import offer_backbone
from pedro.errors import ConflictError, NotFoundError, TrainingError
from pedro.store import Store
from pedro.training import ray_jobs
from pedro.training.job import stage
from pedro.training.job_status import RAY_OPEN
from pedro.training.parent import with_pinned_parent
from pedro.training.sweep.records import Records, SweepRecord, recall, remember
from pedro.training.uploaded_files import with_uploaded_files

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.sweep.spec import SweepSpec


def create(spec: SweepSpec, settings: Settings) -> SweepRecord:
    """Record a new sweep, its data copied to the storage.

    A parent is pinned to one version, and its method taken, as a job's is. Raises DataError for unreadable data,
    ConflictError while its tenant is being erased, NotFoundError and ConfigError for a parent that is none.
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
    remember(settings.storage, asked, record.id)  # as it was given: the parent's name may mean another version later
    return record


def reopen(spec: SweepSpec, settings: Settings, dashboard_url: str) -> SweepRecord:
    """The last sweep of this very spec and data, for another driver.

    Raises NotFoundError if there is none, ConflictError if its driver still runs.
    """
    sweep_id = recall(settings.storage, staged(spec, settings))
    record = Records(settings.storage, sweep_id).record() if sweep_id else None
    if record is None:
        raise NotFoundError(
            f"--resume: no sweep of exactly this spec and data was started in {settings.storage}; give the same file "
            "and the same key=value overrides, or leave --resume out to start anew",
            param="--resume",
        )
    try:
        state = ray_jobs.status(record.submission_id, dashboard_url)
    except NotFoundError:  # the cluster it ran on is gone
        state = "LOST"
    if state in RAY_OPEN:
        raise ConflictError(
            f"--resume: {record.id} still runs; `pedro jobs logs {record.submission_id} --follow` follows it"
        )
    record = replace(record, submissions=record.submissions + 1)
    Records(settings.storage, record.id).write_record(record)
    return record


def start(record: SweepRecord, settings: Settings, dashboard_url: str) -> None:
    """Have the cluster run a driver for a sweep."""
    module = f"pedro.training.sweep.job --sweep {record.id}"
    base = record.spec["base"]
    tried = record.spec["space"].get("backbone") or {}
    for backbone in {base["backbone"], *map(str, tried.get("values") or ())}:
        offer_backbone(settings, backbone)
    # no "adapter" in the metadata, which would make it a fine-tuning job in lists
    metadata = {"tenant": base["tenant"], "sweep": record.id, "model": f"{base['tenant']}.{base['adapter']}"}
    ray_jobs.launch(module, record.submission_id, settings, dashboard_url, metadata)


def wait(record: SweepRecord, dashboard_url: str, log: Callable[[str], None]) -> str:
    """Follow a sweep to its end and return its result as JSON. Raises TrainingError if it failed or was stopped."""
    state, text = ray_jobs.until_end(record.submission_id, dashboard_url, log)
    if state != "SUCCEEDED":
        raise TrainingError(f"{text}; `pedro sweep … --resume` resumes {record.id}")
    return text


def staged(spec: SweepSpec, settings: Settings) -> SweepSpec:
    """The spec with its data where every host finds it."""
    changes: dict[str, Any] = {"base": stage(with_uploaded_files(spec.base, settings), settings.storage)}
    return spec.model_copy(update=changes)
