"""Sweeps over HTTP: a job with a section `sweep`, bounded, refused by field, recorded and started as any sweep is."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest
from fine_tuning_platform import ROWS, running_platform, upload
from gateway_backend import BACKBONE
from store_moves import stub_version

from pedro.store import JobKind, JobStatus
from pedro.training.dry_run_process import answer
from pedro.training.queue.launcher import Claim, driver_arguments
from pedro.training.sweep.records import Records, Trial, TrialState
from pedro.training.sweep.told import TrialEvents

SPACE = {"method.r": {"choice": [4, 8]}, "training.lr": {"loguniform": [1e-3, 1e-2]}}
SWEEP = {"space": SPACE, "search": {"trials": 6}, "scheduler": {"name": "asha", "grace_steps": 10}}


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    with running_platform(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def tenant(request) -> str:
    return f"t{zlib.crc32(request.node.name.encode())}"


@pytest.fixture
def client(platform, tenant):
    return platform.gateway.client(platform.gateway.key(tenant, ("train",)))


def ask(client, sweep, file="file-none", model=BACKBONE, **sections):
    method = {"type": "supervised", "pedro": {"training": {"max_steps": 40}, **sections, "sweep": sweep}}
    return client.fine_tuning.jobs.create(model=model, training_file=file, suffix="voice", method=method)


def test_a_sweep_is_made_looked_at_and_started_with_room_for_its_trials(platform, client, tenant):
    file = upload(client)
    made = ask(client, SWEEP, file)
    assert made.method.pedro["sweep"]["search"]["trials"] == 6
    platform.rounds()
    job = platform.store.get_job(made.id)
    assert (job.kind, job.status, job.spec["data"]["train"]) == (JobKind.SWEEP, JobStatus.QUEUED, file)
    assert client.fine_tuning.jobs.retrieve(made.id).training_file == file
    spec = Records(platform.settings.storage, made.id).spec()
    assert (spec.base.tenant, spec.base.adapter, spec.search.draws(spec.space)) == (tenant, "voice", 6)
    assert spec.base.data.train != file, "its data lie in the storage"
    assert platform.drivers.states[made.id] == JobStatus.RUNNING
    words = driver_arguments(job, platform.settings)
    assert words == ["pedro.training.sweep.job", "--sweep", made.id, "--attempt", "1", "--at-once", "4"]
    assert Claim.least(job).workers == 1
    client.fine_tuning.jobs.cancel(made.id)


def test_one_that_is_looked_at_twice_is_the_same_sweep(platform, client):
    job = platform.store.get_job(ask(client, SWEEP, upload(client)).id)
    spec = platform.drivers.prepare(job)
    assert platform.drivers.prepare(replace(job, spec=spec)) == spec, "as after a pause before its start"
    assert (spec["sweep"]["workers"], spec["sweep"]["at_once"]) == (1, 6)
    client.fine_tuning.jobs.cancel(job.id)


def test_its_driver_tells_of_each_trial_once(platform, client):
    made = ask(client, SWEEP, upload(client))
    platform.rounds()

    trials = [
        Trial(0, {"method.r": 4}, "run", TrialState.FINISHED, reports=((40, 1.25),)),
        Trial(1, {"method.r": 8}, "run", TrialState.FAILED, message="it diverged"),
        Trial(2, {"method.r": 8}, "run"),
    ]
    records = Records(platform.settings.storage, made.id)
    tracker = SimpleNamespace(records=records, trials=trials, planner=SimpleNamespace(total=6))
    for _ in range(2):  # of another driver, too
        TrialEvents(tracker, platform.store).tell()
    events = [event for event in client.fine_tuning.jobs.list_events(made.id) if event.message.startswith("Trial")]
    assert [event.message for event in events] == [
        "Trial 1 failed: it diverged (method.r=8)",
        "Trial 0 finished: validation loss 1.2500 (method.r=4)",
    ]
    assert [event.type for event in events] == ["message", "metrics"]
    assert events[1].data == {
        "trial": 0, "trials": 6, "state": "finished", "step": 40, "valid_loss": 1.25, "parameters": {"method.r": 4},
    }  # fmt: skip
    trials[1] = replace(trials[1], state=TrialState.LOST, message="x" * 3000)
    told = TrialEvents(tracker, platform.store)
    told.tell()
    trials[2] = replace(trials[2], state=TrialState.LOST, message="x" * 3000)
    told.tell()
    trials[2] = replace(trials[2], state=TrialState.FINISHED, attempt=2, message="", reports=((40, 1.5),))
    for telling in (told, TrialEvents(tracker, platform.store)):
        telling.tell()
    last, before = [event.message for event in client.fine_tuning.jobs.list_events(made.id, limit=2).data]
    assert last == "Trial 2 finished: validation loss 1.5000 (method.r=8)", "one that was lost and run again"
    assert before.startswith("Trial 2 lost: xxx")
    client.fine_tuning.jobs.cancel(made.id)


@pytest.mark.parametrize(
    ("sweep", "field", "said"),
    [
        ({}, "space", "required"),
        ([], "", "expected"),
        ({"space": {}}, "space", "at least 1"),
        ({"space": SPACE, "trials": 9}, "trials", "unknown key"),
        ({"space": {"training.lr": {"loguniform": [0, 1]}}}, "space.training.lr", "more than 0"),
        ({"space": {"training.lr": {"between": [0, 1]}}}, "space.training.lr", "not a kind of search space"),
        ({"space": {"training.lr": 3}}, "space.training.lr", "expected one of"),
        ({"space": {"data.train": {"choice": ["/etc/passwd"]}}}, "space.data.train", "cannot vary"),
        ({"space": {"backbone": {"choice": ["a", "b"]}}}, "space.backbone", "cannot vary"),
        ({"space": {"resources.workers": {"grid": [1, 99]}}}, "space.resources.workers", "cannot vary"),
        ({"space": {"method.name": {"grid": ["lora", "full"]}}}, "space.method.name", "one method"),
        ({"space": {"method.a.b": {"grid": [1, 2]}}}, "space.method.a.b", "cannot vary"),
        ({"space": {"method.r": {"grid": list(range(1, 66))}}}, "space.method.r", "at most 64"),
        ({"space": {f"training.k{n}": {"grid": [1, 2]} for n in range(17)}}, "space", "at most 16"),
        ({"space": SPACE, "search": {"trials": 101}}, "search.trials", "may have 100"),
        ({"space": SPACE, "search": {"trials": 10**9}}, "search.trials", "expected"),
        ({"space": {"method.r": {"grid": [1, 2]}, **{f"training.k{n}": {"grid": [*range(64)]} for n in range(15)}}},
         "search.trials", "trials, but a sweep over HTTP"),
        ({"space": SPACE, "search": {"algorithm": "grid"}}, "space.training.lr", "no list of values"),
        ({"space": {"method.r": {"choice": [4, 8]}}, "search": {"trials": 9}}, "search.trials", "holds about 2"),
        ({"space": {"method.r": {"grid": [4]}}, "search": {"algorithm": "optuna"}}, "space.method.r", "optuna chooses"),
        ({"space": SPACE, "concurrency": 0}, "concurrency", "expected"),
        ({"space": SPACE, "name": "../x"}, "name", "match"),
        ({"space": SPACE, "scheduler": {"reduction": 1.0001}}, "scheduler.reduction", "1.1"),
        ({"space": {"training.lr": {"uniform": [0, 10**400]}}}, "space.training.lr", "two numbers"),
        ({"space": {"training.lr": {"uniform": ["0", "1e999"]}}}, "space.training.lr", "two numbers"),
    ],
)  # fmt: skip
def test_a_space_that_is_none_is_refused_at_once_by_its_field(platform, client, tenant, sweep, field, said):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, sweep)
    assert refused.value.param == f"method.pedro.sweep.{field}".rstrip("."), refused.value.message
    assert said in refused.value.message
    assert not platform.store.list_jobs(tenant)


def test_a_section_without_bounds_is_refused_before_it_is_looked_at(client):
    with pytest.raises(openai.BadRequestError, match="at most 65,536 characters") as refused:
        ask(client, {"space": {f"training.k{n}": {"between": [1, 2]} for n in range(20_000)}})
    assert refused.value.param == "method.pedro"


def test_no_trial_names_anything_of_the_host(client):
    space = {"method.init_path": {"choice": ["/etc/passwd", "x"]}}
    with pytest.raises(openai.BadRequestError, match="may refer to the host"):
        ask(client, {"space": space, "search": {"trials": 2}}, method={"peft_type": "LORA"})


def test_a_fine_tuned_model_goes_on_as_it_was_trained(platform, client, tenant):
    trained = {"method": {"name": "lora", "r": 4}}
    version = replace(stub_version(1, f"{tenant}.base"), spec=trained, backbone_id=BACKBONE)
    platform.store.add_version(version, platform.store.made_of(f"{tenant}.base"))
    with pytest.raises(openai.BadRequestError, match="trials start from a model"):
        ask(client, SWEEP, upload(client), model=f"{tenant}.base:1")


def test_values_that_no_job_can_have_fail_it_by_their_field(platform, client):
    made = ask(client, {"space": {"training.batch_size": {"grid": [8, -1]}}}, upload(client))
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert (failed.status, failed.error.param) == ("failed", "method.pedro.sweep.space.training.batch_size")
    assert "training.batch_size" in failed.error.message
    made = ask(client, SWEEP, upload(client), data={"validation": 0})
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert (failed.error.param, "data.validation" in failed.error.message) == ("method.pedro.sweep", True)


def test_a_dry_run_counts_the_trials_and_looks_at_the_options(platform, client, tenant):
    file = client.files.create(file=("train.jsonl", io.BytesIO(ROWS)), purpose="fine-tune").id
    made = ask(client, SWEEP, file)
    fields = platform.store.get_job(made.id).spec
    report = answer(fields, platform.settings)["report"]
    assert report["sweep"]["trials"] == 6
    assert report["sweep"]["seconds_in_turn"] == pytest.approx(6 * report["seconds"], abs=0.1)
    space = {**SPACE, "method.width": {"choice": [1, 2]}}
    wrong = answer({**fields, "sweep": {**fields["sweep"], "space": space}}, platform.settings)["error"]
    assert wrong["param"] == "method.pedro.sweep.space.method.width"
    assert "width" in json.dumps(wrong["message"])
    client.fine_tuning.jobs.cancel(made.id)
