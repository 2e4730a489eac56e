"""Runs and versions in bulk, from a real sqlite MLflow store."""

from __future__ import annotations

import time

import pytest
from dashboard_home import make_home

from pedro import runs
from pedro.errors import UnavailableError
from pedro.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return Registry.open(make_home(tmp_path_factory.mktemp("runs") / "home"))


def test_runs_are_paged_newest_first_with_their_last_values(registry):
    first = runs.page_of_runs(registry, ["acme", "globex"], limit=2)
    rest = runs.page_of_runs(registry, ["acme", "globex"], limit=2, after=first.after)
    assert [run.model for run in (*first.runs, *rest.runs)] == ["globex", "acme", "acme"]
    assert rest.after is None
    assert first.runs[0].params == {"lr": "0.01"}
    assert first.runs[0].status == "FINISHED"
    assert first.runs[0].metrics["train/tokens_per_second"] == 5500


def test_models_without_runs_and_other_states_have_none(registry):
    assert runs.page_of_runs(registry, ["nobody"]).runs == ()
    assert runs.page_of_runs(registry, ["acme"], status=runs.RUNNING).runs == ()
    assert set(runs.models_with_runs(registry)) == {"acme", "globex", "initech"}


def test_a_jobs_run_is_found_and_its_curves_are_read(registry):
    run_id = registry.start_run(experiment="acme", name="j", params={}, tags={"pedro.job": "ftjob-1"})
    registry.log(run_id, 2, {"train/loss": 1.0})
    registry.log(run_id, 1, {"train/loss": 2.0})
    found = runs.run_of_job(registry, "acme", "ftjob-1")
    assert (found.id, found.job, found.ended) == (run_id, "ftjob-1", None)
    assert runs.run_of_job(registry, "acme", "ftjob-2") is None
    assert runs.curves(registry, [run_id], ["train/loss", "dev/loss"]) == [
        (run_id, "train/loss", 1, 2.0),
        (run_id, "train/loss", 2, 1.0),
    ]


def test_versions_come_in_bulk_as_they_do_one_by_one(registry):
    everything = runs.all_versions(registry)
    assert [version.ref for version in everything] == ["acme.intents:2", "acme.intents:1", *_others()]
    assert everything == [v for name in registry.models() for v in reversed(registry.versions(name))]


def test_what_is_new_and_what_was_promoted_is_told_by_time(registry):
    yesterday = time.time() - runs.DAY_S
    assert {version.ref for version in runs.new_versions(registry, yesterday)} == {
        "acme.intents:2",
        "acme.intents:1",
        *_others(),
    }
    assert "acme.intents:2" in [version.ref for version in runs.promotions(registry, yesterday)]
    assert runs.new_versions(registry, time.time() + 60) == []
    assert runs.promotions(registry, time.time() + 60) == []


def test_a_registry_that_is_away_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = Registry("http://127.0.0.1:9", str(tmp_path), tmp_path)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        runs.models_with_runs(away)


def _others() -> list[str]:
    return ["globex.topics:1", "initech.tone:1"]
