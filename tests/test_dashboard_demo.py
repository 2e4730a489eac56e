"""The demo's page, which is there where `make demo` left a result, whatever that holds."""

from __future__ import annotations

import pytest
from dashboard_app import opener, words
from dashboard_home import copy_of_home, result, write_result

from sources import demo


@pytest.fixture
def home(tmp_path):
    return copy_of_home(tmp_path / "home")


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "demo")


def figures(shown) -> dict[str, str]:
    return {metric.label: metric.value for metric in shown.metric}


def test_the_page_is_there_only_where_a_demo_ran(page, home):
    assert [title.value for title in page(home).title] == ["Demo"]
    demo.result_path(home).unlink()
    assert [title.value for title in page(home).title] == ["pedro"], "the first page instead"


def test_the_demo_shows_gains_and_the_swap(page, home):
    shown = page(home)
    seen = figures(shown)
    assert seen["Adapters on one backbone"] == "3"
    assert seen["Mean score with adapter"] == "77.7%"
    assert seen["Trained parameters"] == "21,320"
    assert seen["Requests lost in a hot swap"] == "0"
    assert seen["First answer by the new version"] == "0.41 s"
    assert len(shown.get("vega_lite_chart")) == 2


def test_a_result_that_is_no_json_is_told_and_nothing_is_made_up(page, home):
    write_result(home, '{"tenants": [')
    shown = page(home)
    assert "not readable as JSON" in words(shown.warning)
    assert not shown.metric


def test_a_broken_entry_is_told_with_its_field_and_the_others_are_shown(page, home):
    tree = result()
    tree["tenants"][1]["score"] = 1.7
    del tree["tenants"][2]["title"]
    tree["swap"]["failed"] = "none"
    write_result(home, tree)
    shown = page(home)
    told = words(shown.warning)
    assert "tenants[1].score" in told
    assert "1.7" in told
    assert "tenants[2].title" in told
    assert "swap.failed" in told
    assert figures(shown)["Adapters on one backbone"] == "1"
    assert "Appears when the demo has moved an alias" in words(shown.caption)


@pytest.mark.parametrize(
    "tree",
    [[], "null", {"tenants": {}}, {"tenants": [None, 3, "x"]}, {"tenants": [], "swap": [1]}, {}, {"seconds": "soon"}],
)
def test_no_shape_of_the_result_breaks_it(tmp_path, tree):
    write_result(tmp_path, tree)
    assert demo.read_demo(tmp_path).exists


def test_the_chart_has_a_bar_for_every_way_in_which_a_tenants_rows_were_asked(home):
    rows = demo.score_rows(demo.read_demo(home).tenants)
    first = ["Majority class", "Backbone alone", "Backbone with examples", "With adapter"]
    assert [row["answers"] for row in rows[:4]] == first
    assert [row["score"] for row in rows[:4]] == [0.16, 0.0, 0.2, 0.93]
    assert len(rows) == 10, "the other two were asked without examples"
