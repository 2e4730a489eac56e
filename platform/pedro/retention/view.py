"""The home as one run of the collector sees it: the state of jobs, who refers to which data, ages."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

from pedro.retention.finding import Finding
from pedro.retention.policy import GUARD_S, Retention
from pedro.stored_files import GONE, StoredPart, part, parts, remove
from pedro.training.job_status import LOST, RAY_OPEN, ClusterJobs, ReconciledJob, reconcile
from pedro.training.storage import join, read_text
from pedro.training.sweep.records import BY_SPEC, Records, SweepRecord

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Registry
    from pedro.store import Store, StoredFile

DATASET = re.compile(r"datasets/([0-9a-f]{64})")
TRIAL = re.compile(r"^(?P<sweep>.+?)(-trial-\d+.*|-again-\d+)$")


@dataclass
class View:
    """Read when it is first asked for, once."""

    settings: Settings
    registry: Registry
    policy: Retention
    cluster: ClusterJobs
    now: float = field(default_factory=time.time)

    @property
    def store(self) -> Store:
        return self.registry.store

    @cached_property
    def jobs(self) -> dict[str, ReconciledJob]:
        """Every job by id, as it stands."""
        return {job.record.id: job for job in reconcile(self.store, self.cluster)}

    @cached_property
    def sweeps(self) -> dict[str, SweepRecord]:
        """Every sweep by id."""
        storage = self.settings.storage
        ids = [found.name for found in parts(join(storage, "sweeps")) if found.name != BY_SPEC]
        records = {sweep: Records(storage, sweep).record() for sweep in ids}
        return {sweep: record for sweep, record in records.items() if record is not None}

    @cached_property
    def parents(self) -> dict[str, str]:
        """The versions that something which has not ended goes on from, `tenant.adapter:3`, each with what does."""
        open_jobs = [job.record for job in self.jobs.values() if not job.record.status.final]
        found = {str(job.spec["parent"]): f"the job {job.id}" for job in open_jobs if job.spec.get("parent")}
        for sweep, record in self.sweeps.items():
            parent = record.spec["base"].get("parent")
            if parent and self.needs_files(sweep):
                found[str(parent)] = f"the sweep {sweep}"
        return found

    @cached_property
    def runs_with_version(self) -> set[str]:
        """MLflow runs that a version comes from."""
        return {run for _, run in self.store.content_in_use()}

    @cached_property
    def running(self) -> set[str]:
        """Jobs and sweeps that the cluster has not ended, whatever the records say: a driver names its job."""
        found = {ray_id: facts for ray_id, facts in self.cluster.jobs.items() if facts["status"] in RAY_OPEN}
        named = [facts.get("metadata") or {} for facts in found.values()]
        together = (job for told in named for job in told.get("jobs", "").split())
        return {*found, *together, *(told[what] for told in named for what in ("job", "sweep") if what in told)}

    def owner_of(self, folder: str) -> str:
        """The job or sweep whose files lie in `runs/` or `tune/` under this name."""
        match = TRIAL.match(folder)
        return match["sweep"] if match and match["sweep"] in self.sweeps else folder

    def needs_files(self, owner: str) -> str:
        """Why the files of a job or sweep are not to be touched, whatever their age; empty if they may go."""
        if owner in self.running or any(self.owner_of(job) == owner for job in self.running):
            return "it runs"
        job = self.jobs.get(owner)
        if job is not None and not job.record.status.final and job.status != LOST:
            return f"its job is {job.status}"
        if not self.cluster.answered and (job is None or not job.record.status.final):
            return "the cluster does not say whether it runs"
        return ""

    def in_storage(self, location: str) -> str:
        """Where an upload lies: its row may name the place below the storage."""
        return location if location.startswith("/") or "://" in location else join(self.settings.storage, location)

    def place_of(self, file: StoredFile) -> str:
        return self.in_storage(file.location)

    def age(self, modified: float) -> float:
        return self.now - modified

    def by_age(self, kind: str, found: StoredPart, keep_s: float, what: str, stays: str = "") -> Finding:
        """A part of the home or the storage that goes once it is older than `keep_s`; `stays` is why it does not."""
        limit = max(keep_s, GUARD_S)
        if stays:
            return Finding(kind, found.name, found.bytes, stays)
        if self.age(found.modified) <= limit:
            return Finding(kind, found.name, found.bytes, f"{what} within {days(limit)}")
        reason = f"not {what} for {days(limit)}"
        return Finding(kind, found.name, found.bytes, reason, partial(self._remove_old, found.location, limit))

    def _remove_old(self, location: str, limit: float) -> bool:
        """Look once more before it goes: somebody may have come to need it."""
        again = part(location)
        if again is None:
            return True
        if time.time() - again.modified <= limit:
            return False
        remove(location)
        return True

    @cached_property
    def named_data(self) -> dict[str, str]:
        """Digests of data sets that something kept names, each with who does."""
        named: dict[str, str] = {}
        storage = self.settings.storage
        for found in parts(join(storage, "jobs")):
            named |= data_of(read_text(join(found.location, "spec.json")) or "", f"job {found.name}")
        for sweep, record in self.sweeps.items():
            named |= data_of(json.dumps(record.spec), f"sweep {sweep}")
        for _, name, spec in self.store.version_specs():
            named |= data_of(json.dumps(spec), f"version {name}")
        for job in self.jobs.values():
            named |= data_of(json.dumps(job.record.spec), f"job {job.record.id}")
        for file in self.store.stored_files():
            named |= data_of(file.location, f"file {file.id}")
        return named


def data_of(text: str, who: str) -> dict[str, str]:
    """The data sets that a text names, by digest."""
    return {digest: who for digest in DATASET.findall(text)}


def leftover(found: StoredPart) -> bool:
    """Whether it is the rest of a removal that was broken off."""
    return found.name.startswith(GONE)


def days(seconds: float) -> str:
    """`30 days`, `2 hours`."""
    for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= size:
            count = seconds / size
            return f"{count:g} {unit}{'' if count == 1 else 's'}"
    return f"{seconds:g} seconds"
