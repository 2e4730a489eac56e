"""The official openai client makes, follows and ends fine-tuning jobs, whose files a controller checks."""

from __future__ import annotations

import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest
from fine_tuning_platform import ROWS, running_platform, upload
from gateway_backend import BACKBONE
from gateway_server import serve
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from retention_home import execute
from store_moves import stub_version

from pedro.errors import ConflictError, UnavailableError
from pedro.gateway.app import GatewaySettings
from pedro.store import JobStatus
from pedro.training.curves import log_point
from pedro.training.job_events import metrics_event, step_metrics
from pedro.training.job_record import OwnRecord
from pedro.training.job_results import store_results
from pedro.training.loop import SECONDS_LEFT

OF_TYPE = "method.supervised.hyperparameters"
METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}}


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    with running_platform(tmp_path_factory.mktemp("home")) as running:
        yield running


def tenant_of(request) -> str:
    return f"t{zlib.crc32(request.node.name.encode())}"


@pytest.fixture
def client(platform, request):
    """A tenant of the test's own."""
    return platform.gateway.client(platform.gateway.key(tenant_of(request), ("train",)))


def test_a_job_is_made_followed_to_its_end_and_its_metrics_read(platform, client, request):
    file = upload(client)
    made = client.fine_tuning.jobs.create(
        model=BACKBONE, training_file=file, suffix="My Voice", seed=7, method=METHOD, metadata={"team": "a"}
    )
    assert set(made.model_dump()) >= set(FineTuningJob.model_fields)
    assert (made.status, made.model, made.training_file, made.seed) == ("validating_files", BACKBONE, file, 7)
    assert made.metadata == {"team": "a"}
    assert (made.hyperparameters.n_epochs, made.hyperparameters.batch_size) == (2, 4)
    platform.rounds()
    spec = json.loads((platform.gateway.storage / "jobs" / made.id / "spec.json").read_text())
    assert (spec["tenant"], spec["adapter"], spec["backbone"]) == (tenant_of(request), "my-voice", "stories260K")
    assert (spec["training"]["epochs"], spec["training"]["batch_size"], spec["training"]["seed"]) == (2, 4, 7)
    assert platform.drivers.states[made.id] == JobStatus.RUNNING
    platform.succeed(made.id)
    done = client.fine_tuning.jobs.retrieve(made.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", f"{tenant_of(request)}.my-voice:1")
    assert done.finished_at >= done.created_at
    assert done.trained_tokens == 640
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(made.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (2, done.fine_tuned_model)
    assert checkpoint.metrics.model_dump() == {
        "step": 2,
        "train_loss": 1.5,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 1.25,
        "valid_mean_token_accuracy": 0.75,
        "full_valid_loss": 1.25,
        "full_valid_mean_token_accuracy": 0.75,
    }
    (result_file,) = done.result_files
    assert client.files.content(result_file).text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", "1,2.5,0.5,,", "2,1.5,,1.25,0.75",
    ]  # fmt: skip
    assert [file.id for file in client.files.list(purpose="fine-tune-results")] == [result_file]


def test_a_job_that_runs_tells_when_it_should_end(platform, client):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client)).id
    platform.rounds()
    registry = SimpleNamespace(store=platform.store, log_metrics=lambda *_: None)
    log_point(registry, "run", made, 1, {"train/loss": 2.5, SECONDS_LEFT: 100.0})
    assert client.fine_tuning.jobs.retrieve(made).estimated_finish is None, "it has not begun"
    platform.store.update_job(made, status=JobStatus.RUNNING, attempt=1)
    before = int(time.time())
    log_point(registry, "run", made, 2, {"train/loss": 2.0, SECONDS_LEFT: 100.0})
    assert before + 100 <= client.fine_tuning.jobs.retrieve(made).estimated_finish <= int(time.time()) + 100
    platform.succeed(made)
    assert client.fine_tuning.jobs.retrieve(made).estimated_finish is None


def test_events_come_newest_first_in_pages_and_by_what_is_new(platform, client):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client))
    platform.rounds()
    platform.succeed(made.id)
    page = client.fine_tuning.jobs.list_events(made.id, limit=3)
    assert page.has_more
    events = list(page)  # the client turns the pages
    assert set(events[0].model_dump()) == set(FineTuningJobEvent.model_fields)
    assert [event.message for event in reversed(events)] == [
        f"Created fine-tuning job: {made.id}",
        f"Validating training file: {made.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1: training loss=2.5000, training mean token accuracy=0.5000",
        "Step 2: training loss=1.5000",
        "Step 2: validation loss=1.2500, validation mean token accuracy=0.7500",
        f"New fine-tuned model created: {client.fine_tuning.jobs.retrieve(made.id).fine_tuned_model}",
        "The job has successfully completed",
    ]
    metrics = [event for event in events if event.type == "metrics"]
    assert metrics[0].data == {"step": 2, "valid_loss": 1.25, "valid_mean_token_accuracy": 0.75}
    with pytest.raises(openai.NotFoundError, match="after"):
        client.fine_tuning.jobs.list_events(made.id, after="ftevent-x")


def test_bad_rows_fail_the_job_with_their_line(platform, client):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client, ROWS + b'{"prompt": 1}\n'))
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert (failed.status, failed.error.param) == ("failed", "training_file")
    assert "line 21" in failed.error.message
    assert client.fine_tuning.jobs.list_events(made.id).data[0].level == "error"
    assert made.id not in platform.drivers.states


def test_a_spec_that_is_wrong_fails_with_its_mistakes(platform, client):
    method = {"type": "supervised", "pedro": {"method": {"name": "pedro"}, "training": {"lrr": 1}}}
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method)
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert failed.status == "failed"
    assert "training.lrr: unknown key" in failed.error.message


@pytest.mark.parametrize("training", [{"lr": "fast"}, {"lr": None}, {"lr": 10**400}, {"seed": "x"}, {"epochs": []}])
def test_a_value_that_is_no_number_fails_its_job_and_leaves_the_list_readable(platform, client, training):
    method = {"type": "supervised", "pedro": {"training": training}}
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method)
    platform.rounds()
    (failed,) = client.fine_tuning.jobs.list()
    assert (failed.id, failed.status) == (made.id, "failed")
    assert f"training.{next(iter(training))}" in failed.error.message


@pytest.mark.parametrize(
    ("fields", "training"),
    [
        ({"hyperparameters": {"learning_rate_multiplier": 2}}, {"lr": 0.1}),
        ({"hyperparameters": {"n_epochs": 2}}, {"epochs": 3}),
        ({"hyperparameters": {"batch_size": 2}}, {"batch_size": 3}),
        ({"seed": 1}, {"seed": 2}),
    ],
)
def test_a_hyperparameter_that_is_given_twice_is_refused(client, fields, training):
    method = {"type": "supervised", "pedro": {"training": training}}
    with pytest.raises(openai.BadRequestError, match="also given as a field"):
        client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method, **fields)


def test_a_key_held_to_some_adapters_sees_and_ends_jobs_of_those_alone(platform, client, request):
    file, tenant = upload(client), tenant_of(request)
    mine, other = (
        client.fine_tuning.jobs.create(model=BACKBONE, training_file=file, suffix=name).id for name in ("mine", "other")
    )
    platform.store.add_version(stub_version(1, f"{tenant}.mine"), None)
    held = platform.gateway.client(
        platform.store.create_key(tenant, ("train",), adapters=("mine",))[1]
    ).fine_tuning.jobs
    assert [job.id for job in held.list(limit=1)] == [mine]
    assert held.retrieve(mine).id == mine
    for ask in (held.retrieve, held.cancel, held.pause, held.resume, held.list_events, held.checkpoints.list):
        with pytest.raises(openai.NotFoundError):
            ask(other)
    assert client.fine_tuning.jobs.retrieve(other).status == "validating_files"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"training_file": "file-nope"}, "training_file"),
        *(({"model": name}, "model") for name in ("/models/x", "../x", "https://host/x", "os.path", "")),
        *(({"training_file": name}, "training_file") for name in ("/etc/passwd", "s3://b/x", "pedro://demo/acme", "")),
        ({"validation_file": "https://host/rows.jsonl"}, "validation_file"),
        ({"suffix": "…"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        *(
            ({"method": {"type": "supervised", "supervised": {"hyperparameters": {name: value}}}}, f"{OF_TYPE}.{name}")
            for name, values in (
                ("n_epochs", (0, -1, 10**9, "many", True)),
                ("batch_size", (0, 1.5, 10**9, "many", True)),
                ("learning_rate_multiplier", (0, -1, 10**9, "fast", True)),
            )
            for value in values
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "supervised", "pedro": {"data": {"test": "/etc/passwd"}}}}, "method.pedro.data.test"),
        ({"method": {"type": "supervised", "pedro": {"data": {"train": "file-x"}}}}, "method.pedro.data.train"),
        ({"method": {"type": "supervised", "pedro": {"backbone": "/models/x"}}}, "method.pedro"),
        ({"method": {"type": "supervised", "pedro": {"tenant": "globex"}}}, "method.pedro"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_at_once(client, fields, param):
    asked = {"model": BACKBONE, "training_file": upload(client), **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(**asked)
    assert refused.value.param == param, refused.value.message
    assert list(client.fine_tuning.jobs.list()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "gpt2"},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "LORA", "corda_config": {"cache_file": "covariance.pt"}},
        {"peft_type": "LORA", "init_lora_weights": "~/weights"},
        {"name": "peft", "peft_type": "LORA", "target_modules": ["q_proj", "../x"]},
    ],
)
def test_no_option_of_a_method_names_anything_of_the_host(client, options):
    method = {"type": "supervised", "pedro": {"method": options}}
    with pytest.raises(openai.BadRequestError, match="cannot be set over HTTP"):
        client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method)


def test_preferences_are_learnt_by_a_job_of_type_dpo(platform, client):
    pairs = b"".join(
        json.dumps(
            {
                "input": {"messages": [{"role": "user", "content": f"q{n}"}]},
                "preferred_output": [{"role": "assistant", "content": "yes"}],
                "non_preferred_output": [{"role": "assistant", "content": "no"}],
            }
        ).encode()
        + b"\n"
        for n in range(20)
    )
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 3}}}
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client, pairs), method=method)
    assert (made.method.type, made.method.dpo.hyperparameters.beta) == ("dpo", 0.2)
    platform.rounds()
    spec = json.loads((platform.gateway.storage / "jobs" / made.id / "spec.json").read_text())
    assert (spec["objective"], spec["dpo"]["beta"], spec["training"]["epochs"]) == ("dpo", 0.2, 3)
    assert made.id in platform.drivers.states
    rows = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method)
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(rows.id)
    assert (failed.status, failed.error.param) == ("failed", "training_file")


def test_a_job_goes_on_from_a_model_of_its_tenants(platform, client, request):
    tenant, method = tenant_of(request), {"name": "lora", "r": 4}
    for owner in (tenant, "rival"):
        version = replace(stub_version(1, f"{owner}.voice"), backbone_id="stories260K", spec={"method": method})
        platform.store.add_version(version, None)
        platform.store.promote(version.name, 1)
    file = upload(client)
    made = client.fine_tuning.jobs.create(model=f"{tenant}.voice", training_file=file, suffix="voice")
    assert made.model == f"{tenant}.voice:1"
    platform.rounds()
    spec = json.loads((platform.gateway.storage / "jobs" / made.id / "spec.json").read_text())
    assert (spec["parent"], spec["method"], spec["backbone"]) == (made.model, method, "stories260K")
    other = {"type": "supervised", "pedro": {"method": {"name": "pedro"}}}
    with pytest.raises(openai.BadRequestError, match="keeps its method"):
        client.fine_tuning.jobs.create(model=f"{tenant}.voice:1", training_file=file, method=other)
    with pytest.raises(openai.BadRequestError, match="give the backbone"):
        client.fine_tuning.jobs.create(model=f"{tenant}.voice", training_file=file, method={"type": "dpo"})
    said = []
    for named in ("rival.voice", "rival.none", f"{tenant}.none"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(model=named, training_file=file)
        said.append(str(refused.value).replace(named, "NAME"))
    assert len(set(said)) == 1
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.create(
            model=BACKBONE, training_file=file, method={"type": "supervised", "pedro": {"parent": "rival.voice"}}
        )


def test_a_model_that_was_deleted_while_its_job_waited_fails_it(platform, client, request):
    name = f"{tenant_of(request)}.voice"
    version = replace(stub_version(1, name), backbone_id="stories260K", spec={"method": {"name": "lora"}})
    platform.store.add_version(version, None)
    made = client.fine_tuning.jobs.create(model=f"{name}:1", training_file=upload(client))
    with pytest.raises(ConflictError, match=made.id):
        platform.store.delete_version(name, 1)
    execute(platform.settings, "DELETE FROM pedro_versions WHERE tenant = ?", tenant_of(request))
    platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert (failed.status, failed.error.code, failed.error.param) == ("failed", "model_not_found", "model")
    assert made.id not in platform.drivers.states


def test_jobs_are_listed_in_pages_newest_first_and_by_metadata(client):
    file = upload(client)
    made = [
        client.fine_tuning.jobs.create(model=BACKBONE, training_file=file, metadata={"n": str(n % 2)}).id
        for n in range(5)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[3], made[1]]
    odd = {'say "hi"': "it's"}
    quoted = client.fine_tuning.jobs.create(model=BACKBONE, training_file=file, metadata=odd)
    assert [job.id for job in client.fine_tuning.jobs.list(metadata=odd)] == [quoted.id]
    assert list(client.fine_tuning.jobs.list(metadata={'say "hi"': "no"})) == []


@pytest.mark.parametrize(
    "path",
    [
        "/%00",
        "/%00/events",
        "/{job}/events?after=ftevent-%00",
        "?after=%00",
        "?metadata[a]=%00",
        "?metadata[%00]=x",
    ],
)
def test_a_character_that_no_database_takes_is_no_fault_of_the_servers(client, path):
    job = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client)).id
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        client.get(f"/fine_tuning/jobs{path.format(job=job)}", cast_to=object)


def test_a_spec_that_is_too_long_is_refused(client):
    method = {"type": "supervised", "pedro": {"training": {"note": "x" * 70_000}}}
    with pytest.raises(openai.BadRequestError, match="65,536"):
        client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client), method=method)


def test_jobs_that_are_cancelled_before_they_were_looked_at_cost_the_others_no_round(platform, client):
    file = upload(client)
    made = [client.fine_tuning.jobs.create(model=BACKBONE, training_file=file).id for _ in range(3)]
    stranger = platform.gateway.client(platform.gateway.key("patient", ("train",)))
    theirs = stranger.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(stranger)).id
    platform.controller.round()
    assert theirs in platform.controller._looking, "one of each tenant is looked at"
    for job_id in made:
        client.fine_tuning.jobs.cancel(job_id)
    platform.rounds()
    assert platform.drivers.states[theirs] == JobStatus.RUNNING


def test_a_fault_of_ours_ends_the_job_that_met_it_and_no_other(platform, client, monkeypatch):
    def prepare(job):
        raise ZeroDivisionError("a secret of the host")

    broken = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client)).id
    with monkeypatch.context() as patch:
        patch.setattr(platform.drivers, "prepare", prepare)
        platform.rounds()
    failed = client.fine_tuning.jobs.retrieve(broken)
    assert (failed.status, failed.error.code) == ("failed", "internal_error")
    assert "secret" not in failed.error.message


def test_a_job_is_cancelled_paused_and_resumed(platform, client):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client))
    assert client.fine_tuning.jobs.pause(made.id).status == "paused"
    platform.rounds()
    assert made.id not in platform.drivers.states
    assert client.fine_tuning.jobs.resume(made.id).status == "validating_files", "nobody had looked at it yet"
    platform.rounds()
    driver = next(name for name in platform.drivers.states if name.startswith(made.id))
    platform.store.update_job(made.id, status=JobStatus.RUNNING)
    client.fine_tuning.jobs.cancel(made.id)
    platform.rounds()
    assert platform.drivers.states[driver] == JobStatus.CANCELLED
    assert client.fine_tuning.jobs.retrieve(made.id).status == "cancelled"
    for refused in (client.fine_tuning.jobs.resume, client.fine_tuning.jobs.pause):
        with pytest.raises(openai.ConflictError):
            refused(made.id)
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled", "again does no harm"


def test_a_sweep_is_a_job_of_its_tenant_too(platform, client, request):
    base = {"resources": {"workers": 1, "cpus_per_worker": 1}, "training": {"batch_size": 8}, "data": {"train": "/x"}}
    spec = {**base, "sweep": {"name": "rates", "workers": 1, "at_once": 2}}
    sweep = platform.store.create_job(tenant_of(request), "voice", spec, f"sweep-{tenant_of(request)}", queued=True).id
    (listed,) = client.fine_tuning.jobs.list()
    assert (listed.id, listed.status, listed.training_file) == (sweep, "queued", "")
    platform.rounds()
    assert client.fine_tuning.jobs.retrieve(sweep).hyperparameters.batch_size == 8
    client.fine_tuning.jobs.pause(sweep)
    platform.rounds()
    assert client.fine_tuning.jobs.resume(sweep).status == "queued"
    client.fine_tuning.jobs.cancel(sweep)
    assert client.fine_tuning.jobs.retrieve(sweep).status == "cancelled"
    assert "Fine-tuning job started" in [event.message for event in client.fine_tuning.jobs.list_events(sweep)]


def test_a_file_of_another_purpose_is_refused_by_its_field(client):
    batch, file = upload(client, purpose="batch"), upload(client)
    for fields, param in (
        ({"training_file": batch}, "training_file"),
        ({"training_file": file, "validation_file": batch}, "validation_file"),
    ):
        with pytest.raises(openai.BadRequestError, match='uploaded for "batch"') as refused:
            client.fine_tuning.jobs.create(model=BACKBONE, **fields)
        assert (refused.value.param, refused.value.code) == (param, "invalid_file_purpose")


def test_a_file_that_was_deleted_while_its_job_waited_fails_it(platform, client):
    file = upload(client)
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=file)
    client.files.delete(file)
    platform.rounds()
    assert client.fine_tuning.jobs.retrieve(made.id).status == "failed"


def test_an_idempotency_key_makes_one_job(platform, client):
    asked = {"model": BACKBONE, "training_file": upload(client), "suffix": "one"}
    header = {"Idempotency-Key": "k1"}
    first, again = (client.fine_tuning.jobs.create(**asked, extra_headers=header).id for _ in range(2))
    assert first == again
    assert len(list(client.fine_tuning.jobs.list())) == 1
    assert [event.message for event in client.fine_tuning.jobs.list_events(first)][-1].startswith("Created")
    with pytest.raises(openai.ConflictError, match="Idempotency-Key"):
        client.fine_tuning.jobs.create(**{**asked, "seed": 3}, extra_headers=header)


def test_of_many_that_ask_at_once_with_one_idempotency_key_there_is_one_job(client):
    asked = {"model": BACKBONE, "training_file": upload(client), "extra_headers": {"Idempotency-Key": "k2"}}
    with ThreadPoolExecutor(8) as pool:
        made = {job.id for job in pool.map(lambda _: client.fine_tuning.jobs.create(**asked), range(8))}
    assert made == {job.id for job in client.fine_tuning.jobs.list()}
    assert len(made) == 1


def test_an_idempotent_repeat_is_the_first_job_whatever_its_model_means_by_now(platform, client, request):
    name, store = f"{tenant_of(request)}.voice", platform.store
    for number in (1, 2):
        version = replace(stub_version(number, name), backbone_id="stories260K", spec={"method": {"name": "lora"}})
        store.add_version(version, store.made_of(name))
    store.promote(name, 1)
    asked = {"model": name, "training_file": upload(client), "extra_headers": {"Idempotency-Key": "k1"}}
    first = client.fine_tuning.jobs.create(**asked)
    store.promote(name, 2)
    client.files.delete(asked["training_file"])
    again = client.fine_tuning.jobs.create(**asked)
    assert (again.id, again.model) == (first.id, f"{name}:1")
    for changed in ({"model": f"{name}:1"}, {"metadata": {"a": "b"}}):
        with pytest.raises(openai.ConflictError, match="Idempotency-Key"):
            client.fine_tuning.jobs.create(**{**asked, **changed})


def test_too_many_open_jobs_of_a_tenant_are_a_429_of_openais_shape(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(backbones={BACKBONE: "stories260K"}, max_open_jobs=1)) as gateway:
        client = gateway.client(gateway.key("acme", ("train",)))
        file = upload(client)
        job = client.fine_tuning.jobs.create(model=BACKBONE, training_file=file)
        with pytest.raises(openai.RateLimitError) as refused:
            client.fine_tuning.jobs.create(model=BACKBONE, training_file=file)
        assert (refused.value.type, refused.value.code) == ("rate_limit_error", "rate_limit_exceeded")
        assert refused.value.response.headers["x-should-retry"] == "false"
        client.fine_tuning.jobs.cancel(job.id)
        assert client.fine_tuning.jobs.create(model=BACKBONE, training_file=file).status == "validating_files"


def test_without_a_storage_for_its_result_file_a_job_still_tells_its_end(platform, client, tmp_path):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client)).id
    platform.rounds()
    (tmp_path / "no-folder").write_text("")
    away = replace(platform.settings, storage=str(tmp_path / "no-folder"))
    told = []
    assert store_results(away, made, told.append) == []
    assert "result file could not be stored" in told[0]
    platform.store.update_job(made, status=JobStatus.RUNNING, attempt=1)
    own = OwnRecord(platform.settings.database_url, made, print, 1)
    own.succeeded({"model": "acme.voice:1", "metrics": {}, "result_files": []})
    platform.drivers.states[made] = JobStatus.SUCCEEDED
    messages = [event.message for event in client.fine_tuning.jobs.list_events(made)]
    assert messages[0] == "The job has successfully completed"
    assert client.fine_tuning.jobs.retrieve(made).status == "succeeded"


def test_a_storage_that_is_away_is_waited_for_without_saying_so_each_second(platform, client, monkeypatch):
    def away(job):
        raise UnavailableError("the storage does not answer")

    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client))
    with monkeypatch.context() as patch:
        patch.setattr(platform.drivers, "prepare", away)
        platform.rounds()
    assert client.fine_tuning.jobs.retrieve(made.id).status == "validating_files"
    platform.rounds()
    messages = [event.message for event in client.fine_tuning.jobs.list_events(made.id)]
    assert messages.count(f"Validating training file: {made.training_file}") == 1
    assert platform.drivers.states[made.id] == JobStatus.RUNNING


def test_a_key_held_to_an_adapter_trains_it_on_any_file_of_its_tenant(platform, client, request):
    tenant, file = tenant_of(request), upload(client)
    platform.store.add_version(stub_version(1, f"{tenant}.mine"), None)
    held = platform.gateway.client(platform.store.create_key(tenant, ("train",), adapters=("mine",))[1])
    made = held.fine_tuning.jobs.create(model=BACKBONE, training_file=file, suffix="mine")
    assert held.fine_tuning.jobs.retrieve(made.id).training_file == file
    with pytest.raises(openai.PermissionDeniedError):
        held.files.content(file)


def test_another_tenants_job_and_file_are_answered_like_unknown_ones(platform, client):
    made = client.fine_tuning.jobs.create(model=BACKBONE, training_file=upload(client))
    stranger = platform.gateway.client(platform.gateway.key("stranger", ("train",)))
    with pytest.raises(openai.BadRequestError) as foreign_file:
        stranger.fine_tuning.jobs.create(model=BACKBONE, training_file=made.training_file)
    with pytest.raises(openai.BadRequestError) as unknown_file:
        stranger.fine_tuning.jobs.create(model=BACKBONE, training_file="file-" + "0" * 24)
    assert str(foreign_file.value).replace(made.training_file, "") == str(unknown_file.value).replace(
        "file-" + "0" * 24, ""
    )
    jobs = stranger.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        said = []
        for job_id in (made.id, "ftjob-" + "0" * 24):
            with pytest.raises(openai.NotFoundError) as refused:
                ask(job_id)
            said.append(str(refused.value).replace(job_id, ""))
        assert said[0] == said[1]
    assert list(jobs.list()) == []
    with pytest.raises(openai.NotFoundError):
        jobs.list(after=made.id)


def test_a_key_that_may_only_infer_sees_no_job(platform, client):
    infer = platform.gateway.client(platform.gateway.key("acme", ("infer",)))
    with pytest.raises(openai.PermissionDeniedError, match="train"):
        infer.fine_tuning.jobs.list()


def test_a_repeated_step_counts_as_it_was_last():
    points = [{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": 1.0}, {"step": 1, "train_loss": 3.0}]
    assert step_metrics(points).splitlines()[1:] == ["1,3.0,,,", "2,1.0,,,"]
    assert metrics_event(1, {"train/loss": float("nan"), "system/memory_mb": 3.0}) is None
