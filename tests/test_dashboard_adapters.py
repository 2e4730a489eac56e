"""The Adapters page: catalog, lineage, and a champion moved through a real gateway over the same registry."""

from __future__ import annotations

import json
import shutil

import dashboard_gateway
import pytest
from dashboard_app import healthy, opener, words
from dashboard_home import make_home
from dashboard_results import add_jobs
from serving_adapters import register, stub_adapter

from pedro.config import Settings
from pedro.registry import Registry, Version
from sources import adapters
from sources.adapters import CatalogRow


def row(name, champion=1, candidate=None, previous=None):
    return CatalogRow(name, champion, candidate, previous, "2026-11-20T12:00:00+00:00")


ROWS = [row("acme.faq"), row("acme.intents", 2, 3, 1), row("globex.faq", None), row("initech.tone", 4, 5)]


def version(**fields):
    empty = {
        "tenant": "acme", "adapter": "faq", "version": 1, "digest": "sha256:" + "ab" * 32, "backbone_id": "stories260K",
        "backbone_digest": "sha256:bb", "method": "pedro", "trainable_parameters": 10, "metrics": {}, "spec": {},
        "gate": "", "run_id": "r1", "created": "2026-11-20T12:00:00Z",
    }  # fmt: skip
    return Version(**{**empty, **fields})


def names(found):
    return [one.name for one in found]


# the catalog


def test_words_tenants_and_states_narrow_the_catalog_down():
    assert names(adapters.search(ROWS, "FAQ")) == ["acme.faq", "globex.faq"]
    assert names(adapters.search(ROWS, "acme int")) == ["acme.intents"]
    assert names(adapters.search(ROWS, "", ["globex", "initech"])) == ["globex.faq", "initech.tone"]
    assert names(adapters.search(ROWS, state="With a candidate")) == ["acme.intents", "initech.tone"]
    assert names(adapters.search(ROWS, state="Without a champion")) == ["globex.faq"]
    assert names(adapters.search(ROWS, state="In service")) == ["acme.faq", "acme.intents", "initech.tone"]
    assert adapters.search(ROWS, "nix") == []


def test_five_hundred_adapters_come_in_pages():
    rows = [row(f"tenant{i % 20:02d}.adapter-{i:03d}") for i in range(500)]
    assert adapters.pages_of(rows) == 20
    shown = [one["adapter"] for number in range(1, 21) for one in adapters.page_rows(rows, number)]
    assert shown == [one.name.partition(".")[2] for one in rows]
    assert adapters.page_rows(rows, 99) == adapters.page_rows(rows, 20)
    assert adapters.page_rows(rows, -1) == adapters.page_rows(rows, 1)
    assert adapters.pages_of([]) == 1


# one version


def test_the_gates_verdict_is_a_word_and_a_reason():
    assert adapters.gate_of(version(gate="passed: accuracy 0.9: gain +0.2")) == ("passed", "accuracy 0.9: gain +0.2")
    assert adapters.gate_of(version(gate="refused: floor"))[0] == "refused"
    assert adapters.gate_of(version(gate="imported: not gated"))[0] == "imported"
    assert adapters.gate_of(version())[0] == "not gated"
    assert adapters.gate_of(version(gate="strange")) == ("not gated", "strange")


def test_lineage_names_what_a_version_was_made_from():
    manifest = {
        "backbone": {"tokenizer_digest": "sha256:tt"},
        "data_digest": "sha256:dd",
        "method": {"name": "pedro", "options": {"r": 12}},
        "prompt_format": {"id": "chat"},
        "spec": {"data": {"train": "/data/train.jsonl"}, "training": {"lr": 0.01}},
        "sweep": {"id": "sweep-1", "name": "ranks", "trial": 4, "parameters": {"method.r": 12}},
        "versions": {"torch": "2.13.0"},
    }
    facts = dict(adapters.lineage(version(aliases=("champion",), promoted="2026-11-21T00:00:00Z"), manifest))
    assert facts["Sweep"] == "ranks · sweep-1"
    assert facts["Trial"] == "4: method.r = 12"
    assert facts["Data"] == "sha256:dd"
    assert facts["Method"] == "pedro r=12"
    assert facts["Tokenizer digest"] == "sha256:tt"
    assert facts["Training file"] == "train.jsonl"
    assert facts["Champion since"] == "2026-11-21T00:00:00Z"
    assert "lr: 0.01" in adapters.spec_text(version(), manifest)


@pytest.mark.parametrize(
    "manifest", [None, {}, {"spec": 3, "sweep": [], "versions": "x", "method": None, "backbone": 1}]
)
def test_a_manifest_of_any_shape_gives_what_the_registry_knows(manifest):
    facts = dict(adapters.lineage(version(), manifest))
    assert facts["Weights"].startswith("sha256:")
    assert "Sweep" not in facts
    assert adapters.spec_text(version(spec={"tenant": "acme"}), manifest) == "tenant: acme\n"


def test_metrics_of_any_kind_are_shown_and_only_numbers_are_drawn():
    odd = version(metrics={"accuracy": float("nan"), "loss": 0.25, "split": "test", "rows": 400, "x": None, "y": True})
    assert adapters.metric_rows(odd)[1:] == [
        {"metric": "loss", "value": "0.25"},
        {"metric": "rows", "value": "400"},
        {"metric": "split", "value": "test"},
    ]
    (shown,) = adapters.version_rows([odd])
    assert (shown["accuracy"], shown["loss"]) == (None, 0.25)
    assert adapters.number_of(None, "accuracy") is None


# the page


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = dashboard_gateway.make_adapters(tmp_path_factory.mktemp("adapters"))
    with dashboard_gateway.running(settings) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("made") / "home").home


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    return opener(monkeypatch, "adapters")


@pytest.fixture
def admin(page, served, monkeypatch):
    """The page with an admin key from the environment."""
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    monkeypatch.setenv("PEDRO_ADMIN_KEY", served.admin)
    return lambda **query: page(served.settings.home, **query)


def button(shown, label):
    return next(one for one in shown.button if one.label.startswith(label))


def figures(shown):
    return {metric.label: metric.value for metric in shown.metric}


def test_a_version_is_promoted_and_rolled_back_after_a_confirmation(admin, served):
    shown = admin(adapter="acme.faq")
    assert figures(shown) == {"Champion": "v2", "Previous": "v1", "Candidate": "v3", "Resident": "no"}
    assert "refused by the gate" in words(shown.markdown)
    button(shown, "Promote v3").click().run()
    healthy(shown)
    assert served.registry.get("acme.faq").version == 2, "nothing moves before it is confirmed"
    assert "accuracy 0.5000 against 0.7000" in words(shown.warning)
    shown.button(key="move_yes").click().run()
    healthy(shown)
    assert "v3 is the champion now" in words(shown.success)
    assert served.registry.get("acme.faq").version == 3
    assert figures(shown)["Champion"] == "v3"
    button(shown, "Roll back to v2").click().run()
    shown.button(key="move_no").click().run()
    assert served.registry.get("acme.faq").version == 3, "a cancelled change changes nothing"
    button(healthy(shown), "Roll back to v2").click().run()
    shown.button(key="move_yes").click().run()
    assert "v2 is the champion now" in words(healthy(shown).success)
    assert served.registry.get("acme.faq").version == 2


def test_after_a_roll_back_the_page_looks_at_the_new_champion_and_says_so_beside_the_buttons(admin, served):
    served.registry.promote("acme.faq", 1), served.registry.promote("acme.faq", 2)
    shown = admin(adapter="acme.faq")
    assert shown.selectbox(key="version_acme.faq").value == 3, "the newest at first"
    button(shown, "Roll back to v1").click().run()
    shown.button(key="move_yes").click().run()
    assert figures(healthy(shown))["Champion"] == "v1"
    assert shown.selectbox(key="version_acme.faq").value == 1
    below = [element.type for element in shown.main if element.type in ("success", "header", "button")]
    assert below.index("success") > below.index("header"), "not above what the reader looks at"
    button(shown, "Roll back to v2").click().run()
    shown.button(key="move_yes").click().run()
    assert shown.selectbox(key="version_acme.faq").value == 2
    assert "v2 is the champion now" in words(healthy(shown).success)


def test_the_question_tells_where_both_versions_have_the_same_weights(admin, served):
    for number in (1, 2):
        made = stub_adapter(served.settings.home / f"same-{number}", "sha256:same", "sha256:b")
        served.registry.promote("acme.same", register(served.registry, made, "acme.same").version)
    shown = admin(adapter="acme.same")
    button(shown, "Roll back to v1").click().run()
    assert "have the same weights" in words(healthy(shown).info)
    shown.button(key="move_no").click().run()
    served.registry.delete("acme.same")  # others count what is there
    shown = admin(adapter="acme.faq")
    button(shown, "Roll back").click().run()
    assert "have the same weights" not in words(healthy(shown).info)


def test_a_link_opens_the_version_that_it_names_and_leads_to_its_job_and_to_a_chat(page, made, tmp_path):
    home = shutil.copytree(made, tmp_path / "home")
    add_jobs(Settings.from_env({"PEDRO_HOME": str(home)}))
    shown = page(home, adapter="acme.intents", version="1")
    assert shown.selectbox(key="version_acme.intents").value == 1
    shown = page(home, adapter="acme.intents", version="2")
    linked = {link.proto.label: link.proto.query_string for link in shown.get("page_link")}
    assert linked == {
        "Chat with it": "model=acme.intents%3A2",
        "Trained by ftjob-0": "job=ftjob-0",
        "Compare its runs": "comparison=mlflow%2Fruns&models=acme.intents",
    }


def test_an_adapter_that_is_not_there_is_an_error_by_name(page, made):
    shown = page(made, adapter="acme.gone")
    assert "`acme.gone`: not found" in words(shown.error)
    assert not shown.header


def test_a_refusal_of_the_gateway_is_told_in_its_words(admin, served):
    shown = admin(adapter="globex.faq")
    assert button(shown, "Roll back").disabled
    assert button(shown, "Promote v1").disabled, "it is the champion already"
    extra = register(served.registry, stub_adapter(served.settings.home / "x", "sha256:x", "sha256:b"), "globex.gone")
    shown = admin(adapter="globex.gone")
    register(served.registry, stub_adapter(served.settings.home / "y", "sha256:y", "sha256:b"), "globex.gone")
    shown = admin(adapter="globex.gone")
    shown.selectbox(key="version_globex.gone").set_value(extra.version).run()
    button(healthy(shown), "Promote v1").click().run()
    served.registry.delete("globex.gone")
    shown.button(key="move_yes").click().run()
    assert "globex.gone" in words(healthy(shown).error)


def test_a_search_finds_an_adapter_and_keeps_it(admin, served):
    shown = admin()
    assert list(shown.dataframe[0].value["tenant"]) == ["acme", "globex"]
    shown.text_input[0].set_value("globex").run()
    assert healthy(shown).selectbox(key="adapter").value == "globex.faq"
    shown = admin(adapter="globex.faq")
    assert shown.selectbox(key="adapter").value == "globex.faq"
    shown.text_input[0].set_value("nowhere").run()
    assert "None of 2 adapters match" in words(healthy(shown).caption)


def test_without_a_gateway_everything_is_shown_and_nothing_can_be_moved(page, made):
    shown = page(made, adapter="acme.intents")
    assert "pedro serve" in words(shown.info)
    assert figures(shown)["Champion"] == "v2"
    assert all(one.disabled for one in shown.button if one.label.startswith(("Promote", "Roll back")))
    assert "acme.intents" in words(shown.header)


def test_with_a_tenants_key_nothing_can_be_moved(page, served, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    shown = page(served.settings.home)
    shown.text_input(key="gateway_key").set_value(served.acme).run()
    assert "admin key" in words(healthy(shown).info)
    assert button(shown, "Promote").disabled
    shown.text_input(key="gateway_key").set_value(served.admin).run()
    assert not healthy(shown).info
    assert not button(shown, "Promote").disabled
    assert all(served.admin not in str(element.value) for element in (*shown.caption, *shown.markdown, *shown.info))


def test_an_empty_home_says_which_command_fills_it_and_stays_empty(page, tmp_path):
    shown = page(tmp_path / "nothing")
    assert "pedro submit" in words(shown.info)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"


def test_files_that_are_gone_or_broken_are_told_and_the_registrys_part_is_shown(page, made, tmp_path):
    home = shutil.copytree(made, tmp_path / "home")
    shutil.rmtree(made / "artifacts" if not (home / "artifacts").is_dir() else home / "artifacts", ignore_errors=True)
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    registry = Registry.open(settings)
    directory = stub_adapter(tmp_path / "new", "new", "sha256:bb")
    broken = register(registry, directory, "umbrella.odd")
    cached = settings.cache / "adapters" / f"{broken.digest.removeprefix('sha256:')}-{broken.run_id}"
    cached.mkdir(parents=True)
    (cached / "pedro_adapter.json").write_text("[]")
    shown = page(home, adapter="umbrella.odd")
    assert "cannot be read" in words(shown.warning)
    assert broken.digest[:19] in shown.dataframe[2].value.to_string()
    (cached / "pedro_adapter.json").write_text(json.dumps({"spec": "x", "sweep": 3}))
    shown = page(home, adapter="umbrella.odd")
    assert not shown.warning


def test_a_registry_that_cannot_be_read_is_told(page, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlflow.db").write_text("this is no database")
    shown = page(tmp_path / "home")
    assert "The registry cannot be read" in words(shown.warning)
