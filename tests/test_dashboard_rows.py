"""The rows behind a job's score on the page: filters, versions beside each other, labels, the test, the download."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from dashboard_app import healthy, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_comparison, add_jobs, add_rows

from pedro.comparison.run_files import read_comparison
from pedro.config import Settings
from pedro.store import Store
from pedro.training.scored_rows import FILE, ScoredRow, write_rows
from sources import rows as data

LABELS = ("play", "stop", "louder")


def made_rows(shift: int = 0) -> list[ScoredRow]:
    """Thirty rows of three labels: the adapter errs on every fifth, shifted; the backbone on all but every tenth."""
    return [
        ScoredRow(
            prompt=f"prompt {at}",
            wanted=LABELS[at % 3],
            answer=LABELS[at % 3] if (at + shift) % 5 else "noise" if at % 2 else LABELS[(at + 1) % 3],
            right=bool((at + shift) % 5),
            loss=0.1,
            backbone_answer=LABELS[at % 3] if at % 10 == 0 else "?",
            backbone_right=at % 10 == 0,
            backbone_loss=2.0,
        )
        for at in range(30)
    ]


@pytest.fixture
def home(tmp_path):
    """A home in which two versions of acme.intents have rows."""
    home = copy_of_home(tmp_path / "home")
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    add_jobs(settings)
    store = Store(settings.database_url)
    store.create_job("acme", "intents", {}, "ftjob-first")
    store.update_job("ftjob-first", status="running", submission_id="x")
    store.update_job("ftjob-first", status="succeeded", result={"model": "acme.intents:1", "metrics": {}})
    store.close()
    for job_id, shift in (("ftjob-0", 0), ("ftjob-first", 1)):
        target = Path(settings.storage) / "jobs" / job_id / FILE
        target.parent.mkdir(parents=True)
        write_rows(target, made_rows(shift))
    return home


def table(shown):
    return next(frame.value for frame in shown.dataframe if "wanted" in frame.value.columns)


def test_rows_are_filtered_searched_and_compared_with_the_backbone(monkeypatch, home):
    shown = opener(monkeypatch, "runs")(home, job="ftjob-0")
    assert len(table(shown)) == 30
    assert "24 are right (80.0%)" in words(shown.caption)
    assert "right where the other is wrong 24 times, wrong where it is right 3 times" in words(shown.markdown)
    healthy(shown.selectbox(key="rows_kind_past").select("Wrong").run())
    assert len(table(shown)) == 6
    assert not table(shown)["right"].any()
    healthy(shown.text_input(key="rows_text_past").set_value("prompt 10").run())
    assert list(table(shown)["prompt"]) == ["prompt 10"]


def test_two_versions_are_set_beside_each_other_on_the_adapters_page(monkeypatch, home):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    shown = opener(monkeypatch, "adapters")(home, adapter="acme.intents", version="2")
    healthy(shown.selectbox(key="rows_other_acme.intents:2").select("acme.intents:1").run())
    healthy(shown.selectbox(key="rows_kind_acme.intents:2").select("The two differ").run())
    differ = table(shown)
    assert len(differ) == 12
    assert (differ["right"] != differ["other_right"]).all()
    assert "Against acme.intents:1: 80.0% beside 80.0% on 30 rows" in words(shown.markdown)
    assert "p = 1.000" in words(shown.markdown)


def test_two_versions_differ_in_weights_measurements_and_curves(monkeypatch, home):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    shown = opener(monkeypatch, "adapters")(home, adapter="acme.intents", version="2")
    assert not drawn_runs(shown), "nothing is read before a version is chosen"
    healthy(shown.selectbox(key="beside_acme.intents:2").select("acme.intents:1").run())
    apart, measured = (frame.value for frame in shown.dataframe if "one" in frame.value.columns)
    assert list(apart["what"]) == ["Weights"], "their specifications are equal"
    (accuracy,) = measured.to_dict("records")
    assert accuracy["metric"] == "accuracy"
    assert accuracy["more"] == pytest.approx(0.22)
    assert drawn_runs(shown) == 1, "a colour a version"


def drawn_runs(shown) -> int:
    """How many charts have a colour for each run."""
    specs = (json.loads(chart.proto.spec) for chart in shown.get("vega_lite_chart"))
    return sum(spec.get("encoding", {}).get("color", {}).get("field") == "run" for spec in specs)


def test_a_job_without_rows_says_why_there_are_none(monkeypatch, tmp_path):
    home = copy_of_home(tmp_path / "home")
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    add_jobs(settings)
    shown = opener(monkeypatch, "runs")(home, job="ftjob-0")
    assert "No rows were kept of this job" in words(shown.caption)
    broken = Path(settings.storage) / "jobs" / "ftjob-0" / FILE
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing")
    assert "cannot be read" in words(opener(monkeypatch, "runs")(home, job="ftjob-0").warning)


def test_labels_are_counted_in_a_matrix_and_other_answers_are_something_else():
    cells = {(cell["wanted"], cell["answer"]): cell["rows"] for cell in data.confusion(made_rows())}
    assert sum(cells.values()) == 30
    assert sum(count for (wanted, answer), count in cells.items() if wanted == answer) == 24
    assert any(answer == "something else" for _, answer in cells)
    texts = [ScoredRow(f"p{at}", f"a text of its own {at}", "x", False, 1.0) for at in range(60)]
    assert data.confusion(texts) == [], "answers that are no labels"


def test_rows_stand_beside_those_of_the_same_question_alone():
    mine, theirs = made_rows(), made_rows(1)[:10]
    compared = data.beside(mine, theirs)
    assert [each.other is not None for each in compared] == [True] * 10 + [False] * 20
    assert len(data.chosen(compared, data.DIFFER)) == 4
    assert data.against_other(compared).rows == 10
    assert data.against_backbone([ScoredRow("p", "w", "a", True, 0.1)]) is None, "the backbone was not asked"


def test_the_download_is_what_is_shown_and_computes_nothing_in_a_spreadsheet():
    rows = data.beside([ScoredRow("=1+1", "w", "+a", True, 0.5)], [])
    (line,) = csv.DictReader(io.StringIO(data.as_csv(rows)))
    assert (line["prompt"], line["answer"], line["right"], line["loss"]) == ("'=1+1", "'+a", "True", "0.5")


def test_rows_of_a_comparison_are_right_or_wrong_and_two_methods_differ_on_some(monkeypatch, tmp_path):
    home = copy_of_home(tmp_path / "home")
    folder = add_comparison(home / "comparisons")
    open_page = opener(monkeypatch, "compare")
    asked = {"comparison": f"home/{folder.name}", "rows_task": "sst2"}
    assert "No rows were kept of these runs" in words(open_page(home, comparison=asked["comparison"]).caption)
    add_rows(folder)
    shown = open_page(home, **asked)
    run = shown.selectbox(key="rows_run_sst2")
    assert set(run.options) == {
        f"{label} · seed {seed}" for label in ("PEDRO", "LoRA", "(IA)³", "BitFit") for seed in (0, 1, 2)
    }
    healthy(run.select("PEDRO · seed 0").run())
    scores = {
        (each.label, each.seed, each.task): each.scores[0] for each in read_comparison(folder).runs if each.scores
    }
    mine, theirs = scores["PEDRO", 0, "sst2"], scores["BitFit", 0, "sst2"]
    right = sum(mine.per_row)
    assert f"200 of 200 rows shown; {right:.0f} are right ({mine.value:.1%})" in words(shown.caption)
    assert "loss" not in table(shown).columns, "what is not known is no column"
    healthy(shown.selectbox(key="rows_other_compare_sst2").select("BitFit · seed 0").run())
    healthy(shown.selectbox(key="rows_kind_compare_sst2").select("The two differ").run())
    differ = [row for row, pair in enumerate(zip(mine.per_row, theirs.per_row, strict=True)) if len(set(pair)) == 2]
    assert list(table(shown)["prompt"]) == [f"sst2 {row}" for row in differ]
    assert f"Against BitFit · seed 0: {mine.value:.1%} beside {theirs.value:.1%} on 200 rows" in words(shown.markdown)
    assert "McNemar" in words(shown.markdown)
    next((folder / "rows").glob("questions-*")).write_bytes(b"nothing")
    assert "cannot be read" in words(open_page(home, **asked).warning)
