"""The dashboard's comparisons: the same numbers as `pedro compare`, filters, fronts, curves, exports."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from comparisons import printed, result, rows_of, tables_of, write_comparison
from dashboard_app import DASHBOARD, healthy, opener, words
from dashboard_home import copy_of_home
from dashboard_results import add_comparison

from pedro.comparison.result_model import format_score
from pedro.comparison.run_files import read_comparison
from pedro.comparison.verdict import by_information, verdicts
from pedro.config import Settings
from pedro.registry import Registry

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
RESULTS = DASHBOARD.parent / "jobs" / "results"
TINY, FIGURE = "home/tiny_table1", "home/tiny_figure3"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two comparisons; tests that change something copy them."""
    folder = tmp_path_factory.mktemp("compare") / "comparisons"
    add_comparison(folder)
    add_comparison(folder, "tiny_figure3", (5000, 20000, 80000))
    return folder.parent


@pytest.fixture
def sources(monkeypatch):
    """The data functions, as the page imports them."""
    monkeypatch.syspath_prepend(str(DASHBOARD))
    import sources.compare
    import sources.mlflow_runs
    import sources.pareto

    return sources


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "compare")


class Tables(html.parser.HTMLParser):
    """The rows of HTML tables as texts of their cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        elif tag == "small":
            self.rows[-1][-1] += " "

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def shown_rows(shown) -> list[list[str]]:
    """The rows of the page's tables."""
    return Tables(body_of(shown)).rows


def body_of(shown) -> str:
    """The tables' HTML."""
    (drawn,) = (element for element in shown.get("html") if "<table>" in element.proto.body)
    return drawn.proto.body.partition("</style>")[2]


def test_the_table_is_the_one_that_pedro_compare_prints_number_by_number(page, made):
    seen = [row for row in shown_rows(page(made, comparison=TINY)) if row[0] != "method"]
    assert [row[0] for row in seen] == ["PEDRO", "LoRA", "(IA)³", "BitFit"]
    assert all(row[-1].count("[") == 1 for row in seen)
    numbers_agree(seen, printed(read_comparison(made / "comparisons" / "tiny_table1"), width=10_000))


@pytest.mark.parametrize("name", ["nano_table1", "nano_table4", "nano_figure3_template"])
def test_a_committed_comparison_is_shown_as_it_was_printed(page, tmp_path, name):
    shown = page(tmp_path / "home", comparison=f"results/{name}")
    seen = [row for row in shown_rows(shown) if row[0] != "method"]
    assert len(seen) > 1
    numbers_agree(seen, printed(read_comparison(RESULTS / name), width=10_000))
    assert not shown.warning
    assert "Learning curves" in words(shown.subheader)


def numbers_agree(seen: list[list[str]], printed: str) -> None:
    """Every row stands in the text, with its intervals beside the values or, in a wide table, on the line below."""
    lines = [NUMBER.findall(line) for line in printed.splitlines()]
    below = [one + two for one, two in itertools.pairwise([*lines, []])]
    for row in seen:
        values, spans = ([found for cell in row for found in NUMBER.findall(cell.partition("[")[at])] for at in (0, 2))
        assert NUMBER.findall(" ".join(row)) in lines or values + spans in below, row


def test_marks_are_those_of_the_table(page, made):
    shown = page(made, comparison=TINY)
    body = body_of(shown)
    (table,) = tables_of(read_comparison(made / "comparisons" / "tiny_table1"))
    marked = [entry for entry in table.entries.values() if entry.mark == "best"]
    assert {entry.label for entry in marked} == {"PEDRO"}
    assert body.count("<b>") == sum(entry.proven for entry in marked)
    assert body.count("<u>") == sum(entry.mark == "second" for entry in table.entries.values())
    assert "!" in next(row for row in shown_rows(shown) if row[0] == "BitFit")[3]


def test_filters_come_from_the_url_and_hold_for_everything(page, made):
    shown = page(made, comparison=TINY, tasks="sst2", methods=["LoRA", "PEDRO"])
    assert [row[0] for row in shown_rows(shown)] == ["method", "PEDRO", "LoRA"]
    assert shown_rows(shown)[0] == ["method", "parameters", "sst2"]
    assert shown.multiselect(key="tasks").value == ["sst2"]
    healthy(shown.multiselect(key="methods").set_value(["LoRA"]).run())
    assert [row[0] for row in shown_rows(shown)] == ["method", "LoRA"]
    healthy(shown.selectbox(key="comparison").select(FIGURE).run())
    assert len(shown_rows(shown)) == 3 * 2, "a table for each budget; what is filtered stays"


def test_only_parameters_that_differ_are_listed(sources, made):
    rows = sources.compare.differing(read_comparison(made / "comparisons" / "tiny_table1").runs)
    by_label = {row["method"]: row for row in rows}
    assert by_label["PEDRO"] == {"method": "PEDRO", "kind": "pedro", "r": "12", "lr": "0.01"}
    assert by_label["BitFit"]["lr"] == "0.003"
    assert "training.batch_size" not in by_label["PEDRO"]


def test_the_best_value_of_a_curve_is_told_beside_the_last(sources, made):
    runs = read_comparison(made / "comparisons" / "tiny_table1").runs
    rows = {row["method"]: row for row in sources.compare.best_values(runs, "sst2", "dev/loss")}
    assert rows["PEDRO"]["step"] == 125
    assert rows["PEDRO"]["best"] < rows["PEDRO"]["last"]
    assert rows["PEDRO"]["seeds"] == 3
    drawn = [row for row in sources.compare.curve_rows(runs, "sst2", "dev/loss") if row["method"] == "PEDRO"]
    assert [row["step"] for row in drawn] == list(range(25, 151, 25))
    assert all(row["low"] <= row["value"] <= row["high"] for row in drawn)


def test_a_method_is_unbeaten_unless_another_is_as_good_in_all_and_better_in_one(sources):
    pareto = sources.pareto

    def point(label, score, parameters, **more):
        return pareto.Point(label, "b", None, {"score": score, "parameters": parameters, **more})

    points = [point("a", 0.9, 100), point("b", 0.8, 50), point("c", 0.8, 60), point("d", 0.9, 100), point("e", 0.7, 40)]
    assert pareto.undominated(points, ["score", "parameters"]) == [True, True, False, True, True]
    assert [one.label for one in pareto.front(points, "parameters", "score")] == ["e", "b", "a", "d"]
    assert pareto.undominated(points, ["score"]) == [True, False, False, True, False]
    points.append(pareto.Point("f", "b", None, {"score": 1.0}))
    assert pareto.undominated(points, ["score", "parameters"])[-1] is False, "who lacks a metric cannot be compared"


def test_a_third_metric_keeps_what_two_would_drop(sources, made):
    selection = sources.compare.filter_comparison(read_comparison(made / "comparisons" / "tiny_table1"))
    points = {point.label: point for point in sources.pareto.points_of(selection)}
    assert points["PEDRO"].values["parameters"] == 20260
    assert points["PEDRO"].values["adapter_bytes"] == 4 * 20260
    table = selection.tables[0]
    assert points["LoRA"].values["score"] == table.entries["LoRA", "Avg."].value
    listed = list(points.values())
    two = sources.pareto.undominated(listed, ["score", "parameters"])
    three = sources.pareto.undominated(listed, ["score", "parameters", "tokens_per_second"])
    assert sum(three) >= sum(two)
    assert all(mark for mark, before in zip(three, two, strict=True) if before)


def test_what_was_measured_beside_scores_and_what_others_report_are_tables_of_the_page(sources, tmp_path):
    forgot = {"loss_before": 2.0, "loss": 2.5, "tokens": 64}
    runs = [
        result(label, "sst2", 0, rows_of("sst2", 0, 1.0, 20), saved_bytes=size, forgetting=forgot)
        for label, size in (("PEDRO", 80_000), ("LoRA", 120_000))
    ]
    folder = write_comparison(tmp_path / "made", runs)
    theirs = {**dict.fromkeys(("peft_type", "model", "data", "created", "peft_version"), "x"), "forgetting": None}
    numbers = dict.fromkeys(("seed", "lr", "steps", "accuracy", "parameters", "file_size", "memory", "seconds"), 1)
    (folder / "imported.json").write_text(json.dumps([{"experiment": "<script>", **theirs, **numbers}]))
    selection = sources.compare.filter_comparison(read_comparison(folder))
    beside = Tables(sources.compare.beside_html(selection)).rows
    assert ["PEDRO", "80.0", "+4.79"] in beside
    assert any(row[0].startswith("<script>") for row in beside), "as text"
    points = {point.label: point.values for point in sources.pareto.points_of(selection)}
    assert points["LoRA"]["saved_bytes"] == 120_000
    assert not sources.compare.beside_html(
        sources.compare.filter_comparison(
            read_comparison(write_comparison(tmp_path / "old", [result("A", "a", 0, [1])]))
        )
    )


def test_scores_stand_against_budgets_where_there_are_several(page, sources, made):
    shown = page(made, comparison=FIGURE)
    assert "Score against parameters" in words(shown.subheader)
    selection = sources.compare.filter_comparison(
        read_comparison(made / "comparisons" / "tiny_figure3"), ["sst2"], ["PEDRO"]
    )
    rows = sources.compare.budget_rows(selection, "sst2")
    assert [row["parameters"] for row in rows] == [5000, 20000, 80000]
    assert "Score against parameters" not in words(page(made, comparison=TINY).subheader)


def test_exports_hold_exactly_what_is_filtered(sources, made):
    selection = sources.compare.filter_comparison(
        read_comparison(made / "comparisons" / "tiny_table1"), ["sst2"], ["PEDRO", "LoRA"]
    )
    rows = list(csv.DictReader(io.StringIO(sources.compare.as_csv(selection))))
    assert [(row["label"], row["task"]) for row in rows] == [("PEDRO", "sst2"), ("LoRA", "sst2")]
    assert float(rows[0]["value"]) == selection.tables[0].entries["PEDRO", "sst2"].value
    tex = sources.compare.as_latex(selection)
    assert r"\begin{tabular}{lrr}" in tex
    assert "BitFit" not in tex
    assert sources.compare.as_png(selection).startswith(b"\x89PNG")


def test_the_papers_numbers_stand_beside_ours(page, made, tmp_path):
    home = copied(made, tmp_path)
    head = home / "comparisons" / "tiny_table1" / "comparison.json"
    tree = json.loads(head.read_text())
    tree["paper"] = {"source": "arXiv 2409.17834", "table": "table 1", "rows": {"PEDRO": {"sst2": 95.9}}}
    head.write_text(json.dumps(tree))
    shown = page(home, comparison=TINY)
    frame = next(d.value for d in shown.dataframe if "sst2, paper" in d.value.columns)
    assert frame["sst2, paper"][0] == 95.9
    (table,) = tables_of(read_comparison(head.parent))
    assert f"{frame['sst2, ours'][0]:.1f}" == format_score(table.entries["PEDRO", "sst2"].value, "accuracy")
    tree["paper"] = {"rows": 3}
    head.write_text(json.dumps(tree))
    assert "cannot be shown" in words(page(home, comparison=TINY).caption)


def test_a_small_twin_stands_beside_what_the_papers_own_experiment_carries(page, tmp_path):
    shown = page(tmp_path / "home", comparison="results/nano_table1")
    frame = next(d.value for d in shown.dataframe if "parameters (M), paper" in d.value.columns)
    row = frame[frame["method"] == "PEDRO"].iloc[0]
    assert (row["parameters (M), ours"], row["parameters (M), paper"]) == (0.02132, 8.9)
    assert "Llama-2-7b" in words(shown.caption)


def test_broken_files_are_named_with_the_reason_and_the_rest_is_shown(page, made, tmp_path):
    home = copied(made, tmp_path)
    runs = sorted((home / "comparisons" / "tiny_table1" / "runs").glob("*.json"))
    runs[0].write_text('{"id": 3')
    runs[1].write_text('{"state": "finished"}')
    (home / "comparisons" / "tiny_figure3" / "comparison.json").write_text("{")
    shown = page(home, comparison=TINY)
    assert runs[0].name in words(shown.warning)
    assert "missing" in words(shown.warning)
    assert len(shown_rows(shown)) == 5
    assert "comparison.json" in words(page(home, comparison=FIGURE).warning)


def test_runs_of_jobs_are_compared_by_seeds_and_by_what_differs(page, tmp_path):
    home = copy_of_home(tmp_path / "home")
    registry = Registry.open(Settings.from_env({"PEDRO_HOME": str(home)}))
    for lr, seed, accuracy in [(0.01, 0, 0.7), (0.01, 1, 0.74), (0.01, 2, 0.9), (0.001, 0, 0.5)]:
        spec = {
            "backbone": "stories260K",
            "method.name": "pedro",
            "method.r": 12,
            "training.lr": lr,
            "training.seed": seed,
        }
        run = registry.start_run(experiment="acme.support", name=f"job-{lr}-{seed}", params=spec, tags={})
        registry.log_metrics(run, 10, {"dev/loss": 1 - accuracy, "final/accuracy": accuracy, "final/seconds": 9.0})
        registry.finish_run(run)
    shown = page(home, comparison="mlflow/runs", models="acme.support")
    rows = {row[0]: row[2] for row in shown_rows(shown)}
    assert set(rows) == {"method", "pedro lr=0.01", "pedro lr=0.001"}
    assert rows["pedro lr=0.01"].startswith("74.0")
    assert rows["pedro lr=0.001"].startswith("50.0")


def test_jobs_are_not_called_equal_and_one_value_has_no_interval(page, tmp_path):
    home = copy_of_home(tmp_path / "home")
    registry = Registry.open(Settings.from_env({"PEDRO_HOME": str(home)}))
    for model, steps in (("acme.support", 60), ("globex.topics", 300)):
        for name in ("pedro", "lora"):
            spec = {"backbone": "stories260K", "method.name": name, "training.batch_size": 16}
            run = registry.start_run(experiment=model, name=f"{model}-{name}", params=spec, tags={})
            registry.log_metrics(run, steps, {"final/accuracy": 0.8, "final/steps": float(steps)})
            registry.finish_run(run)
    shown = page(home, comparison="mlflow/runs", models=["acme.support", "globex.topics"])
    notes = words([*shown.caption, *shown.markdown])
    assert (
        "Nothing was held equal for these jobs: steps 300 (globex.topics), 60 (acme.support); rows a step 16." in notes
    )
    assert "Equal for all methods" not in notes
    assert "[" not in body_of(shown)


def test_the_page_opens_with_what_the_statistics_say_by_the_tasks_own_names(page, sources, made):
    shown = page(made, comparison=TINY)
    said = words(shown.markdown)
    (table,) = tables_of(read_comparison(made / "comparisons" / "tiny_table1"))
    for each in verdicts(table):
        title = {"sst2": "Sentiment of a sentence", "snips": "Intent of a voice command"}.get(each.task, each.task)
        assert sources.compare.literal(each.sentence(title)) in said
    assert said.index("On average") < said.index("On Intent of a voice command")
    assert "Holm" in words(shown.caption)
    titles = shown.selectbox(key="comparison").options
    assert "Four methods on stories260K (tiny_table1)" in titles, "titles and not folders"
    assert shown.query_params["comparison"] == TINY, "the URL keeps the folder"


def test_differences_to_a_chosen_baseline_are_shown_and_shared(page, made):
    shown = page(made, comparison=TINY, show="Differences", baseline="LoRA")
    assert "Minus LoRA" in words(shown.caption)
    assert "for the 9 differences shown" in words(shown.caption), "three methods on two tasks and their average"
    scores = page(made, comparison=TINY)
    assert "Medians over seeds with 95 % intervals" in words(scores.caption)


def test_chance_is_drawn_where_scores_are_near_it():
    from components.verdict import near_chance

    def row(low, high, chance):
        return {"value": (low + high) / 2, "low": low, "high": high, "chance": chance}

    assert near_chance([row(60.0, 70.0, 51.0), row(55.0, 62.0, 51.0)]) == [51.0]
    assert near_chance([row(80.0, 90.0, 14.0)]) == [], "the axis would be spent on the way to it"
    assert near_chance([{**row(5.0, 6.0, None), "low": None, "high": None}]) == []


def test_of_several_tables_one_is_judged_and_all_are_listed(page, made):
    shown = page(made, comparison=FIGURE)
    box = shown.selectbox(key="table")
    assert box.options == [f"stories260K · {budget} parameters" for budget in ("5,000", "20,000", "80,000")]
    healthy(box.select("stories260K · 80,000 parameters").run())


def test_the_sortable_table_holds_numbers(page, made):
    shown = page(made, comparison=TINY)
    frame = next(d.value for d in shown.dataframe if "sst2" in d.value.columns)
    (table,) = tables_of(read_comparison(made / "comparisons" / "tiny_table1"))
    assert frame["sst2"].dtype == float
    assert frame.set_index("method")["sst2"]["LoRA"] == pytest.approx(100 * table.entries["LoRA", "sst2"].value)


def test_names_beside_the_costs_never_lie_on_each_other(sources):
    from components import costs

    rows = [{"method": f"m{at}", "x": 10.0**at, "y": 50 + at % 2, "low": 49.0, "high": 52.0} for at in range(14)]
    frame = pd.DataFrame(rows)
    across, up = costs._Axis.of(frame, "parameters", "x", costs.LABELS), costs._Axis.of(frame, "score", "y", 0.0)
    placed = costs.placed(frame, across, up, 380)
    heights = sorted(380 * up.share(y) for y in placed["label_y"])
    assert min(b - a for a, b in itertools.pairwise(heights)) >= costs.LABEL_PX - 1e-6
    assert 0 <= heights[0] <= heights[-1] <= 380
    assert placed["label_x"].min() > frame["x"].max(), "beside the points"


def test_curves_are_smoothed_without_a_bias_at_their_beginning():
    from components.curves import smoothed

    frame = pd.DataFrame({"method": ["a"] * 3 + ["b"], "step": [1, 2, 3, 1], "value": [4.0, 2.0, 2.0, 9.0]})
    assert list(smoothed(frame, 0.0)) == [4.0, 2.0, 2.0, 9.0]
    half = list(smoothed(frame, 0.5))
    assert half[0] == 4.0
    assert half[1] == pytest.approx((2 + 0.5 * 4) / 1.5)
    assert half[3] == 9.0, "a method's own alone"


def test_the_first_curve_is_of_the_task_that_tells_most(sources, made):
    selection = sources.compare.filter_comparison(read_comparison(made / "comparisons" / "tiny_table1"))
    assert sources.compare.first_curve(selection.runs, selection.tables[0]) == next(
        task for task in by_information(selection.tables[0]) if task != "Avg."
    )


def test_an_unknown_name_in_a_shared_url_is_an_error_and_not_another_comparison(page, made):
    shown = page(made, comparison="home/gone")
    assert "`home/gone`: not found" in words(shown.error)
    assert shown.selectbox(key="comparison").value is None
    assert not shown.subheader, "no other comparison is shown in its place"
    healthy(shown.selectbox(key="comparison").select(TINY).run())
    assert not shown.error
    shown = page(made, comparison=TINY, methods=["PEDRO", "Oracle"])
    assert "Method `Oracle`: not found" in words(shown.error)
    assert not page(made, comparison=TINY, methods=["PEDRO"]).error


def test_a_home_without_results_says_how_to_make_some(page, tmp_path, monkeypatch, sources):
    monkeypatch.setattr(sources.compare, "CHECKOUT", tmp_path)
    assert "pedro compare" in words(page(tmp_path / "nothing").info)
    assert not (tmp_path / "nothing").exists()


def test_committed_results_can_all_be_read(sources, tmp_path):
    listed = sources.compare.list_comparisons(Settings.from_env({"PEDRO_HOME": str(tmp_path)}))
    for one in listed:
        comparison = sources.compare.read_listed(one)
        assert comparison.problems == (), one.key
        assert sources.compare.choices(comparison).labels


def copied(made: Path, target: Path) -> Path:
    import shutil

    return shutil.copytree(made, target / "home")
