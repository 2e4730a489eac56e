"""The dashboard's first page, run by Streamlit's AppTest on a home that the real registry and records wrote."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime, timedelta

import pytest
from dashboard_app import DASHBOARD, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_jobs

from pedro.config import Settings
from pedro.errors import AuthenticationError
from pedro.registry import Registry
from pedro.store import Store, Usage
from pedro.traffic.history import Interval
from pedro.traffic.scrape import Traffic


@pytest.fixture
def home(tmp_path):
    return copy_of_home(tmp_path / "home")


@pytest.fixture
def sources(monkeypatch):
    """The data functions, as pages import them."""
    monkeypatch.syspath_prepend(str(DASHBOARD))
    import sources.login
    import sources.overview
    import sources.risks
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
    assert "3 tenants, 3 adapters, 3 of them in service" in words(shown.caption)
    seen = figures(shown)
    assert (seen["Jobs running"], seen["Jobs queued"], seen["Jobs failed"]) == ("0", "0", "1")
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


def test_an_empty_home_says_which_command_fills_it_and_stays_empty(page, tmp_path):
    shown = page(tmp_path / "nothing")
    assert "make demo" in words(shown.info)
    assert "0 adapters" in words(shown.caption)
    assert figures(shown)["Requests"] == "–", "what nobody observed is no zero"
    assert "`pedro serve`" in words(shown.caption)
    assert "no registry yet" in words(shown.caption)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_an_mlflow_that_does_not_answer_is_told_and_what_the_store_knows_is_shown(page, home, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shown = page(home, tracking_uri="http://127.0.0.1:9")
    assert "does not answer" in words(shown.caption)
    assert not shown.warning
    assert "3 adapters" in words(shown.caption)


def test_data_is_read_without_streamlit():
    code = (
        "import sys; sys.modules['streamlit'] = None; sys.path.insert(0, sys.argv[1])\n"
        "from sources import compare, demo, jobs, login, mlflow_runs, overview, pareto, risks, services, stores, sweeps"
    )
    subprocess.run([sys.executable, "-c", code, DASHBOARD], check=True, capture_output=True)


def spend(settings, day, tokens, requests=3):
    """Tokens of each tenant, entered as a gateway does."""
    store = Store(settings.database_url)
    rows = [
        Usage(day=day, tenant=tenant, model=f"{tenant}.faq", requests=requests, completion_tokens=count)
        for tenant, count in tokens.items()
    ]
    store.add_usage(rows, writer=day, batch=1)
    store.close()


def test_tokens_a_day_are_the_ledgers_and_the_smallest_tenants_stand_together(page, sources, home):
    today = datetime.now(UTC).date()
    yesterday = today - timedelta(days=1)
    spend(settings_of(home), today.isoformat(), {"acme": 1200, "globex": 34})
    spend(settings_of(home), yesterday.isoformat(), {f"t{number}": 1000 + number for number in range(8)})
    spend(settings_of(home), (today - timedelta(days=30)).isoformat(), {"acme": 9})
    shown = page(home)
    tokens = next(metric for metric in shown.metric if metric.label == "Tokens today")
    assert (tokens.value, tokens.delta) == ("1,234", "8,028 yesterday (UTC)")
    rows = sources.overview.token_rows(sources.overview.read_overview(settings_of(home)).usage)
    assert len({row["tenant"] for row in rows}) == sources.overview.MOST_TENANTS + 1
    rest = [row for row in rows if row["tenant"] == sources.overview.REST]
    assert [(row["day"], row["tokens"]) for row in rest] == [
        (yesterday.isoformat(), 1000 + 1001 + 1002),
        (today.isoformat(), 34),
    ]
    assert sum(row["tokens"] for row in rows) == 1234 + 8028, "an older day is not asked for"


def test_a_gate_that_refused_the_newest_version_is_a_risk_until_a_later_one_passes(page, home):
    registry = Registry.open(settings_of(home))
    old, new = registry.versions("acme.intents")
    registry.set_gate(old, "refused: accuracy 0.50 against 0.70 of the champion")
    assert figures(page(home))["At risk"] == "0", "a later version followed"
    registry.set_gate(new, "refused: accuracy_by_chance 0.50")
    shown = page(home)
    assert figures(shown)["At risk"] == "1"
    (link,) = [link for link in shown.get("page_link") if "acme.intents" in link.proto.label]
    assert "in service all the same" in link.proto.label
    assert "adapter=acme.intents" in link.proto.query_string


def test_errors_are_a_risk_where_they_rise_and_not_where_they_always_were(sources):
    def traffic(failed, requests):
        return Traffic({"failed": failed, "requests": requests})

    before = {"acme.faq": traffic(1, 100), "globex.faq": traffic(10, 100), "": traffic(0, 0)}
    lately = {"acme.faq": traffic(3, 30), "globex.faq": traffic(3, 30), "initech.few": traffic(2, 2)}
    intervals = [Interval(0.0, 60.0, {}, before), Interval(1000.0, 1060.0, {}, lately)]
    (risk,) = sources.risks.rising(intervals, 1100.0)
    assert (risk.model, risk.detail) == (
        "acme.faq",
        "3 of 30 answers failed in the last 15 minutes, 1 of 100 before",
    )


def test_what_is_older_than_a_day_is_no_news(sources, home):
    add_jobs(settings_of(home))
    assert sources.overview.read_overview(settings_of(home)).news
    assert not sources.overview.read_overview(settings_of(home), now=time.time() + 2 * 24 * 3600).news


def test_a_job_whose_cluster_was_ended_is_counted_as_lost(sources, home):
    add_jobs(settings_of(home))
    assert sources.overview.read_overview(settings_of(home)).lost == 1


def test_a_login_without_keys_says_how_to_make_one_and_creates_nothing(sources, tmp_path):
    settings = settings_of(tmp_path / "nothing")
    with pytest.raises(AuthenticationError, match="pedro keys create"):
        sources.login.admit("sk-pedro-x", settings, {})
    assert not settings.home.exists()


def test_a_page_behind_the_login_shows_nothing_until_the_key_is_given(page, home, monkeypatch):
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
    assert "3 adapters" in words(shown.caption)


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
