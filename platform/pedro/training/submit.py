"""Submits a job to a Ray cluster, follows it and returns its result: what `pedro submit` and `pedro jobs` call.

Needs only the cluster's dashboard URL, and imports Ray's job client alone.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pedro.backbones.sharing import offer_backbone
from pedro.cluster import is_loopback
from pedro.errors import NotFoundError, PedroError, TrainingError, UnavailableError
from pedro.training.job import JobResult, new_job_id, stage
from pedro.training.job_status import FROM_RAY, ClusterJobs, reconcile_record
from pedro.training.storage import join, write_text
from pedro.training.trainer import ENVIRONMENT

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training.spec import FineTuneSpec

CONTROLLER = "TrainController"
PREFIX = re.compile(r"^(?:\x1b\[\d+m)*\((?P<actor>[\w.]+)(?:\([^)]*\))? pid=\d+[^)]*\)(?:\x1b\[0m)? ?")
COLOUR = re.compile(r"\x1b\[\d+m")
WORKER = "RayTrainWorker"
NOISE = re.compile(
    "|".join(
        [
            r"^\(raylet",
            r"INFO job_manager",
            r"INFO worker\.py",
            r"Running entrypoint for job",
            r"TrainingReport\(",
            r"^\[[^]]*\] .*\.cc:\d+: ",  # Ray's C++ parts, and the stacks that they leave
            r"core_worker\.cc",
            r"^\*\*\* SIG\w+ received",
            r"^(PC: )?\s*@\s+0x[0-9a-f]+",
            r"^\S*ray::\S+$",
            r"FutureWarning",
            r"warnings\.warn",
        ]
    )
)
POLL_S = 1.0
STOP_S = 10.0  # Ray kills a driver that does not end within 3


def submit(
    spec: FineTuneSpec, settings: Settings, dashboard_url: str, store: Store | None = None, job_id: str | None = None
) -> str:
    """Start a job and return its id. Its data, its resolved spec and a kept backbone are in the storage by then.

    `job_id` is given for a job that the store knows already. Raises DataError for unreadable data, UnavailableError
    if the storage or the cluster cannot be reached.
    """
    if job_id is None:
        record = store.create_job(spec.tenant, spec.adapter, spec.to_dict()) if store else None
        job_id = record.id if record else new_job_id()
    try:
        offer_backbone(settings, spec.backbone)
        staged = stage(spec, settings.storage)
        location = join(settings.storage, "jobs", job_id, "spec.json")
        write_text(location, json.dumps(staged.to_dict(), indent=2))
    except PedroError as error:
        if store:
            store.update_job(job_id, status="failed", message=error.message)
        raise
    try:
        module = f"pedro.training.job --spec {shlex.quote(location)} --job-id {job_id}"
        launch(module, job_id, settings, dashboard_url, {"tenant": spec.tenant, "adapter": spec.adapter})
    except PedroError:
        if store:
            store.update_job(job_id, status="failed", message="the cluster did not take the job")
        raise
    if store:
        store.update_job(job_id, submission_id=job_id)
    return job_id


def launch(module: str, job_id: str, settings: Settings, dashboard_url: str, metadata: dict[str, str]) -> None:
    """Have the cluster run `python -m module` (arguments included) as the job `job_id`, with these settings.

    Raises UnavailableError if the cluster does not take it.
    """
    try:
        _client(dashboard_url).submit_job(
            entrypoint=f"{shlex.quote(_python(dashboard_url))} -m {module}",  # a line for a shell
            submission_id=job_id,
            runtime_env={"env_vars": {**settings.env(), **ENVIRONMENT}},
            entrypoint_num_cpus=0,  # the driver waits; the CPUs are for the workers
            metadata=metadata,
        )
    except (RuntimeError, OSError) as error:
        raise UnavailableError(f"the Ray cluster at {dashboard_url} did not take the job: {_line(error)}") from error


def wait(
    job_id: str, dashboard_url: str, log: Callable[[str], None] = lambda _line: None, store: Store | None = None
) -> JobResult:
    """Follow a job to its end, `log` its lines without Ray's prefixes, and return its result.

    Raises TrainingError with the job's own error line if it failed or was stopped.
    """
    state, text = until_end(job_id, dashboard_url, log)
    if state == "SUCCEEDED":
        result = JobResult(**json.loads(text))
        _record(store, job_id, "succeeded", result=result.to_dict())
        return result
    if state == "STOPPED":
        _record(store, job_id, "cancelled", message="stopped")
    else:
        _record(store, job_id, "failed", message=text)
    raise TrainingError(text)


def until_end(
    job_id: str, dashboard_url: str, log: Callable[[str], None] = lambda _line: None
) -> tuple[Literal["SUCCEEDED", "STOPPED", "FAILED"], str]:
    """Follow a job to its end and `log` its lines: how it ended, with its result as JSON or with what went wrong."""
    last, failure = "", ""
    for line in follow(job_id, dashboard_url):
        if line.startswith("{"):
            last = line
        elif line.startswith("error: "):
            failure = line.removeprefix("error: ")
        else:
            log(line)
    state = status(job_id, dashboard_url)
    if state == "SUCCEEDED":
        return "SUCCEEDED", last
    if state == "STOPPED":
        return "STOPPED", f"job {job_id} was stopped"
    return "FAILED", failure or f"job {job_id} failed; `pedro jobs logs {job_id}` shows everything it wrote"


def follow(job_id: str, dashboard_url: str) -> Iterator[str]:
    """The lines of a job for people, as they come, until it ends: progress, errors, the result; no framework noise."""
    status(job_id, dashboard_url)  # raises for an unknown job
    client = _client(dashboard_url)
    seen, rest = 0, ""
    while True:
        ended = client.get_job_status(job_id).is_terminal()
        text = client.get_job_logs(job_id)
        *whole, rest = (rest + text[seen:]).split("\n")
        seen = len(text)
        yield from readable([*whole, rest] if ended else whole)
        if ended:
            return
        time.sleep(POLL_S)


def readable(lines: Iterable[str]) -> Iterator[str]:
    """Lines of a Ray job's log without prefixes and colours, and without those of Ray's own actors."""
    for line in lines:
        match = PREFIX.match(line)
        text = COLOUR.sub("", line[match.end() :] if match else line).rstrip()
        if match and match["actor"] != WORKER and not (match["actor"] == CONTROLLER and text.startswith("worker ")):
            continue
        if text and not NOISE.search(text):
            yield text


def for_people(lines: Iterable[str]) -> Iterator[str]:
    """The same without a driver's result as JSON, which says in one long line what stands above it."""
    return (line for line in lines if not line.startswith('{"'))


def logs(job_id: str, dashboard_url: str) -> str:
    """Everything that a job wrote, Ray's own lines included."""
    status(job_id, dashboard_url)
    return _client(dashboard_url).get_job_logs(job_id)


def status(job_id: str, dashboard_url: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises NotFoundError for an unknown job."""
    try:
        return str(_client(dashboard_url).get_job_status(job_id).value)
    except RuntimeError as error:
        raise NotFoundError(
            f"job '{job_id}' is not known to the Ray cluster at {dashboard_url}", param="job"
        ) from error


def stop(job_id: str, dashboard_url: str, store: Store | None = None) -> str:
    """End a job, whose checkpoints stay, and return how it ended: a `JobStatus`.

    That is not always `cancelled`: it may have ended before, or succeed while it is being stopped. Its driver enters
    how it ended if it lives long enough to.
    """
    status(job_id, dashboard_url)
    client = _client(dashboard_url)
    if client.stop_job(job_id):
        deadline = time.monotonic() + STOP_S
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
        _record(store, job_id, "cancelled", message="stopped")
    ended = status(job_id, dashboard_url)
    try:
        record = store.get_job(job_id) if store else None
    except NotFoundError:  # a sweep, which keeps its own records
        record = None
    if record is None:
        return FROM_RAY[ended]
    return reconcile_record(record, ClusterJobs({job_id: {"status": ended}}, dashboard_url)).status


def jobs(dashboard_url: str) -> list[dict[str, Any]]:
    """The jobs of the platform that the cluster knows, newest first: id, metadata (tenant and adapter, or tenant,
    model and sweep), status, message, started, ended."""
    submitted = sorted(_client(dashboard_url).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    return [
        {
            "id": job.submission_id,
            "metadata": job.metadata,
            "status": str(job.status.value),
            "message": job.message or "",
            "started": (job.start_time or 0) / 1000,
            "ended": job.end_time / 1000 if job.end_time else None,
        }
        for job in submitted
        if job.submission_id and job.metadata
    ]


def _record(store: Store | None, job_id: str, state: str, **fields: Any) -> None:
    if store is None:
        return
    try:
        record = store.get_job(job_id)
    except NotFoundError:  # a sweep, which keeps its own records
        return
    if record.status.final:
        return
    if state == "succeeded" and record.status == "queued":
        store.update_job(job_id, status="running")
    store.update_job(job_id, status=state, **fields)


def _client(dashboard_url: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(dashboard_url)
    except (ConnectionError, RuntimeError) as error:
        raise UnavailableError(
            f"no Ray dashboard answers at {dashboard_url} ({_line(error)}); check RAY_ADDRESS and that the cluster runs"
        ) from error


def _python(dashboard_url: str) -> str:
    """This interpreter on this host; elsewhere whatever the cluster's image calls python."""
    return sys.executable if is_loopback(urlsplit(dashboard_url).hostname or "") else "python"


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
