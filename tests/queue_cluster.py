"""A cluster whose drivers do what a test says, for controllers that are the real ones."""

from __future__ import annotations

from collections.abc import Sequence

from pedro.errors import UnavailableError
from pedro.store import JobRecord, JobStatus, Store
from pedro.training.queue.launcher import Claim, ClusterView

NODE = {"CPU": 2.0}


class Cluster:
    """Drivers that do what the test says, on nodes of two cores."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.nodes = nodes or (NODE,)
        self.states: dict[str, JobStatus] = {}
        self.claims: dict[str, Claim] = {}
        self.stopped: list[str] = []
        self.away = False
        self.most = 0

    def look(self) -> ClusterView:
        if self.away:
            raise UnavailableError("the cluster is away")
        held = {name: self.claims[name].total for name, state in self.states.items() if not state.final}
        taken = {"CPU": sum(amounts["CPU"] for amounts in held.values()), "GPU": 0.0}
        return ClusterView(dict(self.states), self.nodes, taken, held)

    def start(self, job: JobRecord, submission_id: str) -> None:
        if self.away:
            raise UnavailableError("the cluster is away")
        assert submission_id not in self.states, "a driver is started once"
        self.claims[submission_id] = Claim.of(job.spec)
        self.states[submission_id] = JobStatus.RUNNING
        self.most = max(self.most, sum(not state.final for state in self.states.values()))

    def stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.states[submission_id] = JobStatus.CANCELLED


class SharingCluster(Cluster):
    """One that knows drivers of several jobs."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        super().__init__(*nodes)
        self.together: dict[str, list[str]] = {}

    def start_together(self, jobs: Sequence[JobRecord], submission_id: str) -> None:
        self.start(jobs[0], submission_id)
        self.together[submission_id] = [job.id for job in jobs]


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def ends(store: Store, cluster: Cluster, job_id: str, status: JobStatus = JobStatus.SUCCEEDED) -> None:
    """A driver enters its end, and ends."""
    job = store.get_job(job_id)
    assert job.submission_id is not None
    store.update_job(job_id, status=JobStatus.RUNNING, attempt=job.attempt)
    store.update_job(job_id, status=status, attempt=job.attempt)
    cluster.states[job.submission_id] = status
