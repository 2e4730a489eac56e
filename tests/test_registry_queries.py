"""Runs and versions in bulk, from a real sqlite MLflow store."""

from __future__ import annotations

import time

import pytest
from dashboard_home import make_home

from pedro.errors import UnavailableError
from pedro.registry import Registry, queries


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return Registry.open(make_home(tmp_path_factory.mktemp("runs") / "home"))


def test_runs_are_paged_newest_first_with_their_last_values(registry):
    first = queries.search_runs(registry, ["acme", "globex"], limit=2)
    rest = queries.search_runs(registry, ["acme", "globex"], limit=2, after=first.after)
    assert [run.model for run in (*first.runs, *rest.runs)] == ["globex", "acme", "acme"]
    assert rest.after is None
    assert first.runs[0].params == {"lr": "0.01"}
    assert first.runs[0].status == "FINISHED"
    assert first.runs[0].metrics["train/tokens_per_second"] == 5500


def test_models_without_runs_and_other_states_have_none(registry):
    assert queries.search_runs(registry, ["nobody"]).runs == ()
    assert queries.search_runs(registry, ["acme"], status=queries.RUNNING).runs == ()
    assert set(queries.experiment_names(registry)) == {"acme", "globex", "initech"}


def test_a_jobs_run_is_found_and_its_curves_are_read(registry):
    run_id = registry.start_run(experiment="acme", name="j", params={}, tags={"job": "ftjob-1"})
    registry.log_metrics(run_id, 2, {"train/loss": 1.0})
    registry.log_metrics(run_id, 1, {"train/loss": 2.0})
    found = queries.find_run_of_job(registry, "acme", "ftjob-1")
    assert (found.id, found.job, found.ended) == (run_id, "ftjob-1", None)
    assert queries.find_run_of_job(registry, "acme", "ftjob-2") is None
    assert queries.metric_histories(registry, [run_id], ["train/loss", "dev/loss"]) == [
        (run_id, "train/loss", 1, 2.0),
        (run_id, "train/loss", 2, 1.0),
    ]


def test_what_is_new_and_what_was_promoted_is_told_by_time(registry):
    yesterday = time.time() - queries.DAY_S
    assert {version.ref for version in queries.new_versions(registry, yesterday)} == {
        "acme.intents:2",
        "acme.intents:1",
        *_others(),
    }
    assert "acme.intents:2" in [version.ref for version in queries.promotions(registry, yesterday)]
    assert queries.new_versions(registry, time.time() + 60) == []
    assert queries.promotions(registry, time.time() + 60) == []


def test_a_registry_that_is_away_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Registry("http://127.0.0.1:9", str(tmp_path), tmp_path, f"sqlite:///{tmp_path}/pedro.db")
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        queries.experiment_names(away)


def _others() -> list[str]:
    return ["globex.topics:1", "initech.tone:1"]
