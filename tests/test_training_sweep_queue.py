"""Sweeps in the queue: what they hold, how they end and go on, and that what they go on from stays."""

from __future__ import annotations

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from queue_cluster import Clock, Cluster, ends
from store_moves import stub_version
from training_runs import spec_for

from pedro.config import Settings
from pedro.errors import ConflictError, NotFoundError, TrainingError
from pedro.store import JobKind, JobStatus, Store
from pedro.training import submit
from pedro.training.queue.controller import Controller
from pedro.training.queue.launcher import Claim, driver_arguments
from pedro.training.sweep import job as sweep_job
from pedro.training.sweep import launch
from pedro.training.sweep.records import Records, SweepRecord
from pedro.training.sweep.spec import SweepSpec

EIGHT = {"CPU": 8.0}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Settings and store of a home whose queue has a controller elsewhere."""
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    store = Store(settings.database_url)
    monkeypatch.setattr(launch, "hand_over", lambda job_id, settings, store: None)
    monkeypatch.setattr(submit, "hand_over", lambda job_id, settings, store: None)
    yield settings, store
    store.close()


def sweep_for(folder, space=None, **changes):
    base = {**spec_for(folder).to_dict(), **changes.pop("base", {})}
    space = space or {"training.lr": {"grid": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]}}
    return SweepSpec.model_validate({"name": "rates", "base": base, "space": space, **changes})


def queued(store, tenant="globex", cpus=1.0):
    return store.create_job(tenant, "voice", {"resources": {"cpus_per_worker": cpus}}, queued=True).id


def held(store, job_id):
    return Claim.of(store.get_job(job_id).spec).total["CPU"]


def at_once(store, settings, job_id):
    words = driver_arguments(store.get_job(job_id), settings)
    return int(words[words.index("--at-once") + 1])


def test_a_sweep_waits_for_its_turn_and_then_holds_what_its_trials_take_at_once(home, tmp_path):
    settings, store = home
    cluster = Cluster(EIGHT)
    controller = Controller(store, cluster, clock=Clock())
    others = [queued(store, cpus=4.0), queued(store, cpus=4.0)]
    controller.round()
    workers = {"base": {"resources": {"workers": 2}}}
    sweep = launch.submit(sweep_for(tmp_path, concurrency=3, **workers), settings, store, priority=2)
    controller.round()
    job = store.get_job(sweep)
    assert (job.kind, job.priority, job.submission_id) == (JobKind.SWEEP, 2, None)
    assert job.message == "waits for 2 times 1 CPU to be free"
    for other in others:
        ends(store, cluster, other)
    controller.round()
    assert (held(store, sweep), at_once(store, settings, sweep)) == (6.0, 3)
    assert cluster.claims[sweep].total["CPU"] == 6.0
    late = queued(store, cpus=3.0)
    controller.round()
    assert store.get_job(late).message == "waits for 3 CPU to be free"
    ends(store, cluster, sweep)
    controller.round()
    assert store.get_job(late).submission_id == late


def test_without_a_bound_of_its_own_it_leaves_room_for_those_who_wait_and_begins_with_one_trial_at_least(
    home, tmp_path
):
    settings, store = home
    controller = Controller(store, Cluster(EIGHT), clock=Clock())
    sweep = launch.submit(sweep_for(tmp_path), settings, store, priority=1)
    waiting = [queued(store, cpus=3.0), queued(store, tenant="initech", cpus=2.0)]
    never = queued(store, cpus=99.0)
    controller.round()
    assert at_once(store, settings, sweep) == 3
    assert [store.get_job(job).submission_id for job in (*waiting, never)] == [*waiting, None]
    second = Controller(store, Cluster({"CPU": 1.0}), clock=Clock())
    controller.close()
    small = launch.submit(sweep_for(tmp_path, name="few"), settings, store, priority=9)
    store.update_job(sweep, status=JobStatus.RUNNING)
    store.update_job(sweep, status=JobStatus.SUCCEEDED)
    for job in (*waiting, never):
        store.ask_of_job(job, JobStatus.CANCELLED)
    second.round()
    second.round()
    assert at_once(store, settings, small) == 1


def test_its_trials_count_for_the_most_jobs_of_a_tenant(home, tmp_path):
    settings, store = home
    sweep = launch.submit(sweep_for(tmp_path), settings, store)
    Controller(store, Cluster(EIGHT), clock=Clock(), per_tenant=2).round()
    assert at_once(store, settings, sweep) == 2


def test_between_two_trials_nobody_takes_the_place_of_the_next(home, tmp_path):
    settings, store = home

    class BetweenTrials(Cluster):
        def look(self):
            view = super().look()
            mine = view.held.get(sweep, {"CPU": 0.0})["CPU"] / 2  # one of its two trials has ended just now
            return replace(view, taken={"CPU": view.taken["CPU"] - mine, "GPU": 0.0}, held={sweep: {"CPU": mine}})

    controller = Controller(store, BetweenTrials({"CPU": 2.0}), clock=Clock())
    sweep = launch.submit(sweep_for(tmp_path), settings, store)
    controller.round()
    assert held(store, sweep) == 2.0
    other = queued(store)
    controller.round()
    assert store.get_job(other).submission_id is None


def test_its_place_is_that_of_the_largest_trial(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    space = {"resources.workers": {"grid": [1, 3]}, "resources.cpus_per_worker": {"choice": [1, 2]}}
    fields = launch.job_spec(sweep_for(tmp_path, space, search={"algorithm": "grid"}), settings)
    assert (fields["resources"]["workers"], fields["resources"]["cpus_per_worker"]) == (3, 2)
    assert fields["sweep"] == {"name": "rates", "workers": 3, "at_once": 4}
    in_pods = replace(settings, launcher="kuberay")
    assert launch.job_spec(sweep_for(tmp_path), in_pods)["sweep"]["at_once"] == launch.AT_ONCE_IN_PODS


def test_a_lost_driver_is_started_again_with_the_room_that_there_is_then(home, tmp_path):
    settings, store = home
    clock, cluster = Clock(), Cluster({"CPU": 4.0})
    controller = Controller(store, cluster, clock=clock)
    sweep = launch.submit(sweep_for(tmp_path), settings, store)
    controller.round()
    store.update_job(sweep, status=JobStatus.RUNNING, attempt=1)
    assert at_once(store, settings, sweep) == 4
    cluster.states[sweep] = JobStatus.FAILED
    controller.round()
    cluster.nodes = ({"CPU": 2.0},)
    clock.now += 600
    controller.round()
    job = store.get_job(sweep)
    assert (job.attempt, job.submission_id) == (2, f"{sweep}-2")
    words = driver_arguments(job, settings)
    assert words == ["pedro.training.sweep.job", "--sweep", sweep, "--attempt", "2", "--at-once", "2"]


def test_it_is_paused_resumed_cancelled_and_retried_as_any_job(home, tmp_path):
    settings, store = home
    cluster = Cluster(EIGHT)
    controller = Controller(store, cluster, clock=Clock())
    spec = sweep_for(tmp_path)
    sweep = launch.submit(spec, settings, store)
    with pytest.raises(ConflictError, match=rf"--resume: {sweep} is queued"):
        launch.resume(spec, settings, store)
    for wanted, go_on in (
        (JobStatus.PAUSED, lambda: submit.resume(sweep, settings, store)),
        (JobStatus.CANCELLED, lambda: submit.resume(sweep, settings, store, after_failure=True)),
        (JobStatus.PAUSED, lambda: launch.resume(spec, settings, store)),
    ):
        controller.round()
        store.ask_of_job(sweep, wanted)
        controller.round()
        controller.round()
        assert store.get_job(sweep).status == wanted
        go_on()
    controller.round()
    assert store.get_job(sweep).submission_id == f"{sweep}-4"
    assert len(cluster.stopped) == 3


def test_resume_queues_one_that_has_ended_and_one_of_an_earlier_release(home, tmp_path):
    settings, store = home
    spec = sweep_for(tmp_path)
    sweep = launch.submit(spec, settings, store)
    store.update_job(sweep, status=JobStatus.RUNNING)
    store.update_job(sweep, status=JobStatus.SUCCEEDED, result={"gate": "passed"})
    assert launch.resume(spec, settings, store) == sweep
    job = store.get_job(sweep)
    assert (job.status, job.attempt, job.result) == (JobStatus.QUEUED, 2, None)
    old = sweep_for(tmp_path, name="old")
    record = launch.create(old, settings)
    records = Records(settings.storage, record.id)
    records._write("sweep.json", {"id": record.id, "spec": record.spec, "submissions": 2, "run_id": "run"})
    assert records.record() == SweepRecord(record.id, record.spec, "run")
    assert launch.resume(old, settings, store) == record.id
    assert store.get_job(record.id).kind == JobKind.SWEEP


def test_the_parent_of_a_sweep_stays_until_it_has_ended(home, tmp_path):
    settings, store = home
    for number in (1, 2):
        version = replace(stub_version(number, "acme.colours"), spec={"method": {"name": "lora", "r": 4}})
        store.add_version(version, store.made_of("acme.colours"))
    store.promote("acme.colours", 2)
    spec = sweep_for(tmp_path, base={"parent": "acme.colours:1", "method": {"name": "lora", "r": 4}})
    sweep = launch.submit(spec, settings, store)
    for delete in (lambda: store.delete_version("acme.colours", 1), lambda: store.delete_adapter("acme.colours")):
        with pytest.raises(ConflictError, match=f"{sweep} goes on from it"):
            delete()
    store.ask_of_job(sweep, JobStatus.CANCELLED)
    store.delete_version("acme.colours", 1)
    with pytest.raises(NotFoundError, match="was deleted meanwhile"):
        submit.resume(sweep, settings, store, after_failure=True)


def test_what_cannot_be_queued_leaves_no_records(home, tmp_path, monkeypatch):
    settings, store = home
    create = launch.create

    def create_and_erase(spec, settings):
        record = create(spec, settings)
        store.begin_erasure("acme")
        return record

    monkeypatch.setattr(launch, "create", create_and_erase)
    with pytest.raises(ConflictError, match="is being erased"):
        launch.submit(sweep_for(tmp_path), settings, store)
    assert list((tmp_path / "home" / "storage" / "sweeps").iterdir()) == [
        tmp_path / "home" / "storage" / "sweeps" / "by-spec"
    ]


def test_its_driver_enters_how_it_goes_and_its_follower_reads_it(home, tmp_path, monkeypatch, capsys):
    settings, store = home
    for name, value in settings.env().items():
        monkeypatch.setenv(name, value)
    sweep = launch.submit(sweep_for(tmp_path), settings, store)
    seen = {}

    def run(sweep_id, settings, registry, log, *, attempt, at_once):
        seen.update(sweep=sweep_id, attempt=attempt, at_once=at_once, status=store.get_job(sweep_id).status)
        log("6 trials to run, 2 at a time")
        told = {"model": "acme.colours:1", "gate": "passed", "best": {"metrics": {"best_step": 7}}, "trials": [{}]}
        return SimpleNamespace(to_dict=lambda: told)

    entered = []
    monkeypatch.setattr(sweep_job, "run_sweep", run)
    monkeypatch.setattr(sweep_job, "connect_driver", lambda **options: None)
    monkeypatch.setattr(sweep_job, "_enter_trials", lambda name, _: entered.append(store.get_job(name).status))
    monkeypatch.setattr(sweep_job.Registry, "open", lambda settings: None)
    words = shlex.split(f"--sweep {sweep} --attempt 1 --at-once 2")
    assert sweep_job.main(words) == 0
    assert entered[0] == JobStatus.RUNNING, "what was trained stands in the ledger before the end is told"
    assert seen == {"sweep": sweep, "attempt": 1, "at_once": 2, "status": JobStatus.RUNNING}
    lines = []
    job = submit.until_end(sweep, settings, store, lines.append)
    assert lines == ["6 trials to run, 2 at a time"]
    assert (job.status, job.result["model"], "trials" in job.result) == (JobStatus.SUCCEEDED, "acme.colours:1", False)
    assert launch.result_of(job, settings)["trials"] == []
    assert any(event.message.startswith("New fine-tuned model") for event in store.list_job_events(sweep))
    capsys.readouterr()

    def broken(*_arguments, **_options):
        raise TrainingError("none of its 6 trials finished")

    monkeypatch.setattr(sweep_job, "run_sweep", broken)
    other = launch.submit(sweep_for(tmp_path, name="other"), settings, store)
    assert sweep_job.main(["--sweep", other, "--attempt", "1"]) == 1
    with pytest.raises(TrainingError, match="none of its 6 trials"):
        submit.until_end(other, settings, store)
