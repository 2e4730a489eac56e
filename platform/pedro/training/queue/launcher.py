"""Where the controller's drivers run: the interface to a cluster, and the launcher that uses Ray jobs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pedro.errors import ConfigError, UnavailableError
from pedro.store import JobKind
from pedro.training import ray_jobs
from pedro.training.job_status import FROM_RAY
from pedro.training.queue.prepare import prepare
from pedro.training.storage import join

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import JobRecord, JobStatus
    from pedro.training.spec import FineTuneSpec

LOOK_TIMEOUT_S = 60
RESOURCES = ("CPU", "GPU")


@dataclass(frozen=True)
class Claim:
    """The resources of a job's workers."""

    workers: int
    cpus: float
    gpus: float
    """Of each worker."""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Claim:
        """The claim of a resolved spec from the store."""
        resources = spec.get("resources") or {}
        return cls(
            int(resources.get("workers", 1)),
            float(resources.get("cpus_per_worker", 1)),
            float(resources.get("gpus_per_worker", 0)),
        )

    @classmethod
    def least(cls, job: JobRecord) -> Claim:
        """What a job needs to start: for a sweep, the workers of one trial."""
        claim = cls.of(job.spec)
        return replace(claim, workers=int(job.spec["sweep"]["workers"])) if job.kind == JobKind.SWEEP else claim

    @property
    def total(self) -> dict[str, float]:
        return {"CPU": self.workers * self.cpus, "GPU": self.workers * self.gpus}

    def __str__(self) -> str:
        parts = {"CPU": self.cpus, "GPU": self.gpus}
        each = " and ".join(f"{amount:g} {name}" for name, amount in parts.items() if amount)
        return each if self.workers == 1 else f"{self.workers} times {each}"


@dataclass(frozen=True)
class ClusterView:
    """A snapshot of a cluster."""

    states: Mapping[str, JobStatus]
    """States of its drivers, by submission id."""
    nodes: Sequence[Mapping[str, float]] = ()
    """The total resources of each node."""
    taken: Mapping[str, float] = field(default_factory=dict)
    """Resources in use by serving and the drivers' workers."""
    held: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The part of that used by each driver's workers, by submission id."""

    def holds(self, claim: Claim) -> bool:
        """Whether the claim could be met if nothing else ran."""
        places = [
            min(
                int(node.get(name, 0) / wanted) for name, wanted in (("CPU", claim.cpus), ("GPU", claim.gpus)) if wanted
            )
            for node in self.nodes
        ]
        return sum(places) >= claim.workers

    def missing(self, job: JobRecord) -> dict[str, float]:
        """Resources promised to drivers but not in use: not yet, or between two trials."""
        held = self.held.get(job.submission_id or "", {})
        return {name: max(0.0, amount - held.get(name, 0.0)) for name, amount in Claim.of(job.spec).total.items()}

    def free(self, promised: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Free resources, without promised ones."""
        free = {name: sum(node.get(name, 0) for node in self.nodes) - self.taken.get(name, 0) for name in RESOURCES}
        for amounts in promised:
            free = {name: free[name] - amounts[name] for name in RESOURCES}
        return free


class Launcher(Protocol):
    """Starts, watches and ends drivers. Every call may raise UnavailableError; the controller then retries."""

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        """Validate spec and files of a job over HTTP, and store what its driver reads.

        Returns the spec for the queue, if it differs. Raises PedroError if they are invalid; idempotent."""

    def look(self) -> ClusterView: ...

    def start(self, job: JobRecord, submission_id: str) -> None:
        """Start a driver of the job under this id; no effect if it exists."""

    def stop(self, submission_id: str) -> None:
        """Ask a driver to stop, which keeps its checkpoints; no effect if it has ended."""


@runtime_checkable
class SharingLauncher(Protocol):
    """A launcher that supports drivers of several jobs, which share a worker."""

    def start_together(self, jobs: Sequence[JobRecord], submission_id: str) -> None:
        """As `start`, with one driver for all of them, even for a single job."""


class RayJobs:
    """Drivers as Ray jobs on the cluster of `settings`; a local head is started if there is none."""

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self._settings, self._log = settings, log
        self._url: str | None = None

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        made = prepare(job, self._settings)
        if self._settings.ray_address is None:  # other clusters may get more nodes
            _check_holds(self.look(), Claim.least(job if made is None else replace(job, spec=made)))
        return made

    def look(self) -> ClusterView:
        from pedro.cluster import within

        url = self._connected()
        try:
            return within(LOOK_TIMEOUT_S, partial(_look, url))
        except Exception as error:  # including the state API's own exception
            self._url = None  # it may have changed by the next call
            raise UnavailableError(f"the Ray cluster at {url} does not answer: {error}") from error

    def start(self, job: JobRecord, submission_id: str) -> None:
        metadata = {"tenant": job.tenant, "adapter": job.adapter, "job": job.id}
        self._launch(driver_arguments(job, self._settings), submission_id, metadata)

    def start_together(self, jobs: Sequence[JobRecord], submission_id: str) -> None:
        of_jobs = [word for job in jobs for word in ("--job", f"{job.id}:{job.attempt}")]
        metadata = {"jobs": " ".join(job.id for job in jobs)}
        self._launch(["pedro.training.cotraining.driver", *of_jobs], submission_id, metadata)

    def _launch(self, arguments: Sequence[str], submission_id: str, metadata: dict[str, str]) -> None:
        module = shlex.join(arguments)
        url = self._connected()
        try:
            ray_jobs.launch(module, submission_id, self._settings, url, metadata)
        except UnavailableError:
            if submission_id not in self.look().states:
                raise

    def stop(self, submission_id: str) -> None:
        ray_jobs.ask_to_end(submission_id, self._connected())

    def _connected(self) -> str:
        from pedro.cluster import connect, find_head

        local, url = self._settings.ray_address is None, self._url  # another thread may reset it meanwhile
        if url is None or (local and find_head(self._settings) is None):
            url = self._url = connect(self._settings, self._log).dashboard_url
        return url


def driver_arguments(job: JobRecord, settings: Settings) -> list[str]:
    """The arguments of `python -m` for a job's next start."""
    if job.kind == JobKind.SWEEP:
        at_once = Claim.of(job.spec).workers // Claim.least(job).workers
        of_start = ["--attempt", str(job.attempt), "--at-once", str(at_once)]
        return ["pedro.training.sweep.job", "--sweep", job.id, *of_start]
    location = join(settings.storage, "jobs", job.id, "spec.json")
    return ["pedro.training.job", "--spec", location, "--job-id", job.id, "--attempt", str(job.attempt)]


def check_fits(spec: FineTuneSpec, settings: Settings) -> None:
    """Raise ConfigError for a job whose workers would not fit even on an idle cluster."""
    _check_holds(RayJobs(settings, lambda _line: None).look(), Claim.of(spec.to_dict()))


def _check_holds(view: ClusterView, claim: Claim) -> None:
    if view.nodes and not view.holds(claim):  # a cluster without nodes may still get some
        there = " and ".join(f"{node[name]:g} {name}" for node in view.nodes for name in RESOURCES if node.get(name))
        raise ConfigError(
            f"resources: the job needs {claim}, but this machine has {there}; lower resources.workers, "
            "cpus_per_worker or gpus_per_worker",
            param="resources",
        )


def _look(url: str) -> ClusterView:
    from ray.util.state import list_actors, list_nodes, list_placement_groups

    drivers = ray_jobs.drivers(url)
    ask: dict[str, Any] = {"address": url, "detail": True, "limit": 10_000}
    nodes = [dict(node.resources_total) for node in list_nodes(**ask, filters=[("state", "=", "ALIVE")])]
    groups = list_placement_groups(**ask, filters=[("state", "=", "CREATED")])
    actors = list_actors(**ask, filters=[("state", "=", "ALIVE")])
    by_ray_id = {job.job_id: job.submission_id for job in drivers if job.submission_id}
    taken = dict.fromkeys(RESOURCES, 0.0)
    held = {submission_id: dict.fromkeys(RESOURCES, 0.0) for submission_id in by_ray_id.values()}
    for driver, amounts in [
        *((by_ray_id.get(g.creator_job_id), b.get("unit_resources") or b) for g in groups for b in g.bundles or ()),
        *((None, actor.required_resources or {}) for actor in actors if not actor.placement_group_id),
    ]:
        for name in RESOURCES:
            taken[name] += float(amounts.get(name, 0))
            if driver is not None:
                held[driver][name] += float(amounts.get(name, 0))
    states = {job.submission_id: FROM_RAY[job.status.value] for job in drivers if job.submission_id}
    return ClusterView(states, nodes, taken, held)
