"""A tenant's key opens its own view of every page: nothing of another is on it, and nothing of another's moves."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from dashboard_app import DASHBOARD, healthy, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_comparison, add_jobs, add_sweep

from pedro.config import Settings
from pedro.errors import AuthenticationError, UnavailableError
from pedro.registry import Registry
from pedro.store import Store, Usage
from pedro.training.sweep.records import Records
from sources import adapters, jobs, login, mlflow_runs, overview, serving, sweeps, usage
from sources.view import View, without_places

OTHERS = ("globex", "initech")
PAGES = sorted(path.stem for path in (DASHBOARD / "views").glob("*.py"))
DAY = "2026-11-20"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Acme, globex and initech, each with adapters, a job, a sweep, moves, runs and usage."""
    settings = Settings.from_env({"PEDRO_HOME": str(copy_of_home(tmp_path_factory.mktemp("tenants") / "home"))})
    add_jobs(settings)
    acme = add_sweep(settings).record()
    add_comparison(settings.home / "comparisons")
    store, registry = Store(settings.database_url), Registry.open(settings)
    for tenant, adapter in (("acme", "intents"), ("globex", "topics"), ("initech", "tone")):
        key, _ = store.create_key(tenant, ("infer",), name=f"{tenant}-bot")
        used = Usage(DAY, tenant, f"{tenant}.{adapter}", key.id, 3, 100, 40, 20, 5000, 60.0)
        store.add_usage([used], tenant, 1)
        run = registry.start_run(experiment=f"{tenant}.{adapter}", name=f"{tenant}-run", params={}, tags={})
        registry.log_metrics(run, 1, {"train/loss": 1.0, "final/accuracy": 0.5})
        registry.finish_run(run)
    base = {**acme.spec["base"], "tenant": "globex", "adapter": "topics"}
    Records(settings.storage, "sweep-globex").write_record(
        replace(acme, id="sweep-globex", spec={**acme.spec, "base": base})
    )
    store.close()
    return settings


@pytest.fixture(scope="module")
def key_of(settings):
    """A function that makes keys."""
    store = Store(settings.database_url)

    def make(tenant="acme", *scopes, adapters=None):
        return store.create_key(tenant, scopes or ("read", "train"), adapters=adapters)[1]

    yield make
    store.close()


@pytest.fixture
def logged_in(settings, key_of, monkeypatch):
    """A function that opens the dashboard for a key, as a reader from another machine does."""
    monkeypatch.setenv("PEDRO_DASHBOARD_REQUIRE_KEY", "1")
    monkeypatch.setenv("PEDRO_ADMIN_KEY", "sk-pedro-of-the-machine")
    monkeypatch.delenv("PEDRO_GATEWAY_URL", raising=False)

    def log_in(key, view="overview", **query):
        shown = opener(monkeypatch, view)(settings.home, **query)
        shown.text_input[0].set_value(key)
        return healthy(shown.button[0].click().run())

    return log_in


def written(shown) -> bytes:
    """All that a page sent to the browser."""

    def parts(node):
        if getattr(node, "proto", None) is not None:
            yield node.proto.SerializeToString()
        for child in getattr(node, "children", {}).values():
            yield from parts(child)

    return b"".join(parts(shown._tree))


def test_no_page_of_a_tenants_view_names_another_tenant_and_an_operator_sees_all(logged_in, key_of):
    shown = logged_in(key_of("acme"))
    everything = logged_in(key_of("ops", "admin"))
    named = set()
    for view in (page for page in PAGES if page != "demo"):
        own = written(healthy(shown.switch_page(f"views/{view}.py").run()))
        for other in OTHERS:
            assert other.encode() not in own, f"{view} of acme names {other}"
        assert b"sk-pedro-of-the-machine" not in own
        all_of_it = written(healthy(everything.switch_page(f"views/{view}.py").run()))
        named |= {view} if b"globex" in all_of_it else set()
    assert named >= {"overview", "runs", "sweeps", "adapters", "activations", "usage"}, "they are there to be seen"


def test_what_a_tenant_may_see_it_sees(logged_in, key_of):
    shown = logged_in(key_of("acme"), "runs", status="succeeded")
    assert {*shown.dataframe[0].value["model"]} == {"acme.intents"}
    assert shown.query_params["status"] == "succeeded", "a shared link keeps its filters through the login"
    assert "sk-pedro" not in str(dict(shown.query_params))
    assert "acme" in words(shown.sidebar.caption)
    shown = healthy(shown.switch_page("views/sweeps.py").run())
    assert [*shown.selectbox[0].options] == ["acme.intents · orders · sweep-0123456789ab"]


@pytest.mark.parametrize(
    ("view", "query"),
    [
        ("runs", {"job": "ftjob-lost"}),
        ("adapters", {"adapter": "globex.topics"}),
        ("sweeps", {"sweep": "sweep-globex"}),
        ("usage", {"tenant": "globex"}),
    ],
)
def test_a_link_to_what_is_anothers_is_answered_like_one_to_nothing(logged_in, key_of, view, query):
    key = key_of("acme")
    unknown = {name: "none" if name != "adapter" else "none.none" for name in query}
    there, nothing = (logged_in(key, view, **asked) for asked in (query, unknown))
    for (name, asked), other in zip(query.items(), unknown.values(), strict=True):
        texts = [words([*shown.error, *shown.caption, *shown.markdown]) for shown in (there, nothing)]
        assert texts[0].replace(asked, other) == texts[1], name


def test_sources_give_a_view_its_tenants_own_alone(settings):
    view = View.of(settings, "acme", trains=True)
    assert {row.name for row in adapters.read_catalog(view).rows} == {"acme.intents"}
    (version,) = adapters.read_versions(settings, "globex.topics").versions
    assert not adapters.read_versions(view, "globex.topics").versions
    assert adapters.read_stored(view, version).problem
    assert adapters.read_stored(settings, version).manifest
    assert {job.tenant for job in jobs.past_jobs(view).jobs} == {"acme"}
    assert jobs.past_jobs(view, tenant="globex").jobs == ()
    assert "lost" not in (jobs.past_jobs(view).counts or {})
    assert jobs.one_job(view, "ftjob-lost") is None
    assert jobs.one_job(settings, "ftjob-lost") is not None
    assert jobs.jobs_of_versions(view, "globex", "topics") == {}
    assert mlflow_runs.read_models(view)[0] == ["acme.intents"]
    assert {run.task for run in mlflow_runs.read_runs(view, ["acme.intents", "globex.topics"])[0].runs} == {
        "acme.intents"
    }
    assert [sweep.model for sweep in sweeps.read_sweeps(view)[0]] == ["acme.intents"]
    assert sweeps.read_sweep(view, "sweep-globex").model == ""
    assert {swap.name for swap in serving.read_swaps(view, 0.0)} == {"acme.intents"}
    assert {swap.name for swap in serving.read_swaps(settings, 0.0)} > {"acme.intents"}
    assert overview.read_overview(view).tenants == ("acme",)


MESSAGES = {
    "data.train: /srv/pedro/datasets/abc.jsonl: line 3": "data.train: abc.jsonl: line 3",
    "'/srv/my home/rows.npz' and s3://bucket/pedro/x.jsonl are gone": "'rows.npz' and x.jsonl are gone",
    "file:///srv/x.json, ~/y/z.json (/a/b/) error:/c/d": "x.json, z.json (b) error:d",
    "POST /v1/files, https://a.b/c and pedro://demo/d, and/or 0.9 / 0.5": None,
}


@pytest.mark.parametrize(("told", "shown"), MESSAGES.items())
def test_of_paths_in_a_message_a_tenant_reads_the_last_names_and_an_operator_all(settings, told, shown):
    assert without_places(View.of(settings, "acme", trains=True), told) == (shown or told)
    assert without_places(settings, told) == told


def test_a_tenant_sees_no_path_of_the_host_on_any_page(settings, logged_in, key_of):
    place = f"{settings.home}/storage/datasets/{'a' * 64}.jsonl"
    spec = {"backbone": f"{settings.home}/backbones/own", "data": {"train": place, "test": "file-1"}}
    store, registry = Store(settings.database_url), Registry.open(settings)
    store.create_job("acme", "intents", spec, "ftjob-placed")
    store.update_job("ftjob-placed", status="running", submission_id="ftjob-placed")
    store.update_job("ftjob-placed", status="failed", message=f"data.train: {place}: line 1: no JSON")
    (newest, *_) = reversed(registry.versions("acme.intents"))
    number = newest.version + 1
    placed = replace(newest, version=number, spec=spec, backbone_id=spec["backbone"], gate=f"refused: {place}")
    store.add_version(placed, store.made_of("acme.intents"))
    store.close()
    hidden, view = str(settings.home), View.of(settings, "acme", trains=True)
    (version, *_) = adapters.read_versions(view, "acme.intents").versions
    assert (version.version, version.spec["data"]["train"]) == (number, f"{'a' * 64}.jsonl")
    assert hidden not in repr(version)
    for key, kept in ((key_of("acme"), False), (key_of("ops", "admin"), True)):
        assert (hidden.encode() in written(logged_in(key, "runs", job="ftjob-placed"))) == kept
        shown = logged_in(key)
        for name in (page for page in PAGES if page != "demo"):
            page = written(healthy(shown.switch_page(f"views/{name}.py").run()))
            assert kept or hidden.encode() not in page, name


def test_a_tenant_ends_its_own_jobs_alone_and_only_where_its_key_may(settings):
    mine, readers = View.of(settings, "acme", trains=True), View.of(settings, "acme", trains=False)
    store = Store(settings.database_url)
    theirs, own = (store.ask_for_job(tenant, "x", {}, key_id="key_x").id for tenant in ("globex", "acme"))
    assert jobs.cancel(mine, theirs) == jobs.cancel(mine, "ftjob-none") == "There is no such job."
    assert "scope train" in jobs.cancel(readers, own)
    assert [store.get_job(job).status for job in (theirs, own)] == ["validating_files"] * 2
    assert jobs.cancel(mine, own) == ""
    assert store.get_job(own).status == "cancelled"
    store.close()


def test_a_login_opens_what_the_key_is_for_and_says_why_it_opens_nothing(settings, key_of):
    def admitted(key, env=None):
        return login.admit(key, settings, env or {})

    admin = key_of("ops", "admin")
    assert admitted(admin) == admitted(f" {admin}\n") == login.OPERATOR
    assert admitted(key_of("acme", "read")) == login.Reader("acme", trains=False)
    assert admitted(key_of("acme", "infer", "train")) == login.Reader("acme", trains=True)
    for key, said in (
        (key_of("acme", "infer"), "may not look"),
        (key_of("acme", "read", adapters=("intents",)), "restricted to some adapters"),
        ("sk-pedro-nothing", "Incorrect API key"),
        ("", "needed"),
    ):
        with pytest.raises(AuthenticationError, match=said):
            admitted(key)
    with pytest.raises(UnavailableError, match="cannot be checked"):
        admitted(admin, {"PEDRO_GATEWAY_URL": "http://127.0.0.1:9"})


def test_a_key_that_is_revoked_closes_the_pages(settings, key_of, logged_in):
    import streamlit

    store = Store(settings.database_url)
    record, key = store.create_key("acme", ("read",))
    shown = logged_in(key, "runs")
    assert shown.dataframe
    store.revoke_key(record.id)
    streamlit.cache_data.clear()  # as after some seconds
    shown = healthy(shown.run())
    assert not shown.dataframe
    assert shown.text_input[0].label == "Key"
    store.close()


def test_a_tenant_sends_the_dashboard_nowhere_and_not_with_its_key(logged_in, key_of):
    shown = logged_in(key_of("acme"), "playground")
    assert [field.label for field in shown.sidebar.text_input] == ["API key"]
    shown.sidebar.text_input[0].set_value("").run()
    assert shown.sidebar.text_input[0].placeholder == "sk-pedro-…"
    shown = logged_in(key_of("ops", "admin"), "playground")
    assert [field.label for field in shown.sidebar.text_input] == ["Address", "API key"]


def test_on_this_machine_a_tenants_key_shows_its_view_and_no_key_shows_all(settings, key_of, monkeypatch):
    monkeypatch.delenv("PEDRO_DASHBOARD_REQUIRE_KEY", raising=False)
    shown = opener(monkeypatch, "playground")(settings.home)
    shown.text_input(key="gateway_key").set_value(key_of("acme", "infer")).run()
    shown = healthy(shown.switch_page("views/adapters.py").run())
    assert {*shown.dataframe[0].value["tenant"]} == {"acme"}
    shown.text_input(key="gateway_key").set_value("").run()
    assert {*healthy(shown).dataframe[0].value["tenant"]} == {"acme", *OTHERS}


def test_usage_is_summed_by_what_is_chosen_and_leaves_as_csv(settings, logged_in, key_of):
    shown = logged_in(key_of("ops", "admin"), "usage", time="All", by=["tenant", "key"])
    table = shown.dataframe[0].value
    assert [*table["tenant"]] == ["acme", *OTHERS]
    assert [*table["key_name"]] == ["acme-bot", "globex-bot", "initech-bot"]
    assert next(tile.value for tile in shown.metric if tile.label == "Requests") == "9"
    own = View.of(settings, "acme", trains=False)
    rows, problem = usage.read_usage(own, ["model", "day"], None)
    assert problem == ""
    (row,) = csv.DictReader(io.StringIO(usage.as_csv(rows, ["model", "day"])))
    assert (row["model"], row["day"], row["requests"], row["training_tokens"]) == ("acme.intents", DAY, "3", "5000")
    assert usage.read_usage(own, ["tenant"], None, "globex") == ([], "")
    assert usage.read_usage(settings, ["tenant"], "2026-11-21") == ([], "")
    assert {*usage.key_names(own).values()} >= {"acme-bot"}
    assert "globex-bot" not in usage.key_names(own).values()
