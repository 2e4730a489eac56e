"""The dashboard's jobs: those of the records and of Ray, curves, logs, paging, ending one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from dashboard_app import DASHBOARD, healthy, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_jobs, add_running_job

from pedro import cli
from pedro.config import Settings
from pedro.registry import Registry
from pedro.store import Store


@pytest.fixture
def home(tmp_path):
    return copy_of_home(tmp_path / "home")


@pytest.fixture
def settings(home) -> Settings:
    return Settings.from_env({"PEDRO_HOME": str(home)})


@pytest.fixture
def jobs(monkeypatch):
    """The data functions, as the page imports them."""
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources import jobs

    return jobs


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "runs")


def told(job_id: str, status: str, **metadata: str) -> dict:
    """A job as the cluster lists it."""
    return {
        "id": job_id,
        "metadata": metadata,
        "status": status,
        "message": "",
        "started": time.time(),
        "ended": None,
    }


def test_a_running_job_shows_its_curves_its_best_value_and_can_be_chosen(page, home, settings):
    add_jobs(settings)
    add_running_job(settings)
    shown = page(home)
    live = shown.selectbox(key="live")
    assert [option.split(" · ")[0] for option in live.options] == ["acme.intents", "globex.topics"]
    assert "ftjob-live" in live.value
    assert len(shown.get("vega_lite_chart")) == 1
    assert "Best validation loss 0.0220 at step 100" in words(shown.caption)
    assert "no local Ray head runs" in words(shown.caption)
    healthy(live.select("ftjob-lost").run())
    assert "its cluster was ended" in words(shown.caption)


def test_ended_jobs_are_listed_with_what_became_of_them(page, home, settings):
    add_jobs(settings)
    shown = page(home)
    table = shown.dataframe[0].value
    assert list(table["status"]) == ["lost", "cancelled", "failed", "succeeded"]
    assert list(table["version"])[-1] == "acme.intents:2"
    assert "training.lr: the loss is NaN" in list(table["message"])
    healthy(shown.selectbox(key="status").select("failed").run())
    assert list(shown.dataframe[0].value["status"]) == ["failed"]


def test_filter_counts_and_rows_go_by_the_same_state(page, jobs, home, settings, monkeypatch):
    add_jobs(settings)
    add_running_job(settings)  # queued by its record
    cluster = {"ftjob-live": told("ftjob-live", "RUNNING"), "ftjob-lost": told("ftjob-lost", "FAILED")}
    monkeypatch.setattr(jobs, "ask_cluster", lambda settings: jobs.ClusterJobs(cluster, "http://ray"))
    running = page(home, status="running")
    assert list(running.dataframe[0].value["job"]) == ["ftjob-live"]
    assert "No such job." not in words(running.caption)
    assert "1 running" in words(running.caption)
    failed = page(home, status="failed")
    assert list(failed.dataframe[0].value["job"]) == ["ftjob-lost", "ftjob-1"]
    assert "1 to 2 of 2" in words(failed.caption)
    seen = [jobs.past_jobs(settings, "failed", 1, offset) for offset in (0, 1, 2)]
    assert [[job.id for job in part.jobs] for part in seen] == [["ftjob-lost"], ["ftjob-1"], []]
    assert "No such job." in words(page(home, status="queued").caption)


def test_jobs_that_were_lost_can_be_asked_for(page, home, settings):
    add_jobs(settings)
    shown = page(home, status="lost")
    assert list(shown.dataframe[0].value["job"]) == ["ftjob-lost"]
    assert "1 lost" in words(shown.caption)
    assert "running" not in words(shown.caption), "its record's word counts no more"


def test_a_job_that_succeeded_stays_so_when_its_cluster_is_gone(jobs, settings):
    add_jobs(settings)
    gone = jobs.past_jobs(settings)
    assert gone.cluster.gone
    assert {job.id: job.status for job in gone.jobs}["ftjob-0"] == "succeeded"


def test_the_open_row_stands_in_the_url_whatever_page_it_is_on(page, home, settings):
    add_jobs(settings)
    shown = page(home, job="ftjob-0", status="failed")
    assert shown.selectbox(key="job").value == "ftjob-0"
    assert "**succeeded**" in words(shown.markdown)
    linked = {link.proto.label: link.proto.query_string for link in shown.get("page_link")}
    assert linked["acme.intents:2"] == "adapter=acme.intents&version=2"
    assert linked["Chat with it"] == "model=acme.intents%3A2"
    healthy(shown.selectbox(key="job").select("ftjob-1").run())
    assert shown.query_params["job"] == "ftjob-1"
    shown = page(home, job="ftjob-nowhere")
    assert "Job `ftjob-nowhere`: not found" in words(shown.error)
    assert shown.selectbox(key="job").value is None


def test_a_sweeps_job_has_a_link_to_its_trials(page, home, settings):
    store = Store(settings.database_url)
    spec = {"sweep": {"name": "orders", "workers": 1, "at_once": 1}}
    job = store.create_job("acme", "intents", spec, "ftjob-of-many")
    store.close()
    shown = page(home, job=job.id)
    linked = {link.proto.label: link.proto.query_string for link in shown.get("page_link")}
    assert linked["Trials of this sweep"] == "sweep=ftjob-of-many"


def test_jobs_are_filtered_by_tenant_and_adapter(page, jobs, home, settings):
    add_jobs(settings)
    shown = page(home, tenant="globex")
    assert list(shown.dataframe[0].value["job"]) == ["ftjob-lost"]
    assert shown.selectbox(key="adapter").options == ["all", "topics"]
    healthy(shown.selectbox(key="tenant").select("acme").run())
    assert list(shown.dataframe[0].value["job"]) == ["ftjob-2", "ftjob-1", "ftjob-0"]
    assert "1 succeeded" in words(shown.caption)
    assert "lost" not in words(shown.caption)
    assert jobs.past_jobs(settings, "lost", tenant="acme").jobs == ()
    assert "Tenant `umbrella`: not found" in words(page(home, tenant="umbrella").error)


def test_a_running_job_tells_its_phase_its_steps_and_the_time_left(page, jobs, home, settings, monkeypatch):
    add_running_job(settings)
    Store(settings.database_url).update_job("ftjob-live", status="running", submission_id="ftjob-live")
    cluster = {"ftjob-live": told("ftjob-live", "RUNNING")}
    monkeypatch.setattr(jobs, "ask_cluster", lambda settings: jobs.ClusterJobs(cluster, "http://ray"))
    log = Path(settings.storage) / "jobs" / "ftjob-live" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text(
        "training 21,320 parameters on 1,400 rows, 300 steps\n"
        "step 120/300 · loss 0.512 · dev 0.600 · 900 tokens/s (9 of answers), 3.0 samples/s · 1:05 left\n"
    )
    shown = page(home)
    (bar,) = shown.get("progress")
    assert (bar.proto.value, bar.proto.text) == (40, "step 120 of 300 · about 1 min 5 s of training left")
    assert "**training**" in words(shown.markdown)
    log.write_text(log.read_text() + "trained 300 steps in 170 s; scoring\n")
    shown = page(home)
    assert shown.get("progress")[0].proto.value == 100
    assert "**scoring**" in words(shown.markdown)
    cluster["ftjob-live"]["status"] = "PENDING"
    assert "**queued**" in words(page(home).markdown)


def test_more_than_losses_can_be_drawn_of_a_run(page, jobs, home, settings):
    run = add_running_job(settings)
    Registry.open(settings).log_metrics(run, 10, {"train/lr": 0.01, "system/cpu_percent": 98.0})
    shown = page(home)
    healthy(shown.button_group(key="plot_live").select("Learning rate").run())
    (job,) = jobs.live_jobs(settings).jobs
    drawn, _ = jobs.job_runs(settings, job)
    assert [
        (row["curve"], row["value"]) for row in jobs.curve_rows(settings, jobs.curve_names(drawn), "Learning rate")
    ] == [("Learning rate", 0.01)]
    assert len(shown.get("vega_lite_chart")) == 1


def test_a_version_knows_its_job(jobs, settings):
    add_jobs(settings)
    assert jobs.jobs_of_versions(settings, "acme", "intents") == {"acme.intents:2": "ftjob-0"}
    assert jobs.jobs_of_versions(settings, "globex", "intents") == {}


def test_filters_and_pages_come_from_the_url(page, home, settings):
    add_jobs(settings)
    assert list(page(home, status="succeeded").dataframe[0].value["job"]) == ["ftjob-0"]
    assert "There are 1 pages." in words(page(home, page="7").caption)


def test_a_home_without_records_says_how_to_start_a_job(page, tmp_path):
    shown = page(tmp_path / "nothing")
    assert "pedro submit" in words(shown.caption)
    assert not (tmp_path / "nothing").exists()


def test_ending_a_job_asks_first_and_tells_why_it_could_not(page, home, settings):
    add_running_job(settings)
    shown = page(home)
    button(shown, "End this job …").click().run()
    assert "nothing is registered" in words(shown.warning)
    button(shown, "Keep it").click().run()
    assert not shown.warning
    button(shown, "End this job …").click().run()
    button(shown, "End it").click().run()
    healthy(shown)
    assert "started by an earlier release" in words(shown.toast)


def button(shown, label):
    return next(button for button in shown.button if button.label == label)


def test_what_the_cluster_says_of_an_open_job_counts(jobs, settings, monkeypatch):
    add_jobs(settings)
    cluster = {
        "ftjob-lost": told("ftjob-lost", "RUNNING"),
        "sweep-1": told("sweep-1", "RUNNING", sweep="sweep-1", model="a.b"),
    }
    monkeypatch.setattr(jobs, "ask_cluster", lambda settings: jobs.ClusterJobs(cluster, "http://ray"))
    found = {job.id: job for job in jobs.live_jobs(settings).jobs}
    assert (found["ftjob-lost"].status, found["ftjob-lost"].kind) == ("running", "fine-tuning")
    assert (found["sweep-1"].model, found["sweep-1"].kind, found["sweep-1"].sweep) == ("a.b", "sweep", "sweep-1")
    cluster["ftjob-lost"]["status"] = "FAILED"
    assert {job.id: job.status for job in jobs.live_jobs(settings).jobs}["ftjob-lost"] == "failed"
    del cluster["ftjob-lost"]
    assert {job.id: job.status for job in jobs.live_jobs(settings).jobs}["ftjob-lost"] == "lost"


def test_the_command_line_and_the_dashboard_tell_the_same_of_every_job(jobs, settings, monkeypatch, capsys):
    add_jobs(settings)
    for name, value in settings.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "argv", ["pedro", "jobs", "list", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    listed = [(row["id"], row["status"], row["message"]) for row in json.loads(capsys.readouterr().out)]
    assert listed == [(job.id, job.status, job.message) for job in jobs.past_jobs(settings).jobs]
    assert "lost" in [status for _, status, _ in listed]


def test_a_job_that_is_not_handed_over_yet_is_not_lost(jobs, settings):
    add_running_job(settings)
    assert {job.id: job.status for job in jobs.live_jobs(settings).jobs} == {"ftjob-live": "queued"}


def test_a_cluster_that_does_not_answer_leaves_the_records_word(jobs, settings, monkeypatch):
    add_jobs(settings)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    seen = jobs.live_jobs(settings)
    assert [job.status for job in seen.jobs] == ["running"]
    assert "http://127.0.0.1:9" in seen.cluster.problem


def test_jobs_are_read_a_page_at_a_time_with_counts_of_all(jobs, settings):
    store = Store(settings.database_url)
    for number in range(7):
        store.create_job("acme", "support", {}, f"job-{number}")
    seen = [jobs.past_jobs(settings, None, 3, offset) for offset in (0, 3, 6)]
    assert [[job.id for job in part.jobs] for part in seen] == [
        ["job-6", "job-5", "job-4"],
        ["job-3", "job-2", "job-1"],
        ["job-0"],
    ]
    assert seen[0].counts == {"queued": 7}


def add_two_that_differ(settings: Settings) -> None:
    """Two jobs of one adapter that differ in their learning rate and kind, each with a run."""
    store, registry = Store(settings.database_url), Registry.open(settings)
    for job_id, lr, kind, accuracy in (("ftjob-a", 0.01, "pedro", 0.75), ("ftjob-b", 0.001, "lora", 0.5)):
        spec = {"method": {"name": kind}, "training": {"lr": lr, "seed": 0}}
        store.create_job("acme", "pair", spec, job_id)
        run = registry.start_run(experiment="acme.pair", name=job_id, params={}, tags={"job": job_id})
        registry.log_metrics(run, 10, {"train/loss": lr})
        registry.finish_run(run)
        store.update_job(job_id, status="running", submission_id=job_id)
        store.update_job(job_id, status="succeeded", result={"metrics": {"accuracy": accuracy, "verdict": "fine"}})
    store.close()


def test_two_jobs_stand_beside_each_other_with_what_differs_and_both_curves(page, home, settings):
    add_two_that_differ(settings)
    add_jobs(settings)
    shown = page(home, job="ftjob-a")
    assert shown.selectbox(key="beside").options == [
        option for option in shown.selectbox(key="job").options if "acme.pair" in option and "ftjob-b" in option
    ], "jobs of the same adapter"
    shown = page(home, job="ftjob-a", beside="ftjob-b")
    apart, measured = (frame.value for frame in shown.dataframe[-2:])
    assert apart.to_dict("records") == [
        {"what": "method.name", "one": "pedro", "other": "lora"},
        {"what": "training.lr", "one": "0.01", "other": "0.001"},
    ]
    assert measured.to_dict("records") == [{"metric": "accuracy", "one": 0.75, "other": 0.5, "more": 0.25}]
    drawn = json.loads(shown.get("vega_lite_chart")[-1].proto.spec)
    assert drawn["encoding"]["color"]["field"] == "run", "a colour a job"
    assert shown.selectbox(key="job").value == "ftjob-a"


def test_a_job_of_another_adapter_may_be_named_and_an_unknown_one_is_an_error(page, home, settings):
    add_two_that_differ(settings)
    add_jobs(settings)
    shown = page(home, job="ftjob-a", beside="ftjob-1")
    assert {"what": "method.name", "one": "pedro", "other": "pedro"} not in shown.dataframe[-1].value.to_dict("records")
    assert shown.selectbox(key="beside").value == "ftjob-1"
    assert "ftjob-nix" in words(page(home, job="ftjob-a", beside="ftjob-nix").error)
