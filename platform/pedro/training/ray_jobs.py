"""Drivers as Ray jobs: starts them, lists them, follows their output, and ends them.

Needs only the cluster's dashboard URL, and imports only Ray's job client.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pedro.cluster import is_loopback
from pedro.errors import NotFoundError, UnavailableError
from pedro.training.job_status import FROM_RAY
from pedro.training.trainer import ENVIRONMENT

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from pedro.config import Settings

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
            r"^\[[^]]*\] .*\.cc:\d+: ",  # Ray's C++ code, and its stack traces
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
STOP_S = 10.0  # Ray kills a driver that does not exit within 3


def launch(module: str, job_id: str, settings: Settings, dashboard_url: str, metadata: dict[str, str]) -> None:
    """Run `python -m module` (arguments included) on the cluster as the Ray job `job_id`, with these settings.

    Raises UnavailableError if the cluster does not accept it.
    """
    try:
        _client(dashboard_url).submit_job(
            entrypoint=f"{shlex.quote(_python(dashboard_url))} -m {module}",  # run by a shell
            submission_id=job_id,
            runtime_env={"env_vars": {**settings.env(), **ENVIRONMENT}},
            entrypoint_num_cpus=0,  # the driver is idle; the CPUs are for the workers
            metadata=metadata,
        )
    except (RuntimeError, OSError) as error:
        raise UnavailableError(f"the Ray cluster at {dashboard_url} did not accept the job: {_line(error)}") from error


def follow(job_id: str, dashboard_url: str) -> Iterator[str]:
    """The user-facing lines of a job, as they appear, until it ends: progress, errors, the result; no framework
    output."""
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
    """Lines of a Ray job's log without prefixes and colours, and without lines of Ray's own actors."""
    for line in lines:
        match = PREFIX.match(line)
        text = COLOUR.sub("", line[match.end() :] if match else line).rstrip()
        if match and match["actor"] != WORKER and not (match["actor"] == CONTROLLER and text.startswith("worker ")):
            continue
        if text and not NOISE.search(text):
            yield text


def for_people(lines: Iterable[str]) -> Iterator[str]:
    """The same without a driver's result as JSON, a long line that repeats the lines above."""
    return (line for line in lines if not line.startswith('{"'))


def logs(job_id: str, dashboard_url: str) -> str:
    """Everything that a job wrote, including Ray's own lines."""
    status(job_id, dashboard_url)
    return _client(dashboard_url).get_job_logs(job_id)


def status(job_id: str, dashboard_url: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises NotFoundError for an unknown job."""
    try:
        return str(_client(dashboard_url).get_job_status(job_id).value)
    except RuntimeError as error:
        raise NotFoundError(f"the Ray cluster at {dashboard_url} has no job '{job_id}'", param="job") from error


def stop(job_id: str, dashboard_url: str) -> str:
    """End a Ray job and return how it ended: a `JobStatus`, not always `cancelled`. No effect if it has ended."""
    status(job_id, dashboard_url)
    client = _client(dashboard_url)
    if client.stop_job(job_id):
        deadline = time.monotonic() + STOP_S
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
    return FROM_RAY[status(job_id, dashboard_url)]


def ask_to_end(job_id: str, dashboard_url: str) -> None:
    """Start ending a Ray job; no effect if it has ended or does not exist."""
    with contextlib.suppress(RuntimeError):
        _client(dashboard_url).stop_job(job_id)


def drivers(dashboard_url: str) -> list[JobDetails]:
    """All Ray jobs of the cluster."""
    return _client(dashboard_url).list_jobs()


def jobs(dashboard_url: str) -> list[dict[str, Any]]:
    """The platform's Ray jobs on the cluster, newest first: id, metadata (tenant, adapter and job; for sweeps of
    earlier releases tenant, model and sweep), status, message, started, ended."""
    submitted = sorted(drivers(dashboard_url), key=lambda job: job.start_time or 0, reverse=True)
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


def _client(dashboard_url: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(dashboard_url)
    except (ConnectionError, RuntimeError) as error:
        raise UnavailableError(
            f"no Ray dashboard answers at {dashboard_url} ({_line(error)}); check RAY_ADDRESS and that the cluster runs"
        ) from error


def _python(dashboard_url: str) -> str:
    """This interpreter on this host; elsewhere the `python` of the cluster's image."""
    return sys.executable if is_loopback(urlsplit(dashboard_url).hostname or "") else "python"


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
