"""The dashboard's sweeps: read from the records that drivers and trials leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from dashboard_app import DASHBOARD, healthy, opener, words
from dashboard_results import add_sweep

from pedro.config import Settings
from pedro.training.sweep.records import Records, Trial, TrialOutcome, TrialState

SWEEP = "sweep-0123456789ab"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})


@pytest.fixture
def sweeps(monkeypatch):
    """The data functions, as the page imports them."""
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources import sweeps

    return sweeps


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "sweeps")


def test_the_page_shows_the_best_trial_importance_and_the_map_of_orders(page, settings):
    add_sweep(settings)
    shown = page(settings.home)
    assert not shown.warning
    seen = {metric.label: metric.value for metric in shown.metric}
    assert seen["Trials"] == "12"
    assert seen["Best validation loss"] == "0.4200"
    assert "`method.orders` = **[6, 5]**" in words(shown.markdown)
    assert "Orders of the activation" in words(shown.subheader)
    assert len(shown.get("vega_lite_chart")) == 3
    table = shown.dataframe[0].value
    assert list(table["state"])[:2] == ["finished", "finished"]
    assert table["validation_loss"][0] == pytest.approx(0.42)
    assert set(table["state"]) == {"finished", "stopped", "failed", "running"}


def test_one_sweep_of_several_is_chosen_by_the_url(page, settings):
    add_sweep(settings)
    other = add_sweep(settings, "sweep-ffffffffffff")
    other.write_trial(Trial(12, {"method.orders": [6, 5], "training.lr": 1e-3, "method.r": 6}, "run"))
    shown = page(settings.home, sweep="sweep-ffffffffffff")
    assert {metric.label: metric.value for metric in shown.metric}["Trials"] == "13"
    healthy(shown.selectbox(key="sweep").select(SWEEP).run())
    assert {metric.label: metric.value for metric in shown.metric}["Trials"] == "12"


def test_a_home_without_sweeps_says_how_to_start_one(page, settings):
    shown = page(settings.home)
    assert "pedro sweep" in words(shown.info)
    assert not settings.home.exists()


def test_a_broken_file_is_named_with_its_reason_and_the_rest_is_shown(page, settings):
    records = add_sweep(settings)
    Path(records.location, "trials", "004.json").write_text('{"number": 4')
    Path(records.location, "results", "001.json").write_text("[]")
    shown = page(settings.home)
    assert "trial 004" in words(shown.warning)
    assert "trial 001" in words(shown.warning)
    assert {metric.label: metric.value for metric in shown.metric}["Trials"] == "10"


@pytest.mark.parametrize("text", ["", "null", "{}", '{"id": 1}', '{"id": "x", "spec": {"space": 3}}'])
def test_no_shape_of_a_sweeps_record_breaks_the_page(page, settings, text):
    records = add_sweep(settings)
    Path(records.location, "sweep.json").write_text(text)
    assert "sweep.json" in words(page(settings.home).warning)


def test_the_parameter_that_moves_the_loss_explains_it(sweeps, settings):
    records = Records(settings.storage, "sweep-1")
    for number in range(24):
        parameters = {"lr": [1e-3, 1e-2][number % 2], "r": [3, 6, 12][number % 3], "seed": number, "fixed": 1}
        loss = {"validation_loss": 1.0 + 0.5 * (number % 2) + 0.001 * (number % 5)}
        records.write_trial(Trial(number, parameters, "run"))
        records.write_outcome(number, TrialOutcome(TrialState.FINISHED, 1, metrics=loss))
    found = {one.key: one.share for one in sweeps.importances(sweeps.read_sweep(settings, "sweep-1"))}
    assert found["lr"] > 0.99
    assert found["r"] < 0.05
    assert found["seed"] < 0.2, "many values are cut in quarters, not taken for as many groups"
    assert found["fixed"] is None


def test_every_comparable_trial_has_a_place_on_every_axis(sweeps, settings):
    add_sweep(settings)
    sweep = sweeps.read_sweep(settings, SWEEP)
    points, ticks = sweeps.parallel(sweep)
    assert {point["axis"] for point in points} == {*sweep.keys, sweeps.LOSS, sweeps.ACCURACY}
    assert all(0 <= point["height"] <= 1 for point in points)
    assert {point["trial"] for point in points} == set(range(12)) - {7}, "the failed one is left out"
    assert {point["trial"] for point in points if point["best"]} == {sweep.best.number} == {8}
    assert {tick["tick"] for tick in ticks if tick["axis"] == "training.lr"} >= {"0.001", "0.01"}


def test_the_map_of_orders_takes_the_median_of_finished_trials(sweeps, settings):
    add_sweep(settings)
    rows = {(row["m"], row["n"]): row for row in sweeps.order_map(sweeps.read_sweep(settings, SWEEP))}
    assert set(rows) == {(6, 5), (4, 3), (2, 1)}, "no trial of (1, 0) has finished"
    assert rows[6, 5] == {"m": 6, "n": 5, "loss": pytest.approx(0.5146, abs=1e-4), "trials": 3}
