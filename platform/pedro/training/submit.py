"""Queues jobs, follows them to their end, and stops them, for `pedro submit` and `pedro jobs`.

Everything that a job needs is in the storage before it is queued; its row and its stored log show its progress. Only
the controller contacts the cluster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pedro.backbones.sharing import offer_backbone
from pedro.errors import ConflictError, PedroError, TrainingError, UnavailableError
from pedro.store import JobStatus
from pedro.stored_files import remove
from pedro.training.job import JobResult, new_job_id, stage
from pedro.training.job_log import UPLOAD_S, kept_log
from pedro.training.parent import pin_parent
from pedro.training.queue.process import hand_over
from pedro.training.ray_jobs import readable
from pedro.training.storage import join, write_text
from pedro.training.uploaded_files import with_uploaded_files

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import JobRecord, Store
    from pedro.training.spec import FineTuneSpec

POLL_S = 0.5
STOP_WITHIN_S = 60.0


def submit(spec: FineTuneSpec, settings: Settings, store: Store, *, priority: int = 0) -> str:
    """Queue a job and return its id, once a controller has it.

    Its data, its resolved spec and a kept backbone are then in the storage. Raises DataError for unreadable data,
    NotFoundError or ConfigError for an unusable parent, UnavailableError if the storage is unavailable; then no job is
    queued.
    """
    return submit_all([spec], settings, store, priority=priority)[0]


def submit_all(specs: Sequence[FineTuneSpec], settings: Settings, store: Store, *, priority: int = 0) -> list[str]:
    """`submit` several jobs at once, so that those that share a worker form a group; none is queued if one is
    invalid."""
    ready = [(new_job_id(), pin_parent(spec, store)) for spec in specs]
    for job_id, spec in ready:
        offer_backbone(settings, spec.backbone)
        staged = stage(with_uploaded_files(spec, settings), settings.storage)
        write_text(join(settings.storage, "jobs", job_id, "spec.json"), json.dumps(staged.to_dict(), indent=2))
    queued: list[str] = []
    for job_id, spec in ready:
        try:
            store.create_job(spec.tenant, spec.adapter, spec.to_dict(), job_id, queued=True, priority=priority)
        except PedroError:  # its tenant is being erased, or the database is away
            remove(join(settings.storage, "jobs", job_id))
            for other in queued:
                store.ask_of_job(other, JobStatus.CANCELLED)
            raise
        queued.append(job_id)
    for job_id in queued:
        hand_over(job_id, settings, store)
    return queued


def wait(job_id: str, settings: Settings, store: Store, log: Callable[[str], None] = lambda _line: None) -> JobResult:
    """Follow a fine-tuning job to its end, as `until_end` does, and return its result."""
    return JobResult(**(until_end(job_id, settings, store, log).result or {}))


def until_end(
    job_id: str, settings: Settings, store: Store, log: Callable[[str], None] = lambda _line: None
) -> JobRecord:
    """Follow a job or a sweep until it has succeeded, and `log` its lines without Ray's prefixes.

    Raises TrainingError with the job's error line if it failed, was stopped or paused.
    """
    for line in follow(job_id, settings, store):
        if not line.startswith(('{"', "error: ")):
            log(line)
    job = store.get_job(job_id)
    if job.status == JobStatus.SUCCEEDED:
        return job
    if job.status == JobStatus.PAUSED:
        raise TrainingError(f"job {job_id} was paused; `pedro jobs resume {job_id}` continues it")
    if job.status == JobStatus.CANCELLED:
        raise TrainingError(f"job {job_id} was stopped")
    raise TrainingError(job.message or f"job {job_id} failed; `pedro jobs logs {job_id} --raw` shows what it wrote")


def follow(job_id: str, settings: Settings, store: Store) -> Iterator[str]:
    """The user-facing lines of a job until it ends or is paused: why it waits, then its output."""
    seen, rest, waits = 0, "", ""
    while True:
        job = store.get_job(job_id)
        rests = _rests(job)
        if rests and "://" in settings.storage:
            time.sleep(UPLOAD_S / 2)  # the end of its log is being uploaded
        if job.status == JobStatus.QUEUED and job.message and job.message != waits:
            waits = job.message
            yield waits
        text = kept_log(settings.storage, job_id) or ""
        *whole, rest = (rest + text[seen:]).split("\n")
        seen = len(text)
        yield from readable([*whole, rest] if rests else whole)
        if rests:
            return
        time.sleep(POLL_S if "://" not in settings.storage else UPLOAD_S / 2)


def stop(job_id: str, settings: Settings, store: Store, wanted: JobStatus = JobStatus.CANCELLED) -> JobRecord:
    """Stop or pause a job, keeping its checkpoints, and return its new state.

    This is not always `wanted`: it may succeed while being stopped. Raises NotFoundError, ConflictError for a job that
    has ended, UnavailableError if it does not end in time.
    """
    if store.get_job(job_id).attempt == 0:
        raise ConflictError(
            f"job {job_id} was started by an earlier release without the queue; `pedro down` ends it", param="job"
        )
    job = store.ask_of_job(job_id, wanted)
    if _rests(job):
        return job
    hand_over(job_id, settings, store)
    deadline = time.monotonic() + STOP_WITHIN_S
    while not _rests(job := store.get_job(job_id)):
        if time.monotonic() > deadline:
            raise UnavailableError(f"job {job_id} has not ended yet; `pedro jobs list` shows when it has")
        time.sleep(0.1)
    return job


def resume(job_id: str, settings: Settings, store: Store, *, after_failure: bool = False) -> JobRecord:
    """Resume a paused job from its last checkpoint, or (`after_failure`) one that failed or was stopped."""
    sources = [JobStatus.FAILED, JobStatus.CANCELLED] if after_failure else [JobStatus.PAUSED]
    job = store.let_job_continue(job_id, sources)
    hand_over(job_id, settings, store)
    return job


def _rests(job: JobRecord) -> bool:
    return job.status.final or job.status == JobStatus.PAUSED
