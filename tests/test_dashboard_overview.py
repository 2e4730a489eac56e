"""The dashboard's first page, run by Streamlit's AppTest on a home that the real registry and records wrote."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib

import pytest
from dashboard_app import DASHBOARD, opener, words
from dashboard_home import copy_of_home, result, write_result
from dashboard_results import add_jobs

from pedro.config import Settings


@pytest.fixture
def home(tmp_path):
    return copy_of_home(tmp_path / "home")


@pytest.fixture
def sources(monkeypatch):
    """The data functions, as pages import them."""
    monkeypatch.syspath_prepend(str(DASHBOARD))
    import sources.demo
    import sources.login
    import sources.overview
    import sources.services

    return sources


@pytest.fixture
def page(monkeypatch):
    """Run the page for a home."""
    return opener(monkeypatch)


def settings_of(home) -> Settings:
    return Settings.from_env({"PEDRO_HOME": str(home)})


def figures(shown) -> dict[str, str]:
    return {metric.label: metric.value for metric in shown.metric}


def test_the_page_counts_what_there_is_and_tells_what_changed(page, home):
    add_jobs(settings_of(home))
    shown = page(home)
    assert not shown.warning
    seen = figures(shown)
    assert (seen["Tenants"], seen["Adapters"], seen["Versions in service"]) == ("3", "3", "3")
    assert (seen["Jobs running"], seen["Jobs queued"]) == ("0", "0")
    news = shown.dataframe[0].value
    assert set(news["what"]) == {"new version", "promoted", "job succeeded", "job failed", "job cancelled"}
    assert list(news["at"]) == sorted(news["at"], reverse=True)
    assert set(news[news["what"] == "new version"]["name"]) == {
        "acme.intents:1",
        "acme.intents:2",
        "globex.topics:1",
        "initech.tone:1",
    }
    assert "the loss is NaN" in "".join(news["detail"])


def test_services_that_are_missing_are_named_with_the_command_that_starts_them(page, home):
    told = words([*page(home).caption, *page(home).markdown])
    for word in ("MLflow", "Records", "Ray", "Serve", "`pedro serve` starts it", "`pedro submit SPEC.yaml`"):
        assert word in told


def test_the_demo_shows_gains_and_the_swap(page, home):
    shown = page(home)
    seen = figures(shown)
    assert seen["Adapters on one backbone"] == "3"
    assert seen["Mean score with adapter"] == "77.7%"
    assert seen["Trained parameters"] == "21,320"
    assert seen["Requests lost in a hot swap"] == "0"
    assert seen["First answer by the new version"] == "0.41 s"
    assert len(shown.get("vega_lite_chart")) == 2


def test_an_empty_home_says_which_command_fills_it_and_stays_empty(page, tmp_path):
    shown = page(tmp_path / "nothing")
    assert "make demo" in words(shown.info)
    assert str(tmp_path / "nothing" / "demo" / "result.json") in words(shown.info)
    assert figures(shown)["Adapters"] == "0"
    assert "no registry yet" in words(shown.caption)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_a_result_that_is_no_json_is_told_and_the_rest_is_still_shown(page, home):
    write_result(home, '{"tenants": [')
    shown = page(home)
    assert "not readable as JSON" in words(shown.warning)
    assert figures(shown)["Adapters"] == "3"


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
def test_no_shape_of_the_result_breaks_it(sources, tmp_path, tree):
    write_result(tmp_path, tree)
    assert sources.demo.read_demo(tmp_path).exists


def test_an_mlflow_that_does_not_answer_is_told_and_what_the_store_and_the_demo_know_is_shown(page, home, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shown = page(home, tracking_uri="http://127.0.0.1:9")
    assert "does not answer" in words(shown.caption)
    assert not shown.warning
    assert "Adapters" in figures(shown)
    assert "Mean score with adapter" in figures(shown)


def test_data_is_read_without_streamlit():
    code = (
        "import sys; sys.modules['streamlit'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from sources import compare, demo, jobs, login, mlflow_runs, overview, pareto, services, stores, sweeps"
    )
    subprocess.run([sys.executable, "-c", code, DASHBOARD], check=True, capture_output=True)


def test_the_chart_has_a_bar_for_every_way_in_which_a_tenants_rows_were_asked(sources, home):
    rows = sources.demo.score_rows(sources.demo.read_demo(home).tenants)
    first = ["Majority class", "Backbone alone", "Backbone with examples", "With adapter"]
    assert [row["answers"] for row in rows[:4]] == first
    assert [row["score"] for row in rows[:4]] == [0.16, 0.0, 0.2, 0.93]
    assert len(rows) == 10, "the other two were asked without examples"


def test_what_is_older_than_a_day_is_no_news(sources, home):
    add_jobs(settings_of(home))
    assert sources.overview.read_overview(settings_of(home)).news
    assert not sources.overview.read_overview(settings_of(home), now=time.time() + 2 * 24 * 3600).news


def test_a_job_whose_cluster_was_ended_is_counted_as_lost(sources, home):
    add_jobs(settings_of(home))
    assert sources.overview.read_overview(settings_of(home)).lost == 1


def test_the_login_accepts_an_admin_key_alone(sources, home):
    from pedro.store import Store

    store = Store(settings_of(home).database_url)
    _, admin = store.create_key("ops", ["admin"])
    record, revoked = store.create_key("ops", ["admin"])
    store.revoke_key(record.id)
    _, tenants = store.create_key("acme", ["infer", "train", "read"])

    def refusal(key):
        return sources.login.refusal(key, settings_of(home), {})

    assert refusal(admin) == refusal(f" {admin}\n") == ""
    assert "not an admin key" in refusal(tenants)
    assert "revoked" in refusal(revoked)
    assert refusal("")
    assert refusal("sk-pedro-nothing")


def test_a_login_without_keys_says_how_to_make_one_and_creates_nothing(sources, tmp_path):
    settings = settings_of(tmp_path / "nothing")
    assert "pedro keys create" in sources.login.refusal("sk-pedro-x", settings, {})
    assert not settings.home.exists()


def test_a_key_is_not_taken_for_good_where_the_gateway_does_not_answer(sources, home):
    env = {"PEDRO_GATEWAY_URL": "http://127.0.0.1:9"}
    assert "cannot be checked" in sources.login.refusal("sk-pedro-x", settings_of(home), env)


def test_a_page_behind_the_login_shows_nothing_until_the_key_is_given(page, home, monkeypatch):
    from pedro.store import Store

    _, admin = Store(settings_of(home).database_url).create_key("ops", ["admin"])
    monkeypatch.setenv("PEDRO_DASHBOARD_REQUIRE_KEY", "1")
    monkeypatch.delenv("PEDRO_GATEWAY_URL", raising=False)
    shown = page(home)
    assert not shown.metric
    assert not shown.dataframe
    shown.text_input[0].set_value("sk-pedro-wrong")
    shown.button[0].click().run()
    assert "Incorrect API key" in words(shown.error)
    assert not shown.metric
    shown.text_input[0].set_value(admin)
    shown.button[0].click().run()
    assert not shown.exception
    assert figures(shown)["Adapters"] == "3"


def test_the_page_is_for_this_machine_and_tells_nobody_of_its_use():
    config = tomllib.loads((DASHBOARD / ".streamlit" / "config.toml").read_text("utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["browser"]["gatherUsageStats"] is False


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.7", False),
        ("pedro", False),
    ],
)
def test_every_address_but_loopback_asks_for_a_key(host, loopback):
    from pedro.cluster import is_loopback

    assert is_loopback(host) is loopback
