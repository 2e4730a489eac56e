"""Jobs that share a worker, in the queue: which start together, and what one's end is to the others."""

from __future__ import annotations

import time

import pytest
from queue_cluster import Clock, Cluster, SharingCluster, ends

from pedro.store import JobStatus
from pedro.training.cotraining.driver import LEFT
from pedro.training.queue.controller import Controller
from pedro.training.queue.grouping import GATHER_S
from pedro.training.sharing import MOST_JOBS, MOST_ROWS


@pytest.fixture
def clock():
    clock = Clock()
    clock.now = time.time() + GATHER_S + 1
    return clock


def queued(store, tenant="acme", *, share=True, priority=0, batch_size=16, **changes):
    spec = {
        "backbone": "stories260K",
        "method": {"name": "pedro"},
        "training": {"precision": "fp32", "batch_size": batch_size},
        "resources": {"workers": 1, "cpus_per_worker": 1, **({"share": True} if share else {})},
        **changes,
    }
    return store.create_job(tenant, "voice", spec, queued=True, priority=priority).id


def controller_of(store, cluster, clock, **options):
    return Controller(store, cluster, share_across_tenants=True, clock=clock, **options)


def groups(cluster):
    return sorted(sorted(jobs) for jobs in cluster.together.values())


def test_jobs_of_one_form_that_wait_start_as_one_driver(store, clock):
    cluster = SharingCluster()
    jobs = [queued(store, tenant) for tenant in ("acme", "globex", "initech")]
    other = queued(store, method={"name": "lora"})
    lone = queued(store, "acme", share=False)
    controller_of(store, cluster, clock).round()
    assert groups(cluster) in ([sorted(jobs), [other]], [[other], sorted(jobs)])
    drivers = {store.get_job(job).submission_id for job in jobs}
    assert len(drivers) == 1
    assert store.get_job(lone).submission_id is None, "the two groups have the two cores"
    assert "1 CPU to be free" in store.get_job(lone).message
    assert cluster.look().taken["CPU"] == 2


def test_a_group_is_of_one_tenant_unless_the_operator_allows_others(store, clock):
    cluster = SharingCluster({"CPU": 8.0})
    acme, globex = ([queued(store, tenant) for _ in range(2)] for tenant in ("acme", "globex"))
    Controller(store, cluster, clock=clock).round()
    assert groups(cluster) == sorted([sorted(acme), sorted(globex)])


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "pedro-nano"},
        {"method": {"name": "pedro", "r": 3}},
        {"training": {"precision": "bf16"}},
        {"training": {"precision": "fp32", "backbone_dtype": "nf4"}},
        {"training": {"precision": "fp32", "max_length": 1024}},
        {"training": {"precision": "fp32", "packing": False}},
        {"resources": {"workers": 1, "cpus_per_worker": 1, "share": True, "max_failures": 0}},
    ],
)
def test_jobs_of_another_form_have_a_worker_of_their_own(store, clock, changes):
    cluster = SharingCluster()
    first, second = queued(store), queued(store, "globex", **changes)
    controller_of(store, cluster, clock).round()
    assert groups(cluster) == sorted([[first], [second]])


def test_a_group_has_no_more_jobs_and_rows_than_one_pass_takes(store, clock):
    cluster = SharingCluster({"CPU": 8.0})
    small = [queued(store, f"tenant{number}", batch_size=1) for number in range(MOST_JOBS + 1)]
    large = [queued(store, f"large{number}", batch_size=MOST_ROWS, method={"name": "lora"}) for number in range(2)]
    controller_of(store, cluster, clock).round()
    assert sorted(map(len, groups(cluster))) == [1, 1, 1, MOST_JOBS]
    assert {job for jobs in groups(cluster) for job in jobs} == {*small, *large}


def test_jobs_of_one_moment_are_waited_for_and_nobody_is_held_up_meanwhile(store):
    cluster, clock = SharingCluster(), Clock()
    controller = controller_of(store, cluster, clock)
    first, lone = queued(store), queued(store, share=False)
    clock.now = store.get_job(first).created + GATHER_S / 2
    controller.round()
    assert groups(cluster) == []
    assert store.get_job(lone).submission_id == lone
    second = queued(store, "globex")
    clock.now = store.get_job(first).created + GATHER_S
    controller.round()
    assert groups(cluster) == [sorted([first, second])]


def test_what_those_that_gather_will_need_is_not_given_to_lower_priorities(store):
    cluster, clock = SharingCluster({"CPU": 1.0}), Clock()
    controller = controller_of(store, cluster, clock)
    first, second = (queued(store, priority=1) for _ in range(2))
    lone = queued(store, share=False)
    clock.now = store.get_job(first).created + GATHER_S / 2
    controller.round()
    assert cluster.states == {}
    clock.now = store.get_job(second).created + GATHER_S
    controller.round()
    assert groups(cluster) == [sorted([first, second])]
    assert store.get_job(lone).submission_id is None


def test_a_clock_behind_the_one_that_queued_a_job_does_not_hold_it_up(store):
    cluster, clock = SharingCluster(), Clock()
    job = queued(store)
    clock.now = store.get_job(job).created - 60
    controller_of(store, cluster, clock).round()
    assert groups(cluster) == [[job]]


def test_jobs_of_one_driver_have_its_time_between_them(store, clock):
    jobs = [queued(store) for _ in range(2)]
    controller_of(store, SharingCluster(), clock).round()
    for job in jobs:
        store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    started = [store.get_job(job).started for job in jobs]
    had = store.trained_seconds(min(started), max(started) + 10)["acme"]
    assert had == pytest.approx(10, abs=max(started) - min(started) + 0.01)
    assert store.worker_seconds(0)["acme"] < 10


def test_tenants_have_no_more_jobs_at_once_in_a_group_than_without(store, clock):
    cluster = SharingCluster()
    acme, globex = [queued(store) for _ in range(3)], queued(store, "globex")
    controller_of(store, cluster, clock, per_tenant=2).round()
    (group,) = groups(cluster)
    assert len(set(group) & set(acme)) == 2
    assert globex in group


def test_one_that_ends_or_is_to_end_leaves_the_others_their_driver(store, clock):
    cluster = SharingCluster()
    controller = controller_of(store, cluster, clock)
    done, wanted, goes_on = (queued(store, tenant) for tenant in ("acme", "globex", "initech"))
    controller.round()
    store.update_job(done, status=JobStatus.RUNNING, attempt=1)
    store.update_job(done, status=JobStatus.SUCCEEDED, attempt=1)
    for job in (wanted, goes_on):
        store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    store.ask_of_job(wanted, JobStatus.CANCELLED)
    controller.round()
    assert cluster.stopped == [], "its driver sees for itself that one is to end"
    store.ask_of_job(goes_on, JobStatus.PAUSED)
    (driver,) = cluster.together
    cluster.states[driver] = JobStatus.FAILED
    controller.round()
    status = {job: store.get_job(job).status for job in (done, wanted, goes_on)}
    assert status == {
        done: JobStatus.SUCCEEDED,
        wanted: JobStatus.CANCELLED,
        goes_on: JobStatus.PAUSED,
    }


def test_each_job_of_a_lost_driver_is_started_again_and_no_other(store, clock):
    cluster = SharingCluster()
    controller = controller_of(store, cluster, clock)
    jobs = [queued(store, tenant) for tenant in ("acme", "globex", "initech")]
    controller.round()
    (driver,) = cluster.together
    store.update_job(jobs[0], status=JobStatus.RUNNING, attempt=1)
    store.update_job(jobs[0], status=JobStatus.SUCCEEDED, attempt=1)
    cluster.states[driver] = JobStatus.FAILED
    controller.round()
    clock.now += 600
    controller.round()
    again = [store.get_job(job) for job in jobs]
    assert again[0].status == JobStatus.SUCCEEDED
    assert [job.attempt for job in again] == [1, 2, 2]
    assert [cluster.together[job.submission_id] for job in again[1:]] == [[job] for job in jobs[1:]], "each alone"


def test_one_that_its_driver_left_is_started_again_alone_while_the_driver_goes_on(store, clock):
    cluster = SharingCluster()
    controller = controller_of(store, cluster, clock)
    left, wanted, goes_on = (queued(store, tenant) for tenant in ("acme", "globex", "initech"))
    controller.round()
    (driver,) = cluster.together
    for job in (left, wanted, goes_on):
        store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    store.ask_of_job(wanted, JobStatus.PAUSED)
    for job in (left, wanted):
        store.update_job(job, submission_id=driver + LEFT, message="the storage did not answer", attempt=1)
    controller.round()
    assert store.get_job(wanted).status == JobStatus.PAUSED
    assert store.get_job(left).status == JobStatus.QUEUED
    assert "the storage did not answer" in store.get_job(left).message
    clock.now += 600
    controller.round()
    assert cluster.together[store.get_job(left).submission_id] == [left]
    assert store.get_job(goes_on).submission_id == driver
    assert cluster.stopped == []


def test_a_group_that_was_ended_as_a_whole_is_not_taken_for_cancelled_jobs(store, clock):
    """Erasing one tenant ends the driver; the others' jobs resume."""
    cluster = SharingCluster()
    controller = controller_of(store, cluster, clock)
    jobs = [queued(store, tenant) for tenant in ("acme", "globex")]
    controller.round()
    (driver,) = cluster.together
    cluster.states[driver] = JobStatus.CANCELLED
    controller.round()
    assert {store.get_job(job).status for job in jobs} == {JobStatus.QUEUED}


def test_where_no_driver_can_be_shared_each_job_has_its_own(store, clock):
    cluster = Cluster()
    controller = controller_of(store, cluster, clock)
    jobs = [queued(store, tenant) for tenant in ("acme", "globex")]
    controller.round()
    assert [store.get_job(job).submission_id for job in jobs] == jobs
    for job in jobs:
        ends(store, cluster, job)
    assert controller.round() == 0
