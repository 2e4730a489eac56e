"""The controller: starts the next job's driver once its resources are free, and watches running ones.

One round (`Controller.round`): lease the queue's open jobs, query the cluster, reconcile each job with its driver,
start what fits. It keeps no state in memory that a successor would need, except how long a job that lost its driver
should wait.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from pedro.errors import NotFoundError, PedroError, UnavailableError
from pedro.store import JobKind, JobStatus
from pedro.training.queue.budgets import used_up
from pedro.training.queue.grouping import GATHER_S, SHARED, group_of, key_of, may_be_grouped
from pedro.training.queue.launcher import Claim, SharingLauncher
from pedro.training.queue.prepare import told_error
from pedro.training.queue.sweeps import widened
from pedro.training.queue.turns import in_turn

if TYPE_CHECKING:
    from pedro.store import JobRecord, Store
    from pedro.training.queue.launcher import ClusterView, Launcher

ROUND_S = 1.0
UNREADABLE = "The job could not be prepared because of an internal error; the operator's log has the cause."
LEASE_S = 30.0
"""A controller that hangs for longer loses its jobs to another one."""
MOST_LOSSES = 5
"""Consecutive lost drivers after which a job is given up."""
LASTED_S = 3600.0
"""A driver that ran for this long made progress, so that earlier losses no longer count."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
HISTORY_S = 24 * 3600.0
"""How long tenants' past use of the cluster counts in the order of jobs."""


class Controller:
    """Handles the jobs of one store, alone or beside other controllers."""

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        log: Callable[[str], None] = lambda _line: None,
        *,
        per_tenant: int | None = None,
        share_across_tenants: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`per_tenant` limits the running jobs per tenant; None is no limit. Jobs that share a worker belong to one
        tenant, unless `share_across_tenants` is set."""
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._store, self._launcher, self._log = store, launcher, log
        self._per_tenant, self._across_tenants, self._clock = per_tenant, share_across_tenants, clock
        self._losses: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._looking: dict[str, Future[None]] = {}
        self._looker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")

    def run(
        self,
        stop: threading.Event,
        *,
        may_end: Callable[[], bool] = lambda: False,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Run rounds until `stop` is set, or no job is open and it `may_end`. Unavailable services are retried.

        `beat` is called before each round, so that a watchdog can detect a hanging controller.
        """
        away = ""
        while not stop.is_set():
            beat()
            try:
                if self.round() == 0 and may_end():
                    return
                away = ""
            except UnavailableError as error:
                if error.message != away:
                    self._log(f"waiting: {error.message}")
                away = error.message
            except Exception as error:  # noqa: BLE001 - the other jobs still need a controller
                for line in traceback.format_exception(error):
                    self._log(line.rstrip())
            stop.wait(ROUND_S)

    def close(self) -> None:
        """Release the leases."""
        self._looker.shutdown(wait=True, cancel_futures=True)
        self._store.release_jobs(self.owner)

    def round(self) -> int:
        """Run one round; returns the number of open jobs at its start. Raises UnavailableError if store or cluster do
        not answer."""
        now = self._clock()
        leased = self._store.lease_jobs(self.owner, now, now + LEASE_S)
        self._look_at_files([job for job in leased.jobs if job.status == JobStatus.VALIDATING])
        if any(job.status != JobStatus.VALIDATING for job in leased.jobs):
            view = self._launcher.look()
            running = [job for job in leased.jobs if job.submission_id and not self._settle(job, view)]
            waiting = [job for job in leased.jobs if self._may_start(job, view, now)]
            self._start(waiting, running, view, leased.starts)
        return leased.open_jobs

    def _look_at_files(self, jobs: list[JobRecord]) -> None:
        """Validate new jobs one after the other, concurrently with rounds, since files may be large."""
        held = {job.id for job in jobs}
        for job_id in [job_id for job_id, looking in self._looking.items() if looking.done()]:
            self._looking.pop(job_id)
        busy = {job.tenant for job in jobs if job.id in self._looking}
        for job in jobs:
            if job.id not in self._looking and job.tenant not in busy:  # one per tenant, so as not to delay others
                busy.add(job.tenant)
                self._looking[job.id] = self._looker.submit(self._look_at, job)
        for job_id in self._looking.keys() - held:
            if self._looking[job_id].cancel():
                del self._looking[job_id]

    def _look_at(self, job: JobRecord) -> None:
        if self._store.get_job(job.id).status != JobStatus.VALIDATING:  # it was validated after this round read it
            return
        self._store.add_job_event(job.id, f"Validating training file: {job.spec['data']['train']}", once=True)
        try:
            spec = self._launcher.prepare(job)
        except UnavailableError as error:
            self._store.explain_wait(job, error.message)  # the next round tries again
            return
        except PedroError as error:
            told = {"error": told_error(error)}
            self._store.end_job(job, JobStatus.FAILED, error.message, told, only=JobStatus.VALIDATING)
            return
        except Exception:  # noqa: BLE001 - an internal error ends only this job
            for line in traceback.format_exc().splitlines():
                self._log(line)
            ours = {"error": {"code": "internal_error"}}
            self._store.end_job(job, JobStatus.FAILED, UNREADABLE, ours, only=JobStatus.VALIDATING)
            return
        if self._store.accept_job(job, spec):
            self._store.add_job_event(job.id, "Files validated, moving job to queued state")

    def _may_start(self, job: JobRecord, view: ClusterView, now: float) -> bool:
        """Whether it is queued, its pause after a loss is over, and none of its earlier drivers is still ending."""
        if job.submission_id or job.status != JobStatus.QUEUED:
            return False
        earlier = (view.states.get(driver_id(job, attempt)) for attempt in range(1, job.attempt))
        return self._not_before.get(job.id, 0) <= now and all(state is None or state.final for state in earlier)

    def _settle(self, job: JobRecord, view: ClusterView) -> bool:
        """Reconcile a job with its driver; returns whether the driver has ended."""
        assert job.submission_id is not None
        shares = job.submission_id.startswith(SHARED)  # shared drivers watch for stops of their jobs themselves
        state = view.states.get(job.submission_id)
        if state is not None and not state.final:
            if job.wanted and not shares:
                self._launcher.stop(job.submission_id)
            elif self._clock() - (job.started or 0) > LASTED_S:
                self._losses.pop(job.id, None)
            return False
        now = self._store.get_job(job.id)  # a driver records its end before it exits
        if now.status.final or now.status == JobStatus.PAUSED or now.submission_id != job.submission_id:
            return True
        if now.wanted:
            self._end(job, now.wanted, "stopped" if now.wanted == JobStatus.CANCELLED else "")
        elif state == JobStatus.CANCELLED and not shares:
            self._end(job, JobStatus.CANCELLED, "stopped")
        else:
            self._lost(job, now.message or ("its cluster was ended" if state is None else "its driver died"))
        return True

    def _lost(self, job: JobRecord, why: str) -> None:
        self._losses[job.id] += 1
        losses = self._losses[job.id]
        if losses >= MOST_LOSSES:
            self._end(job, JobStatus.FAILED, f"{why}; given up after {losses} starts (`pedro jobs retry` resumes it)")
            return
        if self._store.requeue_job(job, f"{why}; it resumes from its last checkpoint"):
            self._store.add_job_event(job.id, f"{why}; the job resumes from its last checkpoint", level="warn")
            pause = min(FIRST_PAUSE_S * 2 ** (losses - 1), LONGEST_PAUSE_S)
            self._not_before[job.id] = self._clock() + pause
            self._log(f"{job.id} ({job.name}): {why}; started again in {pause:.0f} s")

    def _end(self, job: JobRecord, status: JobStatus, message: str) -> None:
        if self._store.end_job(job, status, message):
            self._log(f"{job.id} ({job.name}): {status}{': ' if message else ''}{message}")
        self._losses.pop(job.id, None)

    def _start(self, waiting: list[JobRecord], running: list[JobRecord], view: ClusterView, starts: int) -> None:
        """Start what fits, in order. A job that must wait for others to end is not overtaken."""
        of_drivers = {job.submission_id: job for job in running}  # jobs that share a driver share its resources
        promised = [view.missing(job) for job in of_drivers.values()]
        held = Counter(job.tenant for job in running)
        drivers = Counter(tenant for tenant, _ in {(job.tenant, job.submission_id) for job in running})
        history = self._store.worker_seconds(self._clock() - HISTORY_S) if waiting else {}
        over_budget = used_up(self._store, self._clock()) if waiting else {}
        gathering: list[JobRecord] = []
        kept: dict[str | None, dict[str, float]] = {}  # resources kept free for gathering jobs, by key
        while job := in_turn(waiting, drivers, history):
            waiting.remove(job)
            claim, shares, key = Claim.least(job), self._shares(job), key_of(job, self._across_tenants)
            reserved = [*promised, *(amounts for other, amounts in kept.items() if other != key)]
            if self._full(job, held):
                self._store.explain_wait(
                    job, f"waits for the tenant's other jobs: at most {self._per_tenant} run at once"
                )
            elif why := over_budget.get(job.tenant):
                self._hold_back(job, why)
            elif not view.holds(claim):
                self._store.explain_wait(job, f"needs {claim}, more than the cluster's nodes have in total")
            elif any(amount > view.free(reserved)[name] + 1e-6 for name, amount in claim.total.items()):
                self._store.explain_wait(job, f"waits for {claim} to be free")
                return
            elif shares and may_be_grouped(job) and 0 <= self._clock() - job.created < GATHER_S:
                gathering.append(job)
                kept[key] = claim.total
            else:
                group = [job]
                if shares:
                    lets = partial(self._lets, over_budget)
                    group = group_of(job, [*gathering, *waiting], held, history, lets, self._across_tenants)
                elif job.kind == JobKind.SWEEP:
                    room = None if self._per_tenant is None else self._per_tenant - held[job.tenant]
                    group = [widened(job, view, reserved, waiting, room)]
                submission_id = f"{SHARED if shares else ''}{driver_id(job, job.attempt)}"
                started = []
                for member in group:
                    if not self._store.start_job(member, submission_id, starts):
                        break  # another controller was faster, or the job was stopped: left to the next round
                    started.append(member)
                    starts += 1
                    held[member.tenant] += 1
                if started:
                    promised.append(Claim.of(started[0].spec).total)
                    drivers.update({member.tenant for member in started})
                    self._launch(started, submission_id)
                if len(started) < len(group):
                    return
                waiting = [other for other in waiting if other not in started]
                gathering = [other for other in gathering if other not in started]
                still = {key_of(other, self._across_tenants) for other in gathering}
                kept = {of: amounts for of, amounts in kept.items() if of in still}

    def _full(self, job: JobRecord, held: Mapping[str, int]) -> bool:
        """Whether the job's tenant has reached its limit of running jobs."""
        return self._per_tenant is not None and held.get(job.tenant, 0) >= self._per_tenant

    def _lets(self, over_budget: Container[str], job: JobRecord, held: Mapping[str, int]) -> bool:
        return job.tenant not in over_budget and not self._full(job, held)

    def _shares(self, job: JobRecord) -> bool:
        """Whether the job gets a driver that others can share."""
        return key_of(job) is not None and isinstance(self._launcher, SharingLauncher)

    def _hold_back(self, job: JobRecord, why: str) -> None:
        if job.message != why:
            self._store.explain_wait(job, why)
            self._store.add_job_event(job.id, f"The job {why}", level="warn", once=True)

    def _launch(self, jobs: list[JobRecord], submission_id: str) -> None:
        """Start one driver for the jobs; several share it."""
        names = ", ".join(f"{job.id} ({job.name})" for job in jobs)
        try:
            if submission_id.startswith(SHARED):
                assert isinstance(self._launcher, SharingLauncher)
                self._launcher.start_together(jobs, submission_id)
            else:
                self._launcher.start(jobs[0], submission_id)
            self._log(f"{names}: started, attempt {jobs[0].attempt}")
            for job in jobs:
                again = "" if job.attempt == 1 else f", attempt {job.attempt}, from its last checkpoint"
                self._store.add_job_event(job.id, f"Fine-tuning job started{again}")
        except UnavailableError as error:  # its row names a driver that does not exist: the next round requeues it
            self._log(f"{names}: {error.message}")
        except NotFoundError as error:
            for job in jobs:
                self._end(job, JobStatus.FAILED, error.message)


def driver_id(job: JobRecord, attempt: int) -> str:
    """The submission id of a job's driver: the first one's is the job's id."""
    return job.id if attempt == 1 else f"{job.id}-{attempt}"
