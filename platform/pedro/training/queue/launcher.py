"""Where the controller's drivers run: what it asks of a cluster, and the one that runs them as Ray jobs."""

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
    """What a job's workers take."""

    workers: int
    cpus: float
    gpus: float
    """Of each worker."""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Claim:
        """Of a resolved spec, as it stands in the store."""
        resources = spec.get("resources") or {}
        return cls(
            int(resources.get("workers", 1)),
            float(resources.get("cpus_per_worker", 1)),
            float(resources.get("gpus_per_worker", 0)),
        )

    @classmethod
    def least(cls, job: JobRecord) -> Claim:
        """What a job cannot begin without: of a sweep, the workers of one trial."""
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
    """A cluster as of a moment."""

    states: Mapping[str, JobStatus]
    """Of the drivers that it knows, by submission id."""
    nodes: Sequence[Mapping[str, float]] = ()
    """What each node has in all."""
    taken: Mapping[str, float] = field(default_factory=dict)
    """What serving and the drivers' workers hold."""
    held: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """How much of that each driver's workers do, by submission id."""

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
        """What a driver was started with and its workers do not hold: not yet, or not between two trials."""
        held = self.held.get(job.submission_id or "", {})
        return {name: max(0.0, amount - held.get(name, 0.0)) for name, amount in Claim.of(job.spec).total.items()}

    def free(self, promised: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """What is left, less what is promised."""
        free = {name: sum(node.get(name, 0) for node in self.nodes) - self.taken.get(name, 0) for name in RESOURCES}
        for amounts in promised:
            free = {name: free[name] - amounts[name] for name in RESOURCES}
        return free


class Launcher(Protocol):
    """Starts, watches and ends drivers. Every call may raise UnavailableError; then the controller tries again."""

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        """Look at the spec and the files of a job that came unseen, and put what its driver reads into the storage.

        Returns the spec that the queue is to know it by, if that is another one. Raises PedroError for what is wrong
        with them; again does no harm."""

    def look(self) -> ClusterView: ...

    def start(self, job: JobRecord, submission_id: str) -> None:
        """Start a driver of the job under that id; nothing happens if there is one already."""

    def stop(self, submission_id: str) -> None:
        """Ask a driver to end, which keeps its checkpoints; nothing happens if it has."""


@runtime_checkable
class SharingLauncher(Protocol):
    """A launcher that knows drivers of several jobs, which share a worker."""

    def start_together(self, jobs: Sequence[JobRecord], submission_id: str) -> None:
        """As `start`, one driver for all of them, even for one alone."""


class RayJobs:
    """Drivers as Ray jobs on the cluster of `settings`, whose local head is started when there is none."""

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self._settings, self._log = settings, log
        self._url: str | None = None

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        made = prepare(job, self._settings)
        if self._settings.ray_address is None:  # to another's cluster nodes may come
            _check_holds(self.look(), Claim.least(job if made is None else replace(job, spec=made)))
        return made

    def look(self) -> ClusterView:
        from pedro.cluster import within

        url = self._connected()
        try:
            return within(LOOK_TIMEOUT_S, partial(_look, url))
        except Exception as error:  # of Ray's state API, too, which has one of its own
            self._url = None  # it may be another one by the next look
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

        local, url = self._settings.ray_address is None, self._url  # which another thread may forget meanwhile
        if url is None or (local and find_head(self._settings) is None):
            url = self._url = connect(self._settings, self._log).dashboard_url
        return url


def driver_arguments(job: JobRecord, settings: Settings) -> list[str]:
    """What `python -m` runs for a job's next start."""
    if job.kind == JobKind.SWEEP:
        at_once = Claim.of(job.spec).workers // Claim.least(job).workers
        of_start = ["--attempt", str(job.attempt), "--at-once", str(at_once)]
        return ["pedro.training.sweep.job", "--sweep", job.id, *of_start]
    location = join(settings.storage, "jobs", job.id, "spec.json")
    return ["pedro.training.job", "--spec", location, "--job-id", job.id, "--attempt", str(job.attempt)]


def check_fits(spec: FineTuneSpec, settings: Settings) -> None:
    """Raise ConfigError for a job whose workers the cluster could not hold even if nothing else ran."""
    _check_holds(RayJobs(settings, lambda _line: None).look(), Claim.of(spec.to_dict()))


def _check_holds(view: ClusterView, claim: Claim) -> None:
    if view.nodes and not view.holds(claim):  # a cluster that has none yet says nothing
        there = " and ".join(f"{node[name]:g} {name}" for node in view.nodes for name in RESOURCES if node.get(name))
        raise ConfigError(
            f"resources: the job needs {claim}, and this machine has {there}; lower resources.workers, "
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
