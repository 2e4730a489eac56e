"""The queue of jobs: turns, resources, leases, what is sent back and what ends, in every order that can go wrong."""

from __future__ import annotations

import datetime
import itertools
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from queue_cluster import NODE, Clock, Cluster, ends

from pedro.errors import ConfigError, ConflictError, NotFoundError, RateLimitError, UnavailableError
from pedro.store import Idempotency, JobStatus, Usage
from pedro.training.queue.budgets import used_up
from pedro.training.queue.controller import LEASE_S, MOST_LOSSES, Controller
from pedro.training.queue.launcher import Claim, ClusterView
from pedro.training.queue.turns import in_turn


@pytest.fixture
def clock():
    return Clock()


def queued(store, tenant="acme", *, cpus=1.0, workers=1, priority=0, adapter="voice"):
    spec = {"resources": {"workers": workers, "cpus_per_worker": cpus}}
    return store.create_job(tenant, adapter, spec, queued=True, priority=priority).id


def test_a_driver_starts_only_when_its_resources_are_free(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    jobs = [queued(store) for _ in range(40)]
    for ended in jobs:
        controller.round()
        assert store.get_job(ended).submission_id == ended
        ends(store, cluster, ended)
    assert controller.round() == 0
    assert cluster.most == 2, "as many as there are cores"
    assert {store.get_job(job).status for job in jobs} == {JobStatus.SUCCEEDED}
    assert len(cluster.states) == 40, "each started once"


def test_one_that_waits_for_much_is_not_overtaken_and_says_what_it_waits_for(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    first, large, small = queued(store), queued(store, cpus=2), queued(store)
    controller.round()
    assert [store.get_job(job).submission_id for job in (first, large, small)] == [first, None, None]
    assert "2 CPU to be free" in store.get_job(large).message
    ends(store, cluster, first)
    controller.round()
    assert store.get_job(large).submission_id == large
    assert store.get_job(large).message == ""
    assert store.get_job(small).submission_id is None


def test_one_that_can_never_fit_says_so_and_holds_up_nobody(store, clock):
    controller = Controller(store, Cluster(NODE, NODE), clock=clock)
    never, wide, fits = queued(store, cpus=3), queued(store, workers=5), queued(store, workers=4)
    controller.round()
    assert "needs 3 CPU, more than the cluster's nodes" in store.get_job(never).message
    assert "needs 5 times 1 CPU" in store.get_job(wide).message
    assert store.get_job(never).status == JobStatus.QUEUED
    assert store.get_job(fits).submission_id == fits


def test_priorities_first_then_whoever_had_least_then_the_oldest(store):
    jobs = [
        store.get_job(queued(store, tenant, priority=priority))
        for tenant, priority in [("acme", 0), ("acme", 0), ("globex", 0), ("initech", 0), ("acme", 5)]
    ]
    order, held = [], {"initech": 1}
    waiting = list(jobs)
    while job := in_turn(waiting, held, {"acme": 50.0}):
        waiting.remove(job)
        held[job.tenant] = held.get(job.tenant, 0) + 1
        order.append(jobs.index(job))
    assert order == [4, 2, 3, 0, 1]


def test_a_flood_of_one_tenants_jobs_holds_up_no_other(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    flood = [queued(store, "flood") for _ in range(20)]
    controller.round()
    late = queued(store, "acme")
    ends(store, cluster, flood[0])
    controller.round()
    assert store.get_job(late).submission_id == late


def test_no_more_jobs_of_a_tenant_run_at_once_than_allowed(store, clock):
    cluster = Cluster({"CPU": 8.0})
    controller = Controller(store, cluster, per_tenant=2, clock=clock)
    acme = [queued(store) for _ in range(4)]
    other = queued(store, "globex")
    controller.round()
    assert [store.get_job(job).submission_id is not None for job in (*acme, other)] == [True, True, False, False, True]
    assert "2 run at once" in store.get_job(acme[2]).message


def test_a_lost_driver_is_started_again_and_given_up_in_the_end(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    for attempt in range(1, MOST_LOSSES + 1):
        controller.round()
        name = store.get_job(job).submission_id
        assert name == (job if attempt == 1 else f"{job}-{attempt}")
        if attempt % 2:
            cluster.states[name] = JobStatus.FAILED  # without a word
        else:
            cluster.states.clear()  # with its cluster
        controller.round()
        assert store.get_job(job).submission_id in (None, name)
        clock.now += 600
    ended = store.get_job(job)
    assert ended.status == JobStatus.FAILED
    assert f"given up after {MOST_LOSSES} starts" in ended.message
    assert controller.round() == 0


def test_a_driver_that_dies_late_each_time_is_given_up_too(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    for _ in range(MOST_LOSSES):
        clock.now += 600
        controller.round()
        controller.round()  # it has its workers, and runs
        cluster.states[store.get_job(job).submission_id] = JobStatus.FAILED
        controller.round()
    assert store.get_job(job).status == JobStatus.FAILED


def test_what_a_tenant_does_not_use_does_not_count_against_it(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    controller.round()
    store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    assert list(store.worker_seconds(0)) == ["acme"]
    store.update_job(job, status=JobStatus.PAUSED, attempt=1)
    assert store.worker_seconds(0) == {}


def test_it_waits_longer_after_each_loss(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    for pause in (5, 10, 20):
        controller.round()
        cluster.states[store.get_job(job).submission_id] = JobStatus.FAILED
        controller.round()
        clock.now += pause - 1
        controller.round()
        assert store.get_job(job).submission_id is None
        clock.now += 1
    controller.round()
    assert store.get_job(job).attempt == 4


def test_what_the_user_got_wrong_is_not_tried_again(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    controller.round()
    ends(store, cluster, job, JobStatus.FAILED)
    assert (controller.round(), controller.round()) == (0, 0)
    assert len(cluster.states) == 1


def test_a_given_up_driver_that_lives_on_writes_nothing(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    controller.round()
    store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    cluster.states.clear()
    controller.round()
    clock.now += 60
    controller.round()
    for status in (JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED):
        with pytest.raises(ConflictError, match="attempt 2, past 1"):
            store.update_job(job, status=status, attempt=1)
    assert (store.get_job(job).attempt, store.get_job(job).status) == (2, JobStatus.QUEUED)


def test_pausing_frees_the_workers_and_resuming_waits_its_turn(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store, cpus=2)
    controller.round()
    store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    assert store.ask_of_job(job, JobStatus.PAUSED).wanted == JobStatus.PAUSED
    controller.round()
    assert cluster.stopped == [job]
    other = queued(store, cpus=2)
    controller.round()
    assert store.get_job(job).status == JobStatus.PAUSED
    assert store.get_job(other).submission_id == other
    assert store.let_job_continue(job, [JobStatus.PAUSED]).attempt == 2
    controller.round()
    assert store.get_job(job).submission_id is None
    ends(store, cluster, other)
    controller.round()
    assert store.get_job(job).submission_id == f"{job}-2"


def test_a_resumed_job_waits_until_its_driver_before_has_ended(store, clock):
    cluster = Cluster({"CPU": 8.0})
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    controller.round()
    store.update_job(job, status=JobStatus.RUNNING, attempt=1)
    store.update_job(job, status=JobStatus.PAUSED, attempt=1)  # which it enters before it ends
    store.let_job_continue(job, [JobStatus.PAUSED])
    controller.round()
    assert list(cluster.states) == [job]
    cluster.states[job] = JobStatus.CANCELLED
    controller.round()
    assert list(cluster.states) == [job, f"{job}-2"]


@pytest.mark.parametrize("wanted", [JobStatus.PAUSED, JobStatus.CANCELLED])
def test_a_job_whose_driver_is_lost_while_it_is_asked_to_end_ends_and_holds_up_nobody(store, clock, wanted):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job, other = queued(store, cpus=2), queued(store, cpus=2)
    controller.round()
    cluster.states[job] = JobStatus.FAILED
    look = cluster.look

    def asked_meanwhile():
        store.ask_of_job(job, wanted)
        return look()

    cluster.look = asked_meanwhile  # after the round has read the job
    controller.round()
    cluster.look = look
    controller.round()
    assert (store.get_job(job).status, store.get_job(job).wanted) == (wanted, None)
    assert store.get_job(other).submission_id == other


@pytest.mark.parametrize("wanted", [JobStatus.PAUSED, JobStatus.CANCELLED])
def test_a_job_that_waits_is_paused_or_cancelled_at_once(store, clock, wanted):
    cluster = Cluster()
    job = queued(store)
    assert store.ask_of_job(job, wanted).status == wanted
    Controller(store, cluster, clock=clock).round()
    assert not cluster.states
    if wanted == JobStatus.PAUSED:
        assert store.ask_of_job(job, JobStatus.CANCELLED).status == JobStatus.CANCELLED


def test_what_has_ended_can_be_retried_but_not_paused_or_resumed(store):
    job = queued(store)
    store.update_job(job, status=JobStatus.FAILED, message="bad luck")
    for refused in (
        lambda: store.ask_of_job(job, JobStatus.PAUSED),
        lambda: store.ask_of_job(job, JobStatus.CANCELLED),
        lambda: store.let_job_continue(job, [JobStatus.PAUSED]),
    ):
        with pytest.raises(ConflictError, match="failed"):
            refused()
    again = store.let_job_continue(job, [JobStatus.FAILED, JobStatus.CANCELLED])
    assert (again.status, again.finished, again.message, again.attempt) == (JobStatus.QUEUED, None, "", 2)
    with pytest.raises(NotFoundError):
        store.ask_of_job("ftjob-nope", JobStatus.CANCELLED)


def test_jobs_of_earlier_releases_are_left_alone(store, clock):
    cluster = Cluster()
    old = store.create_job("acme", "voice", {})
    assert Controller(store, cluster, clock=clock).round() == 0
    assert (store.get_job(old.id).lease_owner, cluster.states) == (None, {})
    with pytest.raises(ConflictError, match="this release's queue"):
        store.let_job_continue(old.id, [JobStatus.QUEUED])


def test_a_cluster_that_is_away_costs_no_job(store, clock):
    cluster = Cluster()
    controller = Controller(store, cluster, clock=clock)
    job = queued(store)
    controller.round()
    cluster.away = True
    with pytest.raises(UnavailableError):
        controller.round()
    cluster.away = False
    clock.now += 3600
    controller.round()
    assert (store.get_job(job).attempt, store.get_job(job).submission_id) == (1, job)


def test_another_controller_takes_over_when_a_lease_has_run_out_and_the_first_then_changes_nothing(store, clock):
    cluster = Cluster()
    first, second = (Controller(store, cluster, clock=clock) for _ in range(2))
    job = queued(store)
    first.round()
    stale = store.get_job(job)
    second.round()
    assert store.get_job(job).lease_owner == first.owner
    clock.now += LEASE_S + 1
    second.round()
    held = store.get_job(job)
    assert (held.lease_owner, held.fence) == (second.owner, stale.fence + 1)
    assert not store.requeue_job(stale, "lost")
    assert not store.end_job(stale, JobStatus.FAILED, "lost")
    assert store.get_job(job) == held
    second.close()
    first.round()
    assert store.get_job(job).lease_owner == first.owner, "what was given up can be had at once"


def test_of_two_controllers_that_see_the_same_free_place_one_fills_it(store, clock):
    cluster = Cluster({"CPU": 1.0})
    one, two = queued(store), queued(store, "globex")
    now = clock()
    first = store.lease_jobs("first", now, now + LEASE_S)
    assert store.start_job(first.jobs[0], one, first.starts)
    assert not store.start_job(first.jobs[1], two, first.starts), "it was counted before the first start"
    assert store.get_job(two).submission_id is None
    cluster.start(store.get_job(one), one)
    Controller(store, cluster, clock=clock).round()
    assert cluster.most == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_killed_every_job_ends_once(store, clock, seed):
    """Controllers come and go, drivers and clusters are lost, and drivers end, in an order drawn by chance."""
    chance = random.Random(seed)
    cluster = Cluster({"CPU": 3.0})
    jobs = [queued(store, chance.choice(["acme", "globex"])) for _ in range(12)]
    controllers = [Controller(store, cluster, clock=clock) for _ in range(2)]
    finished: dict[str, int] = dict.fromkeys(jobs, 0)
    for _ in itertools.repeat(None, 3000):
        clock.now += chance.choice([0.5, 5, 40])
        match chance.randrange(8):
            case 0:
                controllers[chance.randrange(2)] = Controller(store, cluster, clock=clock)  # one was killed
            case 1 if chance.random() < 0.1:
                cluster.states.clear()
            case 2 | 3:
                alive = [name for name, state in cluster.states.items() if not state.final]
                for job_id in jobs:
                    job = store.get_job(job_id)
                    if job.submission_id in alive and chance.random() < 0.3:
                        if chance.random() < 0.2:
                            cluster.states[job.submission_id] = JobStatus.FAILED
                        else:
                            ends(store, cluster, job_id)
                            finished[job_id] += 1
            case _:
                controllers[chance.randrange(2)].round()
        if all(store.get_job(job).status.final for job in jobs):
            break
    assert all(store.get_job(job).status.final for job in jobs)
    assert all(count == (store.get_job(job).status == JobStatus.SUCCEEDED) for job, count in finished.items())
    assert cluster.most <= 3


def test_a_job_that_was_looked_at_twice_is_not_sent_back(store):
    made = store.ask_for_job("acme", "voice", {}, key_id="key_1")
    leased = store.lease_jobs("controller", 0.0, LEASE_S)
    (job,) = leased.jobs
    assert store.accept_job(job)
    assert store.start_job(store.get_job(made.id), made.id, leased.starts)
    store.update_job(made.id, status=JobStatus.RUNNING, attempt=1)
    assert not store.accept_job(job)
    assert not store.end_job(job, JobStatus.FAILED, "its file is gone", only=JobStatus.VALIDATING)
    assert store.get_job(made.id).status == JobStatus.RUNNING


def said(store, job_id):
    return [event.message for event in reversed(store.list_job_events(job_id))]


def test_an_end_is_told_with_the_end_and_so_once(store):
    paused, failed = queued(store), queued(store)
    store.ask_of_job(paused, JobStatus.PAUSED)
    store.ask_of_job(paused, JobStatus.CANCELLED)
    for _ in range(2):
        store.update_job(failed, status=JobStatus.FAILED, message="bad rows")
    assert said(store, paused) == ["The job was paused", "The job was cancelled"]
    assert said(store, failed) == ["bad rows"]
    assert store.list_job_events(failed)[0].level == "error"


def test_of_the_same_said_once_there_is_one(store):
    job = queued(store)
    for _ in range(2):
        store.add_job_event(job, "Validating training file: file-1", once=True)
    store.add_job_event(queued(store), "Validating training file: file-1", once=True)
    assert said(store, job) == ["Validating training file: file-1"]


def test_a_tenant_has_no_more_open_jobs_than_it_may_and_asking_again_is_no_other_job(store):
    sent = Idempotency("k1", "digest")

    def ask(tenant="acme", idempotency=None):
        return store.ask_for_job(tenant, "voice", {}, key_id="key_1", idempotency=idempotency, most_open=2).id

    first = ask(idempotency=sent)
    ask()
    with pytest.raises(RateLimitError, match="2 of your fine-tuning jobs") as refused:
        ask()
    assert refused.value.retry_after_s is None
    assert ask(idempotency=sent) == first
    ask("globex")
    store.ask_of_job(first, JobStatus.CANCELLED)
    ask()


@pytest.mark.parametrize("name", ["n", 'a"b', "a'b", "a.b[0]", "$.n", 'back\\slash"', "ü"])
def test_jobs_are_found_by_labels_whatever_their_names_hold(store, name):
    wanted = store.ask_for_job("acme", "voice", {}, key_id="key_1", labels={name: "1", "other": "2"}).id
    store.ask_for_job("acme", "voice", {}, key_id="key_1", labels={name: "2", "other": "1"})
    store.ask_for_job("acme", "voice", {}, key_id="key_1")
    assert [job.id for job in store.list_jobs("acme", labels={name: "1"})] == [wanted]
    assert [job.id for job in store.list_jobs("acme", labels={name: "1", "other": "2"})] == [wanted]


def trained(store, tenant, hours, at):
    day = time.strftime("%Y-%m-%d", time.gmtime(at))
    store.add_training(f"ftjob-{tenant}-{at}", Usage(day=day, tenant=tenant, training_seconds=hours * 3600))


def test_jobs_of_a_tenant_whose_hours_of_training_are_used_up_wait_for_the_next_day_and_hold_up_nobody(store, clock):
    cluster = Cluster({"CPU": 8.0})
    controller = Controller(store, cluster, clock=clock)
    store.set_quota(tenant="acme", training_hours_per_day=2)
    trained(store, "acme", 1.9, clock())
    trained(store, "acme", 50, clock() - 86_400)  # yesterday
    trained(store, "globex", 50, clock())
    first, other = queued(store), queued(store, "globex")
    controller.round()
    assert store.get_job(first).submission_id == first, "a little is left"
    assert store.get_job(other).submission_id == other
    ends(store, cluster, first)
    trained(store, "acme", 0.1, clock() + 1)
    second, third = queued(store), queued(store, "globex")
    for _ in range(3):
        controller.round()
    waits = store.get_job(second)
    assert (waits.status, waits.submission_id) == (JobStatus.QUEUED, None)
    assert waits.message == (
        "waits: the day's budget of 2 hours of training is used up; it is renewed at 1970-01-13T00:00:00Z"
    )
    assert said(store, second) == [f"The job {waits.message}"]
    assert store.get_job(third).submission_id == third
    clock.now += 86_400
    controller.round()
    assert store.get_job(second).submission_id == second


def test_what_runs_counts_for_a_budget_of_training_with_all_its_workers(store, clock, monkeypatch):
    began = datetime.datetime(2026, 11, 10, tzinfo=datetime.UTC).timestamp()  # no month ends while it runs
    monkeypatch.setattr("pedro.store.job_queue.time", SimpleNamespace(**{**vars(time), "time": lambda: began}))
    cluster = Cluster({"CPU": 8.0})
    controller = Controller(store, cluster, clock=clock)
    store.set_quota(tenant="acme", training_hours_per_month=4)
    running = queued(store, workers=2)
    controller.round()
    store.update_job(running, status=JobStatus.RUNNING, attempt=1)
    assert store.get_job(running).started == began
    assert used_up(store, began + 1.9 * 3600) == {}
    assert "the month's budget of 4 hours" in used_up(store, began + 2.1 * 3600)["acme"]
    store.update_job(running, status=JobStatus.SUCCEEDED, attempt=1)
    assert used_up(store, began + 2.1 * 3600) == {}, "what an ended job trained stands in the ledger"


def test_a_budget_of_training_is_a_tenants_alone(store):
    key = store.create_key("acme", ("train",))[0]
    with pytest.raises(ConfigError, match="training_hours_per_day: is a limit of tenants"):
        store.set_quota(key_id=key.id, training_hours_per_day=1)


def test_claims_are_read_from_specs():
    assert Claim.of({}) == Claim(1, 1.0, 0.0)
    claim = Claim.of({"resources": {"workers": 2, "cpus_per_worker": 4, "gpus_per_worker": 1}})
    assert claim.total == {"CPU": 8.0, "GPU": 2.0}
    assert str(claim) == "2 times 4 CPU and 1 GPU"
    view = ClusterView({}, [{"CPU": 8.0, "GPU": 1.0}])
    assert not view.holds(claim)
    assert view.holds(replace(claim, workers=1))
    assert view.free([replace(claim, workers=1).total]) == {"CPU": 4.0, "GPU": 0.0}
