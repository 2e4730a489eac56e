"""The dashboard's data functions, and its page run by Streamlit's AppTest on a home that the real registry wrote."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib

import pytest
from dashboard_app import DASHBOARD, opener, words
from dashboard_home import make_home, result, write_result

from pedro.config import Settings


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("dashboard") / "home").home


@pytest.fixture
def home(made, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(made, tmp_path / "home")


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources import demo

    return demo


@pytest.fixture
def versions_of(monkeypatch):
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources import versions

    return versions


@pytest.fixture
def page(monkeypatch):
    """Run the page for a home."""
    return opener(monkeypatch)


def test_the_page_shows_adapters_gains_curves_and_the_swap(page, home):
    shown = page(home)
    assert not shown.warning
    assert not shown.info
    figures = {metric.label: metric.value for metric in shown.metric}
    assert figures["Adapters on one backbone"] == "3"
    assert figures["Mean accuracy with adapter"] == "77.7%"
    assert figures["Trained parameters"] == "21,320"
    assert figures["Requests lost in a hot swap"] == "0"
    assert figures["First answer by the new version"] == "0.41 s"
    table = shown.dataframe[0].value
    assert list(table["tenant"]) == ["acme", "acme", "globex", "initech"]
    assert list(table["version"]) == [2, 1, 1, 1]
    assert [list(aliases) for aliases in table["aliases"]] == [["champion"], ["previous"], ["champion"], ["champion"]]
    assert set(table["parameters"]) == {21320}
    assert len(shown.get("vega_lite_chart")) == 3


def test_a_tenant_can_be_looked_at_alone(page, home):
    shown = page(home)
    shown.button_group[1].select("acme").run()
    assert list(shown.dataframe[0].value["tenant"]) == ["acme", "acme"]


def test_curves_follow_the_versions_and_the_metric_that_are_chosen(page, home):
    shown = page(home)
    assert shown.multiselect[0].value == ["acme.intents:2", "globex.topics:1", "initech.tone:1"]
    shown.multiselect[0].set_value([]).run()
    assert "Choose a version." in words(shown.caption)
    assert not shown.exception
    shown.multiselect[0].set_value(["acme.intents:1", "acme.intents:2"]).run()
    shown.button_group[0].select("train/loss").run()
    assert not shown.exception
    assert len(shown.get("vega_lite_chart")) == 3


def test_an_empty_home_says_which_command_fills_it_and_stays_empty(page, tmp_path):
    shown = page(tmp_path / "nothing")
    assert "make demo" in words(shown.info)
    assert str(tmp_path / "nothing" / "demo" / "result.json") in words(shown.info)
    assert "The registry holds no adapters yet" in words(shown.caption)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_a_result_that_is_no_json_is_told_and_the_adapters_are_still_shown(page, home):
    write_result(home, '{"tenants": [')
    shown = page(home)
    assert "not readable as JSON" in words(shown.warning)
    assert len(shown.dataframe[0].value) == 4


def test_a_broken_entry_is_told_with_its_field_and_the_others_are_shown(page, home):
    tree = result()
    tree["tenants"][1]["accuracy"] = 1.7
    del tree["tenants"][2]["title"]
    tree["swap"]["failed"] = "none"
    write_result(home, tree)
    shown = page(home)
    told = words(shown.warning)
    assert "tenants[1].accuracy" in told
    assert "1.7" in told
    assert "tenants[2].title" in told
    assert "swap.failed" in told
    assert {metric.label: metric.value for metric in shown.metric}["Adapters on one backbone"] == "1"
    assert "Appears when the demo has moved an alias" in words(shown.caption)


@pytest.mark.parametrize(
    "tree",
    [[], "null", {"tenants": {}}, {"tenants": [None, 3, "x"]}, {"tenants": [], "swap": [1]}, {}, {"seconds": "soon"}],
)
def test_no_shape_of_the_result_breaks_the_page(page, home, tree):
    write_result(home, tree)
    page(home)


def test_a_registry_that_does_not_answer_is_told_and_the_result_is_still_shown(page, home, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shown = page(home, tracking_uri="http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in words(shown.warning)
    assert "Mean accuracy with adapter" in {metric.label for metric in shown.metric}


def test_data_is_read_without_streamlit(home):
    code = (
        "import sys; sys.modules['streamlit'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from sources import demo; print(len(demo.read_demo(Path(sys.argv[2])).tenants))"
    )
    done = subprocess.run([sys.executable, "-c", code, DASHBOARD, home], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_the_chart_has_three_bars_for_each_tenant_on_the_same_rows(data, home):
    rows = data.accuracy_rows(data.read_demo(home).tenants)
    assert [row["answers"] for row in rows[:3]] == ["Backbone alone", "Majority class", "With adapter"]
    assert [row["accuracy"] for row in rows[:3]] == [0.0, 0.16, 0.93]
    assert len(rows) == 9


def test_champions_and_newest_versions_are_what_is_drawn_by_default(versions_of, home):
    versions = versions_of.read_adapters(Settings.from_env({"PEDRO_HOME": str(home)})).versions
    assert [version.ref for version in versions][:2] == ["acme.intents:2", "acme.intents:1"]
    assert [version.ref for version in versions_of.newest_and_champions(versions)][:2] == [
        "acme.intents:2",
        "globex.topics:1",
    ]


def test_curves_come_from_the_runs_in_the_order_of_steps(versions_of, home):
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    (newest, *_) = versions_of.read_adapters(settings).versions
    points = versions_of.curves_of(settings, [newest])
    assert {point["metric"] for point in points} == set(versions_of.CURVES)
    steps = [point["step"] for point in points if point["metric"] == "train/loss"]
    assert steps == list(range(10, 301, 10))


def test_the_page_is_for_this_machine_and_tells_nobody_of_its_use():
    config = tomllib.loads((DASHBOARD / ".streamlit" / "config.toml").read_text("utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False
