"""The Train page: a file is checked, a job is estimated, started once, watched, and its result can be asked."""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from dataclasses import replace
from typing import NamedTuple

import pytest
from dashboard_app import healthy, opener, words
from gateway_backend import BACKBONE
from gateway_server import serve

from components.file_report import LEARNT
from pedro.backbone import EMBEDDED
from pedro.config import Settings
from pedro.errors import ConfigError
from pedro.gateway.app import GatewaySettings
from pedro.store import JobKind, JobStatus
from pedro.training.estimate import dry_run
from pedro.training.job_events import metrics_event
from pedro.training.spec import FineTuneSpec
from pedro.training.sweep.records import Trial, TrialState
from pedro.training.sweep.told import trial_event
from sources import sweep_space, training
from sources.gateway import GatewayClient, GatewayError
from sources.token_text import token_texts

ROWS = b"".join(
    json.dumps({"prompt": f"question {n}", "completion": "yes" if n % 3 else "no"}).encode() + b"\n" for n in range(30)
)
BAD = b'{"prompt": "a", "completion": "b"}\n{"prompt": 7, "completion": "b"}\n{"prompt": "a"\n'
PAIRS = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 20


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A gateway whose backbone this home keeps; its dry runs tell what was worked out once, by the real one."""
    home = tmp_path_factory.mktemp("train")
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    shutil.copytree(EMBEDDED / "stories260K", home / "backbones" / BACKBONE)
    (home / "train.jsonl").write_bytes(ROWS)
    data = {"train": str(home / "train.jsonl")}
    spec = FineTuneSpec.model_validate(
        {"tenant": "acme", "adapter": "my-rows", "backbone": "stories260K", "data": data}
    )
    report = dry_run(spec, calibrated=False).to_dict()
    report.pop("spec")
    (home / "report.json").write_text(json.dumps({"report": report}))
    told = {"trials": 6, "seconds_in_turn": 6 * report["seconds"]}
    (home / "sweep.json").write_text(json.dumps({"report": {**report, "sweep": told}}))
    answer = f"if grep -q sweep; then cat {home}/sweep.json; else cat {home}/report.json; fi"
    gateway = GatewaySettings(
        backbones={BACKBONE: BACKBONE}, storage=settings.storage, dry_run_command=("sh", "-c", answer)
    )
    with serve(home, settings=gateway) as running:
        yield running


class Tenant(NamedTuple):
    name: str
    key: str
    client: GatewayClient


@pytest.fixture
def tenant(served, request):
    """One of the test's own."""
    name = f"t{zlib.crc32(request.node.name.encode())}"
    key = served.store.create_key(name, ("train", "infer"))[1]
    return Tenant(name, key, GatewayClient(served.url, key))


@pytest.fixture
def page(served, monkeypatch):
    def open_page(key, **query):
        monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
        monkeypatch.setenv("PEDRO_ADMIN_KEY", key)
        return opener(monkeypatch, "train")(served.storage.parent, **query)

    return open_page


def choose(shown, content, name="My rows.jsonl"):
    shown.file_uploader[0].set_value((name, content, "application/jsonl"))
    return healthy(shown.run())


def press(shown, label):
    next(button for button in shown.button if button.label == label).click()
    return healthy(shown.run())


def labels(shown):
    return [button.label for button in shown.button]


def jobs_of(served, tenant):
    return served.store.list_jobs(tenant.name)


def files_of(tenant):
    return tenant.client.ask("GET", "/v1/files")["data"]


def tiles(shown):
    return {tile.label: tile.value for tile in shown.metric}


def asked(served, tenant):
    """A job that the API was asked for."""
    return served.store.ask_for_job(tenant.name, "voice", {"backbone": BACKBONE}, key_id="key_x")


def drive(served, job_id):
    """What a controller and a driver write down."""
    served.store.update_job(job_id, status=JobStatus.QUEUED)
    served.store.update_job(job_id, status=JobStatus.RUNNING, attempt=1)
    for step, values in ((1, {"train/loss": 2.5}), (2, {"train/loss": 1.5, "dev/loss": 1.25})):
        told = metrics_event(step, values)
        served.store.add_job_event(job_id, told.message, kind="metrics", data=told.data)


def test_from_a_file_to_a_chat_with_what_it_made(page, tenant, served):
    shown = choose(page(tenant.key), ROWS)
    assert "can be trained on" in words(shown.success)
    assert tiles(shown)["Rows"] == "30"
    assert tiles(shown)["Answer tokens"] != "–", "the backbone is here, so tokens are counted"
    assert {*shown.dataframe[0].value["answer"]} == {"yes", "no"}
    masked = "".join(html.proto.body for html in shown.get("html"))
    assert "line 1" in masked
    assert LEARNT in masked
    assert shown.text_input(key="train_adapter").value == "my-rows"
    assert not files_of(tenant), "a check sends nothing"
    shown.number_input(key="train_epochs").set_value(2.0)
    shown = press(shown, "Estimate")
    assert "about" in tiles(shown)["Time"]
    assert tiles(shown)["Memory"].endswith("MB")
    steps = int(tiles(shown)["Steps"])
    shown = press(shown, "Start training")
    (job,) = jobs_of(served, tenant)
    assert (job.adapter, job.spec["training"]["epochs"], job.spec["method"]["name"]) == ("my-rows", 2.0, "pedro")
    assert len(files_of(tenant)) == 1, "the file is uploaded once"
    assert "**checking files**" in words(shown.markdown)
    assert "Start training" not in labels(shown), "while it is watched no button starts another"
    drive(served, job.id)
    shown = healthy(shown.run())
    assert f"step 2 of {steps}" in "".join(bar.proto.text for bar in shown.get("progress"))
    assert "**training**" in words(shown.markdown)
    assert len(shown.get("vega_lite_chart")) == 1
    served.store.update_job(job.id, status=JobStatus.SUCCEEDED, result={"model": f"{job.name}:1"})
    shown = healthy(shown.run())
    links = {link.proto.label: link.proto for link in shown.get("page_link")}
    assert links[f"Chat with {job.name}:1"].query_string == f"model={job.name}%3A1"
    shown = press(shown, "Train another")
    assert shown.text_input(key="train_adapter").value == "my-rows", "what was chosen stays"
    assert shown.number_input(key="train_epochs").value == 2.0
    assert len(jobs_of(served, tenant)) == 1


def tell_trials(served, job_id):
    """What a sweep's driver tells of three of its six trials."""
    served.store.update_job(job_id, status=JobStatus.QUEUED)
    served.store.update_job(job_id, status=JobStatus.RUNNING, attempt=1)
    ended = (TrialState.FINISHED, 1.5), (TrialState.STOPPED, 2.5), (TrialState.FAILED, None)
    for number, (state, loss) in enumerate(ended):
        trial = Trial(number, {"method.r": 4 + number, "training.lr": 0.01}, "run", state, message="diverged")
        trial = replace(trial, reports=((20, loss),) if loss else ())
        message, data = trial_event(trial, 6)
        served.store.add_job_event(job_id, message, kind="metrics" if loss else "message", data=data)


def test_a_sweep_is_chosen_estimated_started_once_and_watched(page, tenant, served):
    shown = choose(page(tenant.key), ROWS)
    shown = healthy(shown.button_group(key="train_kind").select("sweep").run())
    assert "Start training" not in labels(shown)
    shown.multiselect(key="train_sweep_widths").set_value([4, 8])
    shown.number_input(key="train_sweep_trials").set_value(6)
    shown.number_input(key="train_steps").set_value(60)
    shown = press(shown, "Estimate")
    assert "6 of them take" in words(shown.caption)
    shown = press(shown, "Start the sweep")
    (job,) = jobs_of(served, tenant)
    assert job.kind == JobKind.SWEEP
    space = job.spec["sweep"]["space"]
    assert space["method.r"] == {"kind": "choice", "values": [4, 8]}
    assert space["method.orders"]["values"] == [[6, 5], [4, 3], [2, 1]]
    assert space["training.lr"] == {"kind": "loguniform", "values": [0.001, 0.03]}
    assert (job.spec["sweep"]["search"]["trials"], job.spec["sweep"]["scheduler"]["grace_steps"]) == (6, 20)
    assert job.spec["training"]["eval_every"] == 20
    assert "**checking files**" in words(shown.markdown)
    tell_trials(served, job.id)
    shown = healthy(shown.run())
    assert "3 of 6 trials have ended" in "".join(bar.proto.text for bar in shown.get("progress"))
    assert "Trial 0 finished: validation loss 1.5000 (method.r=4" in shown.code[0].value
    assert "Trial 2 failed: diverged" in shown.code[0].value
    assert len(shown.get("vega_lite_chart")) == 1
    links = {link.proto.label: link.proto for link in shown.get("page_link")}
    assert links["All trials, and what each parameter explains"].query_string == f"sweep={job.id}"
    served.store.update_job(job.id, status=JobStatus.SUCCEEDED, result={"model": f"{job.name}:1"})
    links = {link.proto.label for link in healthy(shown.run()).get("page_link")}
    assert f"Chat with {job.name}:1" in links


def test_a_space_that_is_none_is_told_and_started_by_nobody(page, tenant, served):
    shown = choose(page(tenant.key), ROWS)
    shown = healthy(shown.button_group(key="train_kind").select("sweep").run())
    shown.number_input(key="train_sweep_from").set_value(0.5)
    shown = healthy(shown.run())
    assert "the lower bound is above the upper one" in words(shown.error)
    assert "Start the sweep" not in labels(shown)
    shown.number_input(key="train_sweep_to").set_value(0.5)
    shown.multiselect(key="train_sweep_widths").set_value([8])
    shown.multiselect(key="train_sweep_orders").set_value([])
    assert "Nothing varies" in words(healthy(shown.run()).error)
    shown.multiselect(key="train_sweep_widths").set_value([4, 8])
    shown = press(healthy(shown.run()), "Start the sweep")
    assert "param `method.pedro.sweep.search.trials`" in words(shown.caption), "eight trials of two widths"
    assert not jobs_of(served, tenant)


def test_what_varies_is_said_as_people_say_it():
    both = {"method.r": {"choice": [4, 8]}, "training.lr": {"loguniform": [1e-3, 1e-2]}}
    assert sweep_space.said({**both, "method.orders": {"choice": [[6, 5], [1, 0]]}}) == (
        "r, the learning rate and the orders"
    )
    assert sweep_space.said({"method.r": {"choice": [4]}}) == "nothing"
    assert sweep_space.whole_numbers(["8", 8, "wide"]) == [8, "wide"]
    unstopped = sweep_space.sweep(both, "random", 4, every=30, early=False)
    body = training.JobRequest("stories260K", "voice", sweep=unstopped).body("file-1")["method"]["pedro"]
    assert (body["training"]["eval_every"], body["sweep"]["scheduler"]) == (30, {"name": "none"})


def test_every_bad_line_is_told_and_nothing_can_be_started(page, tenant):
    shown = choose(page(tenant.key), BAD)
    assert "2 of its 3 lines cannot be read" in words(shown.error)
    assert [*shown.dataframe[0].value["line"]] == [2, 3]
    assert "prompt" in shown.dataframe[0].value["field"][0]
    assert "Start training" not in labels(shown)
    shown = choose(shown, ROWS, "other.jsonl")
    assert not shown.error
    assert shown.text_input(key="train_adapter").value == "other"


def test_what_the_api_refuses_is_told_as_it_says_it(page, tenant, served):
    shown = choose(page(tenant.key), ROWS)
    shown.text_input(key="train_adapter").set_value("…")
    shown = press(shown, "Start training")
    assert "suffix: expected letters, digits" in words(shown.error)
    assert "param `suffix` · code `invalid_value`" in words(shown.caption)
    shown.text_input(key="train_options").set_value("r 8")
    assert "as in `r: 8" in words(healthy(shown.run()).error)
    assert not jobs_of(served, tenant)
    shown.text_input(key="train_options").set_value("")
    shown.text_input(key="train_adapter").set_value("voice").run()
    tenant.client.ask("DELETE", f"/v1/files/{files_of(tenant)[0]['id']}")
    assert "code `file_not_found`" in words(press(shown, "Start training").caption)
    press(shown, "Start training")
    assert len(jobs_of(served, tenant)) == 1, "the next press uploads the file again"


def test_a_button_that_is_pressed_twice_makes_one_job(tenant, served):
    body = training.JobRequest(BACKBONE, "twice").body(training.upload(tenant.client, training.DataFile("a", ROWS)))
    first, again = (training.submit(tenant.client, body, "once") for _ in range(2))
    assert first["id"] == again["id"]
    assert training.submit(tenant.client, {**body, "seed": 1}, "once")["id"] != first["id"], "other settings: another"
    assert len(jobs_of(served, tenant)) == 2


def test_a_link_to_a_job_shows_it_to_its_tenant_alone_and_it_can_be_ended(page, tenant, served):
    job = asked(served, tenant)
    drive(served, job.id)
    assert "step 2" in "".join(bar.proto.text for bar in page(tenant.key, job=job.id).get("progress"))
    stranger = served.store.create_key("rival", ("train",))[1]
    for named in (job.id, "ftjob-none", "../files"):
        shown = page(stranger, job=named)
        assert len(shown.error) == 1
        assert tenant.name not in words([*shown.error, *shown.markdown, *shown.caption])
    waiting = asked(served, tenant)
    shown = press(page(tenant.key, job=waiting.id), "End it")
    assert served.store.get_job(waiting.id).status == JobStatus.CANCELLED
    assert "**cancelled**" in words(shown.markdown)


def test_a_failed_job_says_why(page, tenant, served):
    job = asked(served, tenant)
    told = {"error": {"code": "invalid_data", "param": "training_file"}}
    served.store.update_job(job.id, status=JobStatus.FAILED, message="line 3: prompt: expected text", result=told)
    shown = page(tenant.key, job=job.id)
    assert "line 3: prompt: expected text" in words(shown.error)
    assert "param `training_file` · code `invalid_data`" in words(shown.caption)


def test_events_are_asked_for_once_each(tenant, served):
    job = asked(served, tenant)
    for step in range(1, 251):
        told = metrics_event(step, {"train/loss": 1 / step})
        served.store.add_job_event(job.id, told.message, kind="metrics", data=told.data)
    first = training.events_since(tenant.client, job.id, [])
    assert [row["step"] for row in training.curve_rows(first)] == [*range(1, 251)]
    assert len({event["id"] for event in first}) == len(first)
    assert training.events_since(tenant.client, job.id, first) == []
    served.store.add_job_event(job.id, "more")
    assert [event["message"] for event in training.events_since(tenant.client, job.id, first)] == ["more"]


def test_files_of_every_kind_are_checked_and_preferences_are_learnt_by_dpo():
    for name, content in (
        ("rows.jsonl.gz", gzip.compress(ROWS)),
        ("rows.csv", b"prompt,completion\na,b\n"),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}]'),
    ):
        checked = training.check(training.DataFile(name, content), "stories260K", training.DataFile("v.jsonl", ROWS))
        assert checked.usable, name
        assert checked.masks
        assert not checked.preferences
    pairs = training.check(training.DataFile("p.jsonl", PAIRS), "not-here")
    assert pairs.usable
    assert pairs.preferences
    assert "`not-here`" in pairs.unmeasured
    packed = training.check(training.DataFile("rows.zip", b"PK\x03\x04"), "stories260K")
    assert "rows.zip' is a zip archive" in packed.problem, "the file is called what its reader calls it"
    body = training.JobRequest("b", "a", beta=0.2).body("file-1", "file-2")
    assert body["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    assert (body["training_file"], body["validation_file"]) == ("file-1", "file-2")


def test_tokens_are_shown_as_the_text_that_they_stand_for():
    assert token_texts(["<|im_start|>", "What", "Ġfilm", "ĠcafÃ©", "Ċ"]) == [
        "<|im_start|>",
        "What",
        " film",
        " café",
        "\n",
    ]
    assert token_texts(["▁play", "é"]) == [" play", "é"]


def test_names_and_options_are_read_as_people_write_them():
    assert training.adapter_name("My Rows.JSONL") == "my-rows"
    assert training.adapter_name("data.csv.gz") == "data"
    assert training.adapter_name("….jsonl") == "adapter"
    assert training.options_of("r: 8, targets: [q, v]") == {"r": 8, "targets": ["q", "v"]}
    for wrong in ("r", "r: 8}", "r: 8, r: 9"):
        with pytest.raises(ConfigError, match="options"):
            training.options_of(wrong)
    with pytest.raises(GatewayError):
        training.checked_id("../x")


def test_without_a_key_the_page_says_which_one_it_needs(page):
    assert "--scope train" in words(page("").info)
