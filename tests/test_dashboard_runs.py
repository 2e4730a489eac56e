"""The dashboard's jobs: those of the records and of Ray, curves, logs, paging, ending one."""

from __future__ import annotations

import json
import sys
import time

import pytest
from dashboard_app import DASHBOARD, healthy, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_jobs, add_running_job

from pedro import cli
from pedro.config import Settings
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
