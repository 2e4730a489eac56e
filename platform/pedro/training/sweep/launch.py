"""Starts a sweep on a cluster, or resumes one: what `pedro sweep` calls. Needs the cluster's URL alone."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pedro.config import Settings
from pedro.errors import ConflictError, NotFoundError, TrainingError
from pedro.training import submit
from pedro.training.job import stage
from pedro.training.sweep.records import Records, SweepRecord, recall, remember
from pedro.training.sweep.spec import SweepSpec

RUNNING = ("PENDING", "RUNNING")


def create(spec: SweepSpec, settings: Settings) -> SweepRecord:
    """Record a new sweep, its data copied to the storage. Raises DataError for unreadable data."""
    spec = staged(spec, settings)
    entry = SweepRecord(f"sweep-{uuid.uuid4().hex[:12]}", spec.to_dict())
    Records(settings.storage, entry.id).write_entry(entry)
    remember(settings.storage, spec, entry.id)
    return entry


def reopen(spec: SweepSpec, settings: Settings, dashboard_url: str) -> SweepRecord:
    """The last sweep of this very spec and data, for another driver.

    Raises NotFoundError if there is none, ConflictError if its driver still runs.
    """
    found = recall(settings.storage, staged(spec, settings))
    entry = Records(settings.storage, found).entry() if found else None
    if entry is None:
        raise NotFoundError(
            f"--resume: no sweep of exactly this spec and data was started in {settings.storage}; give the same file "
            "and the same key=value overrides, or leave --resume out to start anew",
            param="--resume",
        )
    try:
        state = submit.status(entry.submission_id, dashboard_url)
    except NotFoundError:  # the cluster it ran on is gone
        state = "LOST"
    if state in RUNNING:
        raise ConflictError(
            f"--resume: {entry.id} still runs; `pedro jobs logs {entry.submission_id} --follow` follows it"
        )
    entry = replace(entry, submissions=entry.submissions + 1)
    Records(settings.storage, entry.id).write_entry(entry)
    return entry


def start(entry: SweepRecord, settings: Settings, dashboard_url: str) -> None:
    """Have the cluster run a driver for a sweep."""
    module = f"pedro.training.sweep.job --sweep {entry.id}"
    base = entry.spec["base"]
    # no "adapter" in the metadata, which would make it a fine-tuning job in lists
    metadata = {"tenant": base["tenant"], "sweep": entry.id, "model": f"{base['tenant']}.{base['adapter']}"}
    submit.launch(module, entry.submission_id, settings, dashboard_url, metadata)


def wait(entry: SweepRecord, dashboard_url: str, log: Callable[[str], None]) -> str:
    """Follow a sweep to its end and return its result as JSON. Raises TrainingError if it failed or was stopped."""
    state, text = submit.until_end(entry.submission_id, dashboard_url, log)
    if state != "SUCCEEDED":
        raise TrainingError(f"{text}; `pedro sweep … --resume` resumes {entry.id}")
    return text


def staged(spec: SweepSpec, settings: Settings) -> SweepSpec:
    """The spec with its data where every host finds it."""
    changes: dict[str, Any] = {"base": stage(spec.base, settings.storage)}
    return spec.model_copy(update=changes)
