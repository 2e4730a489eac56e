"""What a comparison's tables say is what its runs hold: medians, intervals, marks, notes, in every form they print."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparisons import entries_of, printed, result, rows_of, tables_of, whole, write_comparison

from pedro.comparison.figures import _legend, grouped
from pedro.comparison.report import make_report, write_report
from pedro.comparison.result_model import AVERAGE, Comparison, RunResult
from pedro.comparison.run_files import read_comparison, write_run
from pedro.comparison.statistics import Runs, bootstrap, interval, median
from pedro.comparison.tables import select
from pedro.errors import ConfigError

SKILLS = {"PEDRO": 1.2, "LoRA": 1.1, "Full": 3.0}
TASKS = {"sst2": 1.0, "rte": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Comparison:
    """Three methods, a task on which one is far better, a task on which nobody learns anything; with its report."""
    found = read_comparison(whole(tmp_path_factory.mktemp("made"), SKILLS, TASKS, rows=300))
    write_report(make_report(found))
    return found


def of(folder: Path, *results: RunResult, **metadata: object) -> Comparison:
    return read_comparison(write_comparison(folder, results, **metadata))


def entry(comparison: Comparison, label: str, task: str = "sst2"):
    (found,) = [one for one in entries_of(comparison) if (one.label, one.task) == (label, task)]
    return found


# results


def test_a_run_comes_back_from_its_file_as_it_was_written(tmp_path):
    results = [result("PEDRO", "sst2", 0, [1, 0, 1], budget=20_000), result("LoRA", "sst2", 0)]
    back = {one.id: one for one in of(tmp_path, *results).runs}
    assert back == {one.id: one for one in results}
    assert not list((tmp_path / "runs").glob("*.new")), "a scratch file was left"


def test_a_failed_run_is_written_with_null_for_what_was_not_measured(tmp_path):
    write_run(tmp_path, replace(result("LoRA", "sst2", 0), trainable_parameters=0, seconds=0.0))
    (path,) = (tmp_path / "runs").iterdir()
    tree = json.loads(path.read_text())
    assert tree["state"] == "failed"
    assert tree["scores"] == []
    assert tree["trainable_parameters"] is None
    assert tree["seconds"] is None
    assert tree["validation"] is None


def test_a_loss_that_is_nan_makes_no_broken_json(tmp_path):
    of(tmp_path, replace(result("LoRA", "sst2", 0), curves={"dev/loss": [[50, float("nan")]]}))
    (path,) = (tmp_path / "runs").iterdir()
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["curves"] == {"dev/loss": [[50, None]]}
    assert np.isnan(read_comparison(tmp_path).runs[0].curves["dev/loss"][0][1])


def test_a_run_of_another_version_with_unknown_and_missing_keys_still_reads(tmp_path):
    one = result("LoRA", "sst2", 0, [1, 0])
    tree = {**one.to_dict(), "weather": "fine", "scores": [{**one.scores[0].to_dict(), "mood": 3}]}
    del tree["curves"], tree["scoring_seconds"], tree["title"]
    assert RunResult.from_dict(tree) == replace(one, curves={}, scoring_seconds=0.0, title="")


def test_broken_files_are_listed_with_their_reason_and_the_rest_is_read(tmp_path):
    good = result("LoRA", "sst2", 0, [1, 0])
    write_comparison(tmp_path, [good])
    tree = good.to_dict()
    broken = {
        "half": '{"schema": 1, "id": ',
        "list": "[]",
        "newer": json.dumps({**tree, "schema": 2}),
        "nameless": json.dumps({**tree, "label": None}),
        "odd": json.dumps({**tree, "state": "asleep"}),
        "typed": json.dumps({**tree, "seed": "zero"}),
        "scored": json.dumps({**tree, "scores": [{"task": "sst2", "metric": "accuracy"}]}),
        "copied": json.dumps(tree),
    }
    for name, text in broken.items():
        (tmp_path / "runs" / f"{name}.json").write_text(text)
    found = read_comparison(tmp_path)
    assert found.runs == (good,)
    problems = dict(problem.split(": ", 1) for problem in found.problems)
    assert set(problems) == {f"runs/{name}.json" for name in broken}
    assert "not JSON" in problems["runs/half.json"]
    assert "schema: 2 is newer" in problems["runs/newer.json"]
    assert problems["runs/nameless.json"] == "run: label missing"
    assert "expected finished or failed, got 'asleep'" in problems["runs/odd.json"]
    assert "run.seed: expected a whole number" in problems["runs/typed.json"]
    assert problems["runs/scored.json"] == "score: value missing"
    assert problems["runs/copied.json"].startswith("run.id: expected copied, as the file is called, got")
    assert "8 files could not be read" in printed(found)


def test_the_head_counts_every_run_and_its_minutes_also_those_that_found_a_learning_rate(tmp_path):
    trained = {"seconds": 240.0, "scoring_seconds": 60.0}
    runs = [result("LoRA", "sst2", seed, [1, 0], **trained) for seed in (0, 1)]
    tried = result("LoRA", "sst2", 2, [1, 0], stage="tune", **trained)
    assert "made: 3 runs, 2 of them in the tables · 15 worker-minutes" in printed(of(tmp_path, *runs, tried))


def test_what_is_broken_in_the_head_is_listed_and_left_out(tmp_path):
    odd = {"spec": "x", "labels": "LoRA", "title": 7, "provenance": 3, "baseline": 0, "equal": "all"}
    found = of(tmp_path, result("LoRA", "sst2", 0, [1, 0]), **odd)
    assert {problem.split(": ")[1] for problem in found.problems} == set(odd)
    assert "comparison.json: title: expected text, got 7" in found.problems
    assert "LoRA" in printed(found)
    write_report(make_report(found))


def test_a_comparison_whose_metadata_is_broken_has_problems_and_no_runs(tmp_path):
    write_comparison(tmp_path / "a" / "one", [result("LoRA", "sst2", 0, [1])])
    write_comparison(tmp_path / "b" / "two", [result("LoRA", "sst2", 0, [1])])
    (tmp_path / "b" / "two" / "comparison.json").write_text("{")
    one, two = read_comparison(tmp_path / "a" / "one"), read_comparison(tmp_path / "b" / "two")
    assert len(one.runs) == 1
    assert not one.problems
    assert not two.runs
    assert two.problems
    assert "No run has finished yet" in printed(two)
    with pytest.raises(ConfigError, match=r"holds no comparison: comparison\.json: not JSON"):
        write_report(make_report(two))


# statistics


def bootstrap_interval(runs: Runs) -> tuple[float, float]:
    return interval(bootstrap({"": runs})[""])


def paired_interval(a: Runs, b: Runs) -> tuple[float, float]:
    samples = bootstrap({"a": a, "b": b})
    return interval(samples["a"] - samples["b"])


def test_the_median_is_the_middle_or_the_mean_of_the_two_in_the_middle():
    assert median([0.7, 0.9, 0.2]) == 0.7
    assert median([0.7, 0.9, 0.2, 0.8]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_the_interval_is_that_of_a_plain_loop_over_drawn_seeds_and_rows():
    runs = np.array([rows_of("sst2", seed, 0.5, 60, spread=0.5) for seed in range(3)])
    random, medians = np.random.default_rng(7), []
    for _ in range(2500):
        rows = random.integers(0, 60, 60)
        medians.append(np.median([runs[seed][rows].mean() for seed in random.integers(0, 3, 3)]))
    assert bootstrap_interval(runs) == pytest.approx(np.quantile(medians, [0.025, 0.975]), abs=0.02)
    assert bootstrap_interval(runs) == bootstrap_interval(runs.tolist())


def test_a_paired_difference_is_found_where_the_methods_own_intervals_overlap():
    better = [rows_of("sst2", seed, 0.0, 400, spread=0.0) for seed in range(3)]
    worse = [np.where(np.arange(400) % 20 == 0, 0.0, rows) for rows in better]  # loses what it had on 5 % of the rows
    low, _ = bootstrap_interval(better)
    _, high = bootstrap_interval(worse)
    assert low < high
    low, high = paired_interval([better[0]] * 3, [worse[0]] * 3)
    assert 0 < low < better[0].mean() - worse[0].mean() < high


def test_equal_methods_have_a_paired_interval_that_holds_zero():
    a, b = ([rows_of("sst2", seed, 0.5, 400, label=label) for seed in range(3)] for label in "ab")
    low, high = paired_interval(a, b)
    assert low < 0 < high
    assert paired_interval(a[:1], a[:1]) == (0.0, 0.0)


def test_the_interval_holds_the_true_value_about_as_often_as_it_says():
    truth = np.mean([rows_of("sst2", seed, 0.5, 200, spread=0.2).mean() for seed in range(1000, 1400)])
    held = 0
    for trial in range(60):
        runs = [rows_of("sst2", 3 * trial + seed, 0.5, 200, spread=0.2) for seed in range(3)]
        low, high = bootstrap_interval(runs)
        held += low <= truth <= high
    assert held >= 54


# tables


def test_values_are_medians_over_seeds_and_the_average_is_their_mean(tmp_path):
    def runs(label, task, *correct):
        return [result(label, task, seed, [1] * n + [0] * (10 - n)) for seed, n in enumerate(correct)]

    found = of(tmp_path, *runs("A", "sst2", 9, 5, 6), *runs("A", "rte", 4, 4, 8), *runs("B", "sst2", 2, 3, 2))
    (table,) = tables_of(found)
    assert table.entries["A", "sst2"].value == 0.6
    assert table.entries["A", "sst2"].values == ((0, 0.9), (1, 0.5), (2, 0.6))
    assert table.entries["A", "rte"].value == 0.4
    assert table.entries["A", AVERAGE].value == pytest.approx(0.5)
    assert ("B", AVERAGE) not in table.entries, "B did not run on every task"
    assert table.rows == ("A", "B")
    assert table.columns == ("sst2", "rte", AVERAGE)


def test_the_order_is_that_of_the_spec_and_a_view_may_be_narrower(made):
    (table,) = tables_of(made)
    assert table.rows == tuple(SKILLS)
    assert table.columns == (*TASKS, AVERAGE)
    (narrow,) = tables_of(made, tasks=["sst2"], labels=["LoRA", "PEDRO"])
    assert narrow.rows == ("PEDRO", "LoRA")
    assert narrow.columns == ("sst2",)
    assert {one.mark for one in narrow.entries.values()} == {"best", "second"}, "marks are those among what is shown"
    assert narrow.entries["LoRA", "sst2"].low == table.entries["LoRA", "sst2"].low, "intervals are each its own"


def test_the_best_is_proven_only_where_its_differences_to_all_others_exclude_zero(made):
    full, best = entry(made, "Full"), max(entries_of(made, tasks=["rte"]), key=lambda one: one.value or 0)
    assert (full.mark, full.proven) == ("best", True)
    assert (best.mark, best.proven) == ("best", False)
    assert [one.label for one in entries_of(made, tasks=["sst2"]) if one.mark == "second"] != ["Full"]


def test_one_seed_proves_nothing(made, tmp_path):
    alone = of(tmp_path, *(one for one in made.runs if one.seed == 0))
    assert entry(alone, "Full").mark == "best"
    assert not any(one.proven or (one.gain and one.gain.proven) for one in entries_of(alone))
    assert "with one seed of rows alone" in printed(alone)


def test_scores_on_different_rows_prove_nothing(tmp_path):
    good, bad = [1, 1, 1, 1] * 10, [0, 0, 0, 0] * 10
    runs = [result(label, "sst2", seed, rows) for label, rows in (("A", good), ("B", bad)) for seed in (0, 1, 2)]
    assert entry(of(tmp_path / "same", *runs), "A").proven
    runs[-3:] = [result("B", "sst2", seed, bad[:-1]) for seed in (0, 1, 2)]
    assert not entry(of(tmp_path / "fewer", *runs), "A").proven


def test_an_entry_is_at_chance_where_its_interval_holds_the_majority_rate_or_lies_below(tmp_path):
    def runs(label, share):
        return [result(label, "rte", seed, [1] * share + [0] * (100 - share), majority=0.53) for seed in range(3)]

    found = of(tmp_path, *runs("Good", 80), *runs("Guess", 55), *runs("Worse", 20))
    assert [entry(found, label, "rte").at_chance for label in ("Good", "Guess", "Worse")] == [False, True, True]
    text = printed(found, width=1000)
    assert "_55.0_†" in text
    assert "† at chance" in text
    assert "rte 53.0" in text


def test_failed_runs_are_counted_and_their_reason_told(tmp_path):
    results = [result("A", "sst2", seed, rows_of("sst2", seed, 3.0, 200)) for seed in range(3)]
    results += [result("B", "sst2", 0, rows_of("sst2", 0, 0.0, 200)), result("B", "sst2", 1), result("B", "sst2", 2)]
    results += [result("C", "sst2", seed) for seed in range(3)]
    found = of(tmp_path, *results)
    assert (entry(found, "B").failed, entry(found, "B").seeds) == (2, 1)
    assert entry(found, "C").value is None
    text = printed(found, width=1000)
    assert "failed 3/3" in text
    assert "B on sst2: 2 of 3 runs failed (training: the loss is nan at step 30)" in text
    assert "B on sst2: 1)" in text


def test_a_best_whose_runs_failed_in_part_is_not_proven(tmp_path):
    results = [result("A", "sst2", seed, rows_of("sst2", seed, 3.0, 200)) for seed in range(2)] + [
        result("A", "sst2", 2)
    ]
    results += [result("B", "sst2", seed, rows_of("sst2", seed, 0.0, 200)) for seed in range(3)]
    found = entry(of(tmp_path, *results), "A")
    assert (found.mark, found.proven) == ("best", False)


def test_differences_to_the_baseline_are_taken_on_the_same_rows(made):
    assert entry(made, "PEDRO").gain is None
    full, lora = entry(made, "Full"), entry(made, "LoRA")
    assert full.gain.value == pytest.approx(full.value - entry(made, "PEDRO").value)
    assert full.gain.proven
    assert full.gain.low > 0
    assert not lora.gain.proven
    assert lora.gain.low < 0 < lora.gain.high
    assert "difference to PEDRO in points" in printed(made)


def test_runs_of_an_older_spec_are_left_out_and_said(tmp_path):
    new, old = [1] * 8 + [0] * 2, [1] * 2 + [0] * 8
    results = [result("A", "sst2", 0, new, created="2025-02-02T00:00:00Z"), result("A", "sst2", 0, old)]
    gone = [
        result("B", "sst2", 0, old),
        result("A", "sst2", 1, old),
        replace(result("A", "sst2", 2, old), stage="tune"),
    ]
    found = of(tmp_path, *results, *gone)
    metadata = {**found.metadata, "labels": ["A"], "spec": {**found.metadata["spec"], "seeds": [0]}}
    (only,) = entries_of(replace(found, metadata=metadata))
    assert (only.label, only.value, only.seeds) == ("A", 0.8, 1)
    assert "3 earlier runs with other settings" in printed(replace(found, metadata=metadata))


def test_seeds_trained_with_different_settings_are_called_mixed(tmp_path):
    one = result("A", "sst2", 0, [1, 0])
    other = replace(result("A", "sst2", 1, [1, 0]), training={**one.training, "seed": 1, "max_steps": 10})
    assert "different settings are mixed in A on sst2" in printed(of(tmp_path, one, other))


def test_a_mean_over_groups_keeps_its_value_and_has_an_interval_around_it(tmp_path):
    runs = [result("A", "mmlu", seed, [1] * 60 + [0] * 40) for seed in range(3)]
    found = of(tmp_path, *(replace(run, scores=(replace(run.scores[0], value=0.5),)) for run in runs))
    assert entry(found, "A", "mmlu").value == 0.5
    assert entry(found, "A", "mmlu").low == pytest.approx(0.4, abs=0.02)


def test_one_training_may_be_scored_on_several_tasks_and_marks_of_a_judge_are_no_percentages(tmp_path):
    runs = [result("A", "alpaca", seed, [1, 0, 1, 1]) for seed in range(3)]
    scored = [
        replace(run, scores=(replace(run.scores[0], task="mmlu"), replace(judged(run), task="mt_bench")))
        for run in runs
    ]
    spec = {"tasks": [{"task": "alpaca", "evaluate": [{"task": "mt_bench"}, {"task": "mmlu"}]}], "seeds": [0, 1, 2]}
    (table,) = tables_of(of(tmp_path, *scored, result("B", "alpaca", 0), spec=spec))
    assert table.columns == ("mt_bench", "mmlu"), "in the spec's order, and no average over marks"
    assert table.entries["B", "mt_bench"].failed == 1
    text = printed(read_comparison(tmp_path))
    assert "6.25 [" in text
    assert "75.0† [" in text


def judged(run: RunResult):
    return replace(run.scores[0], metric="judge", value=6.25, per_row=(5.0, 7.5), majority=None)


def test_notes_say_which_budget_is_equal_and_how_the_learning_rate_was_chosen(made, tmp_path):
    text = printed(made, width=1000)
    assert "Equal for all methods: compute (the same training rows; steps: 150; rows a step: 16; counting those" in text
    assert "learn from rows of their own, PEDRO up to 180)" in text
    assert "Not equal: trained parameters, 18,000 to 19,400." in text
    assert "median of 3 seeds (0, 1, 2)" in text
    assert "best of 0.001, 0.003, 0.01, 0.03 on validation rows (seed 0), whose run counts as that seed's" in text
    assert "Here proven: sst2 (Full)" in text
    tuned = {**made.metadata["spec"], "tune": {"lr": [0.001, 0.003], "seed": 7}}
    tuned["tasks"] = [{"task": "sst2"}, {"task": "rte", "tune_like": "sst2"}]
    text = printed(replace(made, metadata={**made.metadata, "spec": tuned}), width=1000)
    assert "(seed 7); rte as on sst2; 3 of 3 times it is the smallest or the largest of them." in text
    sized = of(tmp_path, result("A", "sst2", 0, [1], budget=20_000, parameters=19_900), equal="parameters")
    assert "the number of trained parameters (19,900, as near to 20,000 as a method's size allows)" in printed(
        sized, width=1000
    )


def test_rows_that_did_not_fit_are_told_once_where_they_are_the_same_for_all(tmp_path):
    def run(label, task, out):
        one = result(label, task, 0, [1, 0])
        return replace(one, scores=(replace(one.scores[0], left_out=out),))

    runs = [run("A", "sst2", 0), run("B", "sst2", 0), run("A", "rte", 7), run("B", "rte", 7), run("A", "copa", 1)]
    text = printed(of(tmp_path, *runs, run("B", "copa", 3)), width=1000)
    wanted = "sst2 2, rte 2 (7 more are too long), copa 2 (too long and left out: A 1, B 3)"
    assert f"Test rows: {wanted}." in text


def test_each_budget_has_its_table(tmp_path):
    results = [result("A", "sst2", 0, [1, 0], budget=budget, parameters=budget) for budget in (40_000, 10_000)]
    found = of(tmp_path, *results)
    assert [table.budget for table in tables_of(found)] == [10_000, 40_000]


# forms


def numbers(text: str) -> list[str]:
    return re.findall(r"-?\d+\.\d", text)


def test_the_csv_holds_the_printed_table_number_by_number(made):
    with (made.folder / "table.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    (table,) = tables_of(made)
    text = printed(made, width=500).splitlines()
    for label in table.rows:
        (shown, *gains) = [numbers(line) for line in text if line.startswith(f"{label} ") and "[" in line]
        mine = [line for line in lines if line["label"] == label]
        assert [line["task"] for line in mine] == list(table.columns)
        assert shown == [f"{100 * float(line[key]):.1f}" for line in mine for key in ("value", "low", "high")]
        if label != made.baseline:
            keys = ("gain", "gain_low", "gain_high")
            assert gains == [[f"{100 * float(line[key]):.1f}" for line in mine for key in keys]]
    assert {line["lr"] for line in lines if line["task"] == "sst2"} == {"0:0.003 1:0.003 2:0.003"}


def test_latex_and_markdown_are_bold_only_where_the_best_is_proven(made):
    tex, md = ((made.folder / f"table.{kind}").read_text() for kind in ("tex", "md"))
    (table,) = tables_of(made)
    proven = [f"{100 * one.value:.1f}" for one in table.entries.values() if one.proven]
    first = tex.partition(r"\end{table*}")[0]
    assert re.findall(r"\\textbf\{([\d.]+)\}", first) == proven
    assert r"\underline{" in first
    assert r"$^\dagger$" in first
    assert r"\toprule" in first
    assert r"95 \% hierarchical bootstrap" in first
    rows = md.partition("difference to")[0].partition("---:")[2]
    assert re.findall(r"\*\*([\d.]+)\*\*", rows) == proven


def test_labels_and_titles_are_printed_as_they_are_and_computed_nowhere(tmp_path):
    signs = r"[b] 100 % of $5 & a_b \textbf{x} ^ # ~ | `c` <i> *d* [e](f) $\x$"
    labels = [f"={signs}", f"[{signs}", "@SUM(A1)", "-x/../y"]
    results = [result(label, "sst2", 0, rows_of("sst2", 0, 1.0, label=label)) for label in labels]
    made = read_comparison(write_comparison(tmp_path / "signs", results, title=f"T {signs}"))
    write_report(make_report(made))
    with (made.folder / "table.csv").open() as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == [f"'={signs}", f"[{signs}", "'@SUM(A1)", "'-x/../y"]
    tex = (made.folder / "table.tex").read_text()
    assert r"[b] 100 \% of \$5 \& a\_b \textbackslash{}textbf\{x\}" in tex
    assert not re.search(r"(?m)^\[", tex), "a row that begins with [ is read as an option of the line before it"
    markdown = (made.folder / "table.md").read_text()
    assert r"\| \`c\` \<i> \*d\* \[e](f)" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows[:5]} == {4}
    assert f"T {signs}" in (made.folder / "table.txt").read_text()
    assert (made.folder / "table.png").stat().st_size > 0


def test_the_terminal_gets_bold_only_when_asked_and_lines_that_fit(made):
    assert "\033[" not in printed(made)
    assert "\033[1m" in printed(made, ansi=True)
    rows = [line for line in printed(made, width=60).splitlines() if line.startswith(("PEDRO", "LoRA", "Full", " "))]
    assert max(map(len, rows)) <= 60


def test_the_papers_numbers_stand_beside_and_a_broken_block_is_a_note(made, tmp_path):
    rows = {"LoRA": {"sst2": 94.5, "rte": None}, "PEDRO": {"sst2": 95.4}}
    paper = {"source": "arXiv 2409.17834v1", "table": "Table 1", "columns": ["sst2", "rte"], "rows": rows}
    text = printed(replace(made, metadata={**made.metadata, "paper": paper}))
    assert "As reported in the paper (arXiv 2409.17834v1, Table 1)" in text
    assert re.search(r"LoRA +94\.5 +-\n", text)
    broken = {**made.metadata, "paper": {**paper, "rows": {"LoRA": {"sst2": "high"}}}}
    assert "paper.rows.LoRA.sst2: expected a number or null, got 'high'" in printed(replace(made, metadata=broken))


def test_figures_are_drawn_where_they_apply(made, tmp_path):
    png = {path.name for path in made.folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}
    assert png == {"table.png", "activations.png"}
    sizes = [(label, budget) for label in ("A", "B") for budget in (10_000, 40_000)]
    found = of(tmp_path, *(result(label, "sst2", 0, [1, 0], budget=size, parameters=size) for label, size in sizes))
    write_report(make_report(found))
    assert {path.name for path in tmp_path.glob("*.png")} == {"table.png", "budget.png"}


def test_a_legend_is_never_wider_than_its_figure():
    from matplotlib.figure import Figure

    for names, rows in ((["A", "B", "C"], 1), (["PARA (as we understand it)"] * 7, 3)):
        figure = Figure(figsize=(7, 3), layout="constrained")
        _legend(figure, [(name, {"color": "black"}) for name in names])
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width
        assert -(-len(names) // legend._ncols) == rows


def test_scores_by_group_are_drawn_for_tasks_of_a_few_groups_in_their_natural_order(tmp_path):
    lengths = {"128 words": 0.4, "16 words": 0.8}
    runs = [result(label, "long", seed, [1, 0]) for label in ("A", "B") for seed in (0, 1)]
    runs = [replace(run, scores=(replace(run.scores[0], groups=lengths),)) for run in runs]
    found = of(tmp_path, *runs, *(result("A", "plain", seed, [1, 0]) for seed in (0, 1)))
    ((panel, names),) = grouped(select(found)).items()
    assert panel[1] == "long"
    assert names == ["16 words", "128 words"]
    write_report(make_report(found))
    assert (tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")


def test_the_drawn_activation_is_the_one_that_is_trained():
    torch = pytest.importorskip("torch")
    from pedro.adapter_kinds import rational as trained
    from pedro.comparison.figures import X, rational

    a, b = [0.1, 0.5, 0.3, -0.2], [0.4, -0.7]
    wanted = trained(torch.tensor(X)[:, None], torch.tensor(a), torch.tensor(b))[:, 0]
    assert rational(X, a, b) == pytest.approx(wanted.numpy(), abs=1e-5)


def test_one_value_has_no_interval_and_what_was_not_compared_is_not_called_equal(tmp_path):
    unknown = {"steps": 0, "optimizer_steps": 0, "parameters": 0}
    runs = [result(label, task, 0, [1], **unknown) for label in ("A", "B") for task in ("sst2", "rte")]
    runs = [replace(run, scores=(replace(run.scores[0], per_row=(), rows=0, value=0.7),)) for run in runs]
    (table,) = tables_of(of(tmp_path, *runs))
    assert [(entry.value, entry.low, entry.high) for entry in table.entries.values()] == [(0.7, None, None)] * 6
    notes = " ".join(table.notes)
    assert "No intervals: each method has one value." in notes
    assert "Whether compute or training rows are equal was not compared: no steps are known of A, B." in notes
    assert "Equal for all" not in notes
    assert printed(of(tmp_path, *runs)).count("70.0") == 6


def test_scores_of_unknown_rows_prove_nothing(tmp_path):
    made = [result(label, "sst2", seed, [value]) for label, value in (("A", 1), ("B", 0)) for seed in range(3)]
    made = [replace(run, scores=(replace(run.scores[0], per_row=(), rows=0),)) for run in made]
    (table,) = tables_of(of(tmp_path, *made))
    assert not table.entries["A", "sst2"].proven
    assert "draws of seeds alone" in " ".join(table.notes)


def test_a_report_written_twice_is_the_same(made):
    files = [path for path in made.folder.iterdir() if path.is_file()]
    before = {path.name: path.read_bytes() for path in files}
    write_report(make_report(read_comparison(made.folder)))
    assert {path.name: path.read_bytes() for path in files} == before
    summary = json.loads(before["summary.json"])
    assert summary["runs"] == {"finished": 18, "failed": 0, "left_out": 0}
    assert summary["provenance"]["versions"]


def test_reading_and_tabulating_load_neither_torch_nor_ray():
    heavy = "'torch', 'ray', 'mlflow', 'matplotlib'"
    code = f"import sys, pedro.comparison.report; print([name for name in ({heavy}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
