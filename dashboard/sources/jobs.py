"""Jobs, from the platform's records and from Ray: running and finished ones, logs, curves, cancellation.

What does not answer is returned as a message; only `cancel` changes anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pedro.errors import NotFoundError, PedroError
from pedro.refs import ModelRef
from pedro.registry import Registry, queries
from pedro.store import JobKind, JobRecord, JobStatus, Store
from pedro.training import ray_jobs, submit
from pedro.training.job_log import kept_log
from pedro.training.job_status import FROM_RAY, LOST, ClusterJobs, ReconciledJob, reconcile, reconcile_record
from pedro.training.progress import Phase, Progress, read_progress
from sources.services import find_ray
from sources.stores import ask_registry, ask_store
from sources.view import may_act, tenant_seen, without_places

if TYPE_CHECKING:
    from pedro.config import Settings

OPEN = (JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.VALIDATING, JobStatus.PAUSED)
CURVES = {"train/loss": "Training loss", "dev/loss": "Validation loss"}
PLOTS: dict[str, dict[str, str]] = {  # what can be drawn of a run: metrics, and what they are called
    "Loss": {**CURVES, "train/theta_loss": "Θ loss"},
    "Learning rate": {"train/lr": "Learning rate"},
    "Tokens/s": {"train/tokens_per_second": "Tokens/s", "train/answer_tokens_per_second": "Tokens/s of answers"},
    "Memory": {
        "system/memory_mb": "Resident memory (MiB)",
        "system/peak_memory_mb": "Peak of it (MiB)",
        "system/gpu_memory_mb": "Peak of GPU memory (MiB)",
    },
    "CPU": {"system/cpu_percent": "CPU (%, 100 is one core)"},
}
LOG_LINES = 300
ENDED = tuple(str(status) for status in JobStatus if status.final)
STATES = (*map(str, JobStatus), LOST)
MOST_LIVE = 100
MOST_OPEN = 1000  # of a status, whose state is asked for; more count by their record alone
MOST_RUNS = 12  # of a sweep, drawn together

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Job:
    """One job. `status` is the cluster's word while it is not over, else that of the records."""

    id: str
    kind: str
    tenant: str
    adapter: str
    status: str
    created: float
    ended: float | None = None
    message: str = ""
    sweep: str = ""
    record: JobRecord | None = None

    @property
    def model(self) -> str:
        """`tenant.adapter`."""
        return ModelRef(self.tenant, self.adapter).name

    @property
    def live(self) -> bool:
        """Whether it waits or runs, so that it can be ended."""
        return self.status in OPEN


NO_CLUSTER = ClusterJobs({})


@dataclass(frozen=True)
class Jobs:
    """Some jobs, newest first; how many there are in all, by status; what could not be asked."""

    jobs: tuple[Job, ...] = ()
    counts: dict[str, int] | None = None
    cluster: ClusterJobs = NO_CLUSTER
    problem: str = ""


def live_jobs(settings: Settings) -> Jobs:
    """What is under way: open jobs of the records, and what else runs on the cluster (sweeps of earlier releases)."""
    cluster, tenant = ask_cluster(settings), tenant_seen(settings)

    def read(store: Store) -> list[ReconciledJob]:
        return [job for status in OPEN for job in reconcile(store, cluster, tenant, status=status, limit=MOST_LIVE)]

    stored, problem = ask_store(settings, read, [])
    known = {job.record.id for job in stored}
    alone = (job for job in cluster.jobs.values() if "jobs" not in job["metadata"])  # each of those has its record
    unrecorded = (job for job in alone if job["metadata"].get("job", job["id"]) not in known)
    others = (_of_cluster(settings, job) for job in unrecorded)
    shown = (job for job in others if job.live and tenant in (None, job.tenant))
    jobs = [*(_of_store(settings, job) for job in stored), *shown]
    return Jobs(tuple(sorted(jobs, key=lambda job: -job.created)), None, cluster, problem)


def past_jobs(
    settings: Settings,
    status: str | None = None,
    limit: int = 25,
    offset: int = 0,
    tenant: str | None = None,
    adapter: str | None = None,
) -> Jobs:
    """A page of the jobs that are in a status now, or of all, and how many there are in each.

    Rows, filter and counts go by the same state: the reconciled one, which of jobs that have ended is the record's.
    """
    own = tenant_seen(settings)
    if own is not None and tenant not in (None, own):
        return Jobs()
    tenant = own or tenant
    cluster = ask_cluster(settings)

    def read(store: Store) -> tuple[list[ReconciledJob], dict[str, int]]:
        def jobs(state: str | None, limit: int, offset: int = 0) -> list[ReconciledJob]:
            return reconcile(store, cluster, tenant, adapter=adapter, status=state, limit=limit, offset=offset)

        counts = Counter[str]()
        for (_, state), count in store.count_jobs(tenant, adapter=adapter).items():
            counts[str(state)] += count
        opened = [job for state in OPEN if counts[state] for job in jobs(state, MOST_OPEN)]
        counts.subtract(str(job.record.status) for job in opened)
        counts.update(str(job.status) for job in opened)
        known = {state: count for state, count in counts.items() if count > 0}
        found = [job for job in opened if job.status == status]
        if status is None or (status in ENDED and not found):
            return jobs(status, limit, offset), known
        if status in ENDED:  # open by their record, and ended all the same: they stand among the others
            found += jobs(status, offset + limit)
        found.sort(key=lambda job: (job.record.created, job.record.id), reverse=True)
        return found[offset : offset + limit], known

    page, problem = ask_store(settings, read, ([], {}))
    return Jobs(tuple(_of_store(settings, job) for job in page[0]), page[1], cluster, problem)


def trained_adapters(settings: Settings) -> list[tuple[str, str]]:
    """Tenant and adapter of every recorded job, each pair once."""
    own = tenant_seen(settings)
    return [pair for pair in ask_store(settings, Store.list_trained, [])[0] if own in (None, pair[0])]


def ask_cluster(settings: Settings) -> ClusterJobs:
    """The cluster's own list of jobs."""
    ray = find_ray(settings)
    if not ray.url:
        return ClusterJobs({}, gone=settings.ray_address is None and settings.launcher == "ray", problem=ray.problem)
    listed, problem = _ask(partial(ray_jobs.jobs, ray.url))
    return ClusterJobs({job["id"]: job for job in listed or ()}, ray.url, problem=problem)


def log_tail(settings: Settings, job_id: str, lines: int = LOG_LINES) -> tuple[list[str], str]:
    """The last lines of a job's log for people, or why there are none."""
    text, problem = _ask(partial(kept_log, settings.storage, job_id))
    if text is None and not problem:
        ray = find_ray(settings)
        if not ray.url:
            return [], f"{ray.problem}; no log of this job was kept"
        text, problem = _ask(partial(ray_jobs.logs, job_id, ray.url))
    return list(ray_jobs.for_people(ray_jobs.readable((text or "").splitlines())))[-lines:], problem


def told(settings: Settings, job: Job) -> list[str]:
    """What a job told its tenant, as the API has it: the last lines, in order."""
    read = partial(Store.list_job_events, job_id=job.id, limit=LOG_LINES)
    return [without_places(settings, event.message) for event in reversed(ask_store(settings, read, [])[0])]


def progress_of(job: Job, lines: Sequence[str]) -> Progress:
    """Where a job stands that has not ended; a running one by the lines of its log."""
    if job.status == JobStatus.VALIDATING:
        return Progress(Phase.VALIDATING)
    return read_progress(lines) if job.status == JobStatus.RUNNING else Progress(Phase.QUEUED)


def one_job(settings: Settings, job_id: str) -> Job | None:
    """A recorded job as it stands; None where there is no such."""
    cluster = ask_cluster(settings)

    def read(store: Store) -> Job | None:
        try:
            return _of_store(settings, reconcile_record(store.get_job(job_id, tenant_seen(settings)), cluster))
        except NotFoundError:
            return None

    return ask_store(settings, read, None)[0]


def jobs_of_versions(settings: Settings, tenant: str, adapter: str) -> dict[str, str]:
    """The versions of an adapter that its last jobs made, newest first, and the ids of those jobs."""
    if tenant_seen(settings) not in (None, tenant):
        return {}
    read = partial(Store.list_jobs, tenant=tenant, adapter=adapter, status=JobStatus.SUCCEEDED, limit=MOST_LIVE)
    jobs: list[JobRecord] = ask_store(settings, read, [])[0]
    return {str(job.result["model"]): job.id for job in jobs if job.result and job.result.get("model")}


def cancel(settings: Settings, job_id: str) -> str:
    """End a job or a sweep; why it could not be ended, or nothing."""

    if not may_act(settings):
        return "This key may not end jobs; it takes one with the scope train."

    def stop(store: Store) -> str:
        try:
            store.get_job(job_id, tenant_seen(settings))
        except NotFoundError:  # a sweep of an earlier release
            if job_id not in {job.id for job in live_jobs(settings).jobs}:
                return "There is no such job."
            return _end_on_cluster(settings, job_id)
        return _ask(partial(submit.stop, job_id, settings, store))[1]

    problem, unread = ask_store(settings, stop, None)
    problem = _end_on_cluster(settings, job_id) if problem is None and not unread else problem  # None: no records
    return str(without_places(settings, unread or problem or ""))


def _end_on_cluster(settings: Settings, job_id: str) -> str:
    ray = find_ray(settings)
    return _ask(partial(ray_jobs.stop, job_id, ray.url))[1] if ray.url else ray.problem


def job_runs(settings: Settings, job: Job) -> tuple[tuple[queries.TrackedRun, ...], str]:
    """The runs in MLflow that a job writes to: its own, or the trials of a sweep, the last ones first."""

    def read(registry: Registry) -> tuple[queries.TrackedRun, ...]:
        if job.sweep:
            page = queries.search_runs(registry, [job.model], tags={"sweep": job.sweep}, limit=MOST_RUNS + 1)
            return tuple(run for run in page.runs if "trial" in run.tags)[:MOST_RUNS]
        run = queries.find_run_of_job(registry, job.model, job.id)
        return (run,) if run else ()

    return ask_registry(settings, read, ())


def curve_names(drawn: Sequence[queries.TrackedRun]) -> dict[str, str]:
    """The ids of runs, and what their curves are called."""
    return {run.id: f"trial {run.tags['trial']}" if "trial" in run.tags else run.name for run in drawn}


def curve_rows(settings: Settings, names: Mapping[str, str], plot: str = "Loss") -> list[dict[str, Any]]:
    """One row a point of the curves that belong to a plot, of runs by their ids and names."""
    metrics = PLOTS[plot]
    read = partial(queries.metric_histories, run_ids=list(names), metrics=list(metrics))
    points, _ = ask_registry(settings, read, [])
    return [
        {"run": names[run], "curve": metrics[metric], "step": step, "value": value}
        for run, metric, step, value in points
    ]


def job_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The table of jobs."""
    return [
        {
            "status": job.status,
            "model": job.model,
            "kind": job.kind,
            "created": int(job.created * 1000),
            "minutes": (job.ended - job.created) / 60 if job.ended else None,
            "version": result_of(job).get("model", ""),
            "accuracy": (result_of(job).get("metrics") or {}).get("accuracy"),
            "message": job.message or result_of(job).get("gate", ""),
            "job": job.id,
        }
        for job in jobs
    ]


def result_of(job: Job) -> dict[str, Any]:
    """What the job said at its end."""
    return (job.record.result if job.record else None) or {}


def _of_store(settings: Settings, job: ReconciledJob) -> Job:
    record = replace(job.record, spec=without_places(settings, job.record.spec))
    return Job(
        id=record.id,
        kind=record.kind,
        tenant=record.tenant,
        adapter=record.adapter,
        status=str(job.status),
        created=record.created,
        ended=record.finished,
        message=without_places(settings, job.message),
        sweep=record.id if record.kind == JobKind.SWEEP else "",
        record=record,
    )


def _of_cluster(settings: Settings, ray_job: Mapping[str, Any]) -> Job:
    metadata = ray_job["metadata"]
    tenant, _, adapter = str(metadata.get("model", "")).partition(".")
    return Job(
        id=ray_job["id"],
        kind=JobKind.SWEEP if "sweep" in metadata else JobKind.FINE_TUNING,
        tenant=metadata.get("tenant", tenant),
        adapter=metadata.get("adapter", adapter),
        status=str(FROM_RAY.get(ray_job["status"], ray_job["status"].lower())),
        created=ray_job["started"],
        ended=ray_job["ended"],
        message=without_places(settings, ray_job["message"] if ray_job["status"] == "FAILED" else ""),
        sweep=metadata.get("sweep", ""),
    )


def _ask(question: Callable[[], Asked]) -> tuple[Asked | None, str]:
    try:
        return question(), ""
    except (PedroError, OSError, RuntimeError) as error:
        return None, error.message if isinstance(error, PedroError) else str(error).strip().partition("\n")[0]
