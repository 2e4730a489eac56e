"""The dashboard's Runs page beside a real Ray cluster: a job's status, log and curves while it trains, and its end."""

from __future__ import annotations

import os
import time

import pytest
from dashboard_app import DASHBOARD, healthy, opener, words
from training_runs import spec_for

from pedro import cluster
from pedro.config import Settings
from pedro.registry import Registry
from pedro.store import Store
from pedro.training import ray_jobs, submit
from pedro.training.queue.process import end_controller

pytestmark = pytest.mark.slow
PATIENCE_S = 1200


@pytest.fixture
def home(tmp_path):
    """Settings and dashboard URL of a local cluster."""
    inherited = dict(os.environ)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    head = cluster.connect(settings)
    Registry.open(settings).models()
    yield settings, head.dashboard_url
    end_controller(settings)
    cluster.stop_head(settings)
    os.environ.clear()
    os.environ.update(inherited)


def test_a_training_job_is_watched_and_ended_from_the_page(home, tmp_path, monkeypatch):
    settings, url = home
    store = Store(settings.database_url)
    endless = {"max_steps": 10**6, "eval_every": 20, "patience": 10**6}
    job_id = submit.submit(spec_for(tmp_path, **endless), settings, store)
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources.jobs import curve_names, curve_rows, job_runs, live_jobs, log_tail

    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline, "the job drew no curve in time"
        (job,) = live_jobs(settings).jobs
        drawn, problem = job_runs(settings, job)
        if job.status == "running" and curve_rows(settings, curve_names(drawn)):
            break
        assert job.live, job
        assert not problem
        time.sleep(1)
    assert any("step" in line for line in log_tail(settings, job_id)[0])

    shown = opener(monkeypatch, "runs")(settings.home)
    assert len(shown.get("vega_lite_chart")) == 1
    assert "running" in words(shown.markdown)
    assert shown.code
    press(shown, "End this job …")
    press(shown, "End it")
    assert f"{job_id} was ended" in words(shown.toast)
    assert store.get_job(job_id).status == "cancelled"
    while {job["id"]: job["status"] for job in ray_jobs.jobs(url)}[job_id] == "RUNNING":
        assert time.monotonic() < deadline, "the cluster did not end the job"
        time.sleep(0.5)
    while "Nothing is running" not in words(healthy(shown.run()).caption):
        assert time.monotonic() < deadline, "the page did not notice"
        time.sleep(1)


def press(shown, label) -> None:
    healthy(next(button for button in shown.button if button.label == label).click().run())
