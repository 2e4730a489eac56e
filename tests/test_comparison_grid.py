"""A comparison's spec, its runs, their order, one real run, and a grid that is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pedro.backbone import EMBEDDED
from pedro.cli import app
from pedro.comparison import run_planner
from pedro.comparison.data import gather
from pedro.comparison.kept_rows import kept_runs
from pedro.comparison.pipeline import compare, prepare
from pedro.comparison.rate_search import choose
from pedro.comparison.result_model import FAILED, FINAL, FINISHED, TUNE, RunResult, TaskResult
from pedro.comparison.run_executor import RunExecutor, missing_resources, reusable
from pedro.comparison.run_files import open_folder, read_comparison, write_run
from pedro.comparison.run_planner import RunPlanner, check, count_parameters_of, far_from_budget, sized
from pedro.comparison.single_run import execute_run, failed
from pedro.comparison.spec import ComparisonSpec, EfficiencySpec, MethodChoice, load_comparison_spec
from pedro.config import Settings
from pedro.errors import ConfigError, DataError
from pedro.spec_reader import validate_spec

CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "jobs/configs").glob("*.yaml")
    if path.stem.startswith(("paper_", "nano_", "smollm2_")) and "sweep" not in path.stem
)
RATES = [1e-3, 1e-2]
SIZELESS = [{"name": "pedro", "label": "PEDRO"}, {"name": "lora", "label": "LoRA"}]
TINY = {
    "name": "tiny",
    "tasks": [{"task": "snips", "train_rows": 64, "validation_rows": 12, "test_rows": 12}],
    "methods": [{"name": "pedro", "label": "PEDRO", "r": 2}, {"name": "lora", "label": "LoRA", "r": 1}],
    "seeds": [0, 1],
    "tune": {"lr": RATES, "seed": 0},
    "training": {"epochs": 100, "max_steps": 3, "batch_size": 4, "eval_every": 3},
}


def spec_of(**changes) -> ComparisonSpec:
    return validate_spec({**TINY, **changes}, ComparisonSpec)


def planner_of(spec: ComparisonSpec, digest: str = "d") -> RunPlanner:
    return RunPlanner(spec, {task.task: digest for task in spec.tasks})


def finished(plan, value: float = 0.5) -> RunResult:
    """What a worker hands back; the policy of the grid looks at no more than this."""
    return replace(failed(plan, ""), state=FINISHED, validation={"metric": "accuracy", "value": value, "loss": 1.0})


def executor_of(spec: ComparisonSpec, folder: Path, kept: dict[str, RunResult] | None = None) -> RunExecutor:
    (folder / "comparison.json").write_text(json.dumps({"name": spec.name}))
    return RunExecutor(spec, planner_of(spec), {}, folder, kept or {})


def play(executor: RunExecutor, value_of=lambda plan: 0.5) -> list:
    """Run a grid's queue in this process, in its order, with made-up scores."""
    ran = []
    executor._begin()
    while executor._queue:
        plan = executor._take()
        ran.append(plan)
        executor._ended(plan, finished(plan, value_of(plan)))
    return ran


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_comparison_loads(path):
    spec = load_comparison_spec(path)
    assert spec.name == path.stem
    if path.stem.startswith("paper"):
        assert "assumed" in path.read_text(), "a paper's experiment lists its assumptions"
    assert isinstance(spec, EfficiencySpec) == path.stem.endswith("table3")


def test_all_mistakes_of_a_spec_are_told_with_field_and_remedy(tmp_path):
    tree = {**TINY, "tasks": [{"task": "snip", "rows": 3}], "methods": ["pedro", "pedro"], "seeds": [0, 0]}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_comparison_spec(path)
    assert "rows: unknown key" in caught.value.message
    for change, words in (
        ({"methods": ["pedro", "pedro"]}, "'PEDRO' appears twice; give the second a label"),
        ({"seeds": [1, 1]}, "seeds: 1 appears twice"),
        ({"baseline": "LORA"}, "baseline: 'LORA' is none of PEDRO, LoRA"),
        (
            {"training": {"max_steps": 0}},
            "training.max_steps: expected greater than or equal to 1, got 0 (PEDRO on snips",
        ),
        ({"training": {"step": 1}}, "training.step: unknown key; did you mean 'max_steps'"),
        ({"training": {"seed": 1}}, "training.seed: `seeds` of the comparison says which"),
        ({"training": {"lr": 1}}, "training.lr: `tune` searches the learning rate"),
        ({"tune": {"lr": [0]}}, "tune.lr.0: expected greater than 0, got 0"),
        ({"tune": {"lr": [1, 1]}}, "tune.lr: 1.0 appears twice"),
        ({"budgets": [9, 9]}, "budgets: 9 appears twice"),
        ({"backbones": ["a", "a"]}, "backbones: 'a' appears twice"),
        ({"seeds": [2**70]}, "seeds.0: expected less than"),
        ({"methods": [{"name": "pedro", "label": "A"}, {"name": "pedro", "label": "B"}]}, "'A' and 'B' are the same"),
        ({"methods": [{"name": "pedro", "r": date(2024, 1, 1)}]}, "pedro: expected text, numbers, lists"),
        ({"paper": {"rows": 3}}, "paper: expected source, table, columns and rows by method"),
        ({"tasks": [{"task": "snips", "rows": 3}]}, "tasks.0.rows: unknown key; did you mean 'test_rows'?"),
        ({"tasks": [{"task": "snips", "x": 3}]}, "tasks.0.x: unknown key; known: task, wording, shots"),
        ({"methods": [{"name": "pedro", "label": "a\nb"}]}, "label: expected one line without control characters"),
        ({"title": "\033[31mred"}, "title: expected one line without control characters"),
        ({"tasks": [{"task": "snip"}]}, "did you mean 'snips'"),
        ({"tasks": [{"task": "snips", "tune_like": "rte"}]}, "tune_like: expected another task"),
    ):
        with pytest.raises(ConfigError, match=": 1 mistake\n") as caught:
            spec_of(**change)
        assert words in caught.value.message
    path.write_text(yaml.safe_dump({**TINY, "kind": "nothing"}))
    with pytest.raises(ConfigError, match="kind: expected comparison or efficiency, got 'nothing'"):
        load_comparison_spec(path)


def test_all_that_is_missing_is_told_at_once_backbones_before_rows(tmp_path, monkeypatch):
    monkeypatch.delenv("PEDRO_TASK_DATA", raising=False)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    nowhere = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        prepare(spec_of(backbones=[*nowhere, "stories260K"]), settings, tmp_path / "out", False, print)
    assert all(f"backbone: {path!r} is neither a directory" in caught.value.message for path in nowhere)
    with pytest.raises(DataError, match="rows are missing; name their directory in `data:`") as data:
        prepare(spec_of(tasks=["snips", "rte", "copa"]), settings, tmp_path / "out", False, print)
    assert "\n  rte: no data given" in data.value.message
    assert "\n  copa: no data given" in data.value.message


def test_an_efficiency_spec_has_no_runs_to_report(tmp_path):
    path = tmp_path / "speed.yaml"
    path.write_text("kind: efficiency\nname: speed\n")
    assert CliRunner().invoke(app, ["compare", str(path), "--report"]).exit_code == 2


def test_a_task_may_be_given_by_its_name_alone():
    assert spec_of(tasks=["snips"]).tasks[0].task == "snips"


def test_wrong_options_are_found_before_anything_starts():
    spec = spec_of(methods=["pedro", {"name": "lora", "rank": 3}, {"name": "ia3", "label": "x", "r": -1}])
    with pytest.raises(ConfigError) as caught:
        check(spec)
    assert "2 mistakes" in caught.value.message
    assert "method.rank: unknown option" in caught.value.message


@pytest.mark.parametrize(("method", "budget"), [("pedro", 10_000), ("lora", 20_000), ("houlsby", 5_000)])
def test_a_budget_sets_the_size_that_comes_nearest(method, budget):
    choice = MethodChoice(name=method)
    options = sized(choice, "stories260K", budget)

    def off(r: int) -> int:
        return abs(count_parameters_of(method, json.dumps({**options, "r": r}, sort_keys=True), "stories260K") - budget)

    assert off(options["r"]) <= min(off(options["r"] + 1), off(max(1, options["r"] - 1)))


def test_a_size_that_ends_before_the_budget_is_the_largest_that_fits_and_told():
    per_rank = count_parameters_of("miss", json.dumps({"r": 1}), "stories260K")
    assert sized(MethodChoice(name="miss"), "stories260K", 64 * per_rank) == {"r": 64}
    assert sized(MethodChoice(name="miss"), "stories260K", 500 * per_rank) == {"r": 64}
    spec = spec_of(methods=[{"name": "miss"}], budgets=[500 * per_rank])
    check(spec)
    assert far_from_budget(planner_of(spec).groups) == [
        f"budget {500 * per_rank:,} on stories260K: MiSS has {64 * per_rank:,} at the nearest"
    ]


def test_a_size_that_a_budget_decides_is_not_given_and_a_budget_out_of_reach_is_told():
    with pytest.raises(ConfigError, match=r"PEDRO: method\.r: `budgets` sets it; leave it out"):
        check(spec_of(budgets=[4_000]))
    spec = spec_of(methods=SIZELESS, budgets=[100, 20_000])
    (line,) = far_from_budget([group for group in planner_of(spec).groups if group.label == "PEDRO"])
    assert line == "budget 100 on stories260K: PEDRO has 3,060 at the nearest"


def test_a_run_is_named_by_what_its_result_depends_on():
    spec = spec_of()
    group = planner_of(spec).groups[0]
    (one, *_), (again, *_) = planner_of(spec).finals(group, 1e-2), planner_of(spec).finals(group, 1e-2)
    assert one.id == again.id
    relabelled = spec_of(methods=[{"name": "pedro", "label": "Ours", "r": 2}])
    assert planner_of(relabelled).finals(planner_of(relabelled).groups[0], 1e-2)[0].id == one.id
    for other in (planner_of(spec, "other rows"), planner_of(spec_of(num_beams=3))):
        assert other.finals(other.groups[0], 1e-2)[0].id != one.id
    assert planner_of(spec).finals(group, 1e-3)[0].id != one.id
    assert len({plan.id for plan in planner_of(spec).finals(group, 1e-2)}) == 2


def test_a_run_is_named_by_the_backbones_files_and_by_who_marks_its_answers(tmp_path):
    here = tmp_path / "backbone"
    shutil.copytree(EMBEDDED / "stories260K", here)

    def named(**changes) -> str:
        planner = planner_of(spec_of(tune=None, **changes))
        return planner.finals(planner.groups[0], None)[0].id

    before = named(backbones=[str(here)])
    assert named(backbones=[str(here)]) == before
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert named(backbones=[str(here)]) != before
    marked = {"task": "alpaca", "evaluate": [{"task": "mt_bench"}]}
    judges = [None, {"base_url": "http://a", "model": "x"}, {"base_url": "http://a", "model": "y"}]
    assert len({named(tasks=[marked], judge=judge) for judge in judges}) == 3
    assert len({named(judge=judge) for judge in judges}) == 1, "nobody marks intents"
    elsewhere = {"base_url": "http://b", "model": "x"}
    assert named(tasks=[marked], judge=elsewhere) == named(tasks=[marked], judge=judges[1])


def test_options_of_a_method_may_be_mappings(tmp_path):
    spec = spec_of(methods=[{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}])
    ran = play(executor_of(spec, tmp_path))
    assert len(ran) == planner_of(spec).count()
    assert ran[0].options["rank_pattern"] == {"q_proj": 4}


def test_the_best_on_validation_is_chosen_and_failed_runs_never():
    plans = planner_of(spec_of()).tuning(planner_of(spec_of()).groups[0])
    good, better = finished(plans[0], 0.4), finished(plans[1], 0.6)
    assert choose([good, better]) == plans[1].lr
    assert choose([replace(better, state=FAILED), good]) == plans[0].lr
    assert choose([replace(good, state=FAILED)]) is None
    nan = replace(better, validation={"metric": "accuracy", "value": None, "loss": None})
    assert choose([nan, good]) == plans[0].lr


def test_final_runs_take_the_learning_rate_that_won_and_repeat_none_of_the_search(tmp_path):
    spec = spec_of()
    executor = executor_of(spec, tmp_path)
    ran = play(executor, lambda plan: plan.lr)
    assert len(ran) == planner_of(spec).count() == 2 * (2 + 1)
    shown = [result for result in read_comparison(tmp_path).runs if result.stage == FINAL]
    assert len(shown) == 4
    assert {result.lr for result in shown} == {max(RATES)}


def test_a_task_is_whole_before_the_next_ones_search_begins(tmp_path):
    ran = play(executor_of(spec_of(tasks=[{"task": "banking77"}, {"task": "snips"}]), tmp_path), lambda plan: plan.lr)
    tasks = [plan.group.task for plan in ran]
    assert tasks == sorted(tasks)
    assert {plan.stage for plan in ran[: tasks.count("banking77")]} == {TUNE, FINAL}


def test_a_task_may_take_the_learning_rate_of_another(tmp_path):
    tasks = [{"task": "snips"}, {"task": "banking77", "tune_like": "snips"}]
    spec = spec_of(tasks=tasks)
    ran = play(executor_of(spec, tmp_path), lambda plan: plan.lr)
    assert len(ran) == planner_of(spec).count()
    assert [plan for plan in ran if plan.stage == TUNE and plan.group.task == "banking77"] == []
    assert {plan.lr for plan in ran if plan.group.task == "banking77"} == {max(RATES)}


def test_budgets_may_share_one_search(tmp_path):
    spec = spec_of(methods=SIZELESS, budgets=[2_000, 4_000, 8_000], tune={"lr": RATES, "once": True})
    ran = play(executor_of(spec, tmp_path))
    assert len(ran) == planner_of(spec).count()
    assert {plan.group.budget for plan in ran if plan.stage == TUNE} == {4_000}


def test_a_resumed_grid_only_does_what_is_missing(tmp_path):
    spec = spec_of()
    executor = executor_of(spec, tmp_path)
    executor._begin()
    for _ in range(3):
        plan = executor._take()
        executor._ended(plan, finished(plan, plan.lr))
    kept = {result.id: result for result in read_comparison(tmp_path).runs}
    again = executor_of(spec, tmp_path, kept)
    ran = play(again, lambda plan: plan.lr)
    assert len(ran) == planner_of(spec).count() - 3
    assert not kept.keys() & {plan.id for plan in ran}
    whole = {result.id: result for result in read_comparison(tmp_path).runs}
    assert play(executor_of(spec, tmp_path, whole)) == []


def test_a_dry_run_counts_as_done_what_this_spec_wants_of_a_folder(tmp_path):
    spec = spec_of()
    play(executor_of(spec, tmp_path), lambda plan: plan.lr)
    kept = {result.id: result for result in read_comparison(tmp_path).runs}
    assert planner_of(spec).count_done(kept) == len(kept) == planner_of(spec).count()
    assert planner_of(spec_of(training={**TINY["training"], "max_steps": 5})).count_done(kept) == 0
    assert planner_of(spec).count_done({}) == 0
    assert planner_of(spec_of(tune=None)).count_done({}) == 0


def test_a_folder_that_cannot_be_gone_on_with_is_refused_and_a_broken_run_is_done_again(tmp_path):
    spec, settings, told = spec_of(tune=None), Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")}), []
    folder = tmp_path / "out"
    folder.mkdir()
    ran = play(executor_of(spec, folder))
    (folder / "runs" / f"{ran[0].id}.json").write_text('{"id": ')
    (folder / "runs" / "elsewhere.json").write_text((folder / "runs" / f"{ran[1].id}.json").read_text())
    prepared = prepare(spec, settings, folder, False, told.append)
    assert len(prepared.kept) == len(ran) - 1
    assert sum("counts as not done" in line for line in told) == 2
    with pytest.raises(ConfigError, match=r"--out: .* holds the comparison 'tiny', not 'other'"):
        prepare(spec_of(name="other"), settings, folder, False, told.append)
    for broken in ("", "[]", "{}", '{"name": '):
        (folder / "comparison.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"comparison\.json cannot be read .*delete that file: the runs .* kept"):
            prepare(spec, settings, folder, False, told.append)
    (folder / "comparison.json").unlink()
    assert len(prepare(spec, settings, folder, False, told.append).kept) == len(ran) - 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file/out cannot be written"):
        open_folder(tmp_path / "file" / "out")


def test_what_no_node_has_is_named():
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    assert missing_resources(spec_of(), nodes) == ""
    told = missing_resources(spec_of(resources={"cpus": 4, "gpus": 1}), nodes)
    assert told == "resources.cpus: 4, resources.gpus: 1: no node has so much (the largest: 2 CPU, 0 GPU)"


def test_failed_runs_stay_unless_asked_for(tmp_path):
    plan = planner_of(spec_of()).tuning(planner_of(spec_of()).groups[0])[0]
    results = {plan.id: failed(plan, "the loss is nan")}
    assert reusable(results, retry_failed=False) == results
    assert reusable(results, retry_failed=True) == {}


def test_runs_of_an_earlier_wording_leave_the_table(tmp_path):
    play(executor_of(spec_of(), tmp_path))
    kept = {result.id: result for result in read_comparison(tmp_path).runs}
    longer = spec_of(training={**TINY["training"], "max_steps": 5})
    executor = executor_of(longer, tmp_path, kept)
    play(executor)
    executor.settle()
    steps = {result.training["max_steps"] for result in read_comparison(tmp_path).runs if result.stage == FINAL}
    assert steps == {5}


def test_every_method_sees_the_same_rows_and_none_twice(tmp_path):
    spec = spec_of(tasks=[{"task": "snips"}])
    data = gather(spec, spec.tasks[0], str(tmp_path))
    train = [json.loads(line)["prompt"] for line in Path(data.files[0]).read_text().splitlines()]
    held = {row.prompt for row in data.validation_rows}
    assert len(held) > 0.1 * len(train)
    assert not held & set(train)
    assert gather(spec, spec.tasks[0], str(tmp_path / "elsewhere")).digest == data.digest
    fewer = spec_of(tasks=[{"task": "snips", "train_rows": 100}])
    assert gather(fewer, fewer.tasks[0], str(tmp_path)).digest != data.digest


def test_a_run_is_another_one_on_other_weights_of_a_backbone(monkeypatch):
    def ids(digest):
        known = run_planner.resolve_backbone("stories260K")
        monkeypatch.setattr(run_planner, "resolve_backbone", lambda name: replace(known, digest=digest or known.digest))
        planner = planner_of(spec_of())
        found = [plan.id for plan in planner.finals(planner.groups[0], 1e-2)]
        monkeypatch.undo()
        return found

    assert ids("") == ids("")
    assert not set(ids("")) & set(ids("sha256:other"))


def test_a_run_trains_scores_and_says_what_it_cost(tmp_path):
    spec = spec_of(training={**TINY["training"], "max_steps": 12, "eval_every": 6})
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = planner_of(spec, data.digest)
    plan, kept = planner.finals(planner.groups[0], 1e-2)[0], []
    result = execute_run(plan, data, spec.resources, None, tmp_path / "cache", kept.append)
    assert result.state == FINISHED
    (score,) = result.scores
    (behind,) = kept
    assert behind.task == score.task
    assert [row.score for row in behind.rows] == list(score.per_row)
    assert [row.wanted for row in behind.rows] == [row.completion for row in data.tests[0].rows]
    assert len(score.per_row) == score.rows == 12
    assert score.value == pytest.approx(sum(score.per_row) / 12)
    assert 0 < score.majority < 1
    assert result.trainable_parameters == result.adapter_bytes / 4
    assert [step for step, _ in result.curves["dev/loss"]] == [6, 12]
    assert len(result.activations["layers"]) == 5
    assert result.peak_memory_bytes > 0
    assert result.provenance["versions"]["torch"]
    assert RunResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_run_that_diverges_is_a_failed_cell(tmp_path):
    spec = spec_of(training={**TINY["training"], "clip": 0, "warmup": 0, "max_steps": 20})
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = planner_of(spec, data.digest)
    result = execute_run(planner.finals(planner.groups[1], 100.0)[0], data, spec.resources, None, tmp_path / "cache")
    assert result.state == FAILED
    assert "the loss is" in result.message


def test_a_changed_label_is_shown_though_no_run_is_made(tmp_path):
    settings, folder = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")}), tmp_path / "out"
    for label in ("PEDRO", "first"):
        spec = spec_of(tune=None, methods=[{"name": "pedro", "label": label}], tasks=["snips"], baseline=label)
        planner = prepare(spec, settings, folder, False, print).planner
        score = TaskResult("snips", "accuracy", 0.5, rows=2, per_row=(0.0, 1.0))
        for plan in planner.finals(planner.groups[0], None):
            if not (folder / "runs" / f"{plan.id}.json").exists():
                write_run(folder, replace(finished(plan), scores=(score,)))
        compare(spec, settings, folder, prepare(spec, settings, folder, False, print), print)
        head = json.loads((folder / "comparison.json").read_text())
        assert head["labels"] == [label]
        assert f"\n{label} " in (folder / "table.txt").read_text()
    made = head["provenance"]
    compare(spec, settings, folder, prepare(spec, settings, folder, False, print), print)
    assert json.loads((folder / "comparison.json").read_text())["provenance"] == made, "nothing changed"


@pytest.mark.slow
def test_a_killed_grid_repeats_nothing_and_ends_with_tables(tmp_path):
    training = {**TINY["training"], "max_steps": 20, "eval_every": 10, "clip": 0, "warmup": 0}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "training": training, "tune": {"lr": [100.0, 1e-2], "seed": 0}}))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
    env |= {"PEDRO_HOME": str(tmp_path / "home"), "RAY_USAGE_STATS_ENABLED": "0"}
    pedro = [sys.executable, "-m", "pedro.cli"]
    folder = tmp_path / "out"
    words = [*pedro, "compare", str(path), "--out", str(folder), "--json"]
    try:
        driver = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(list(folder.glob("runs/*.json"))) < 2:
            assert driver.poll() is None, driver.stderr.read()
            time.sleep(0.2)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        before = {file: file.read_text() for file in folder.glob("runs/*.json")}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stderr
        assert "of them done before" in done.stderr
        for file, text in before.items():
            old, new = json.loads(text), json.loads(file.read_text())
            later = {"stage": "", "searched": {}}  # entered when a run of the search becomes one that tables show
            assert {**old, **later} == {**new, **later}, "a finished run is not made again"
        comparison = read_comparison(folder)
        assert len(comparison.runs) == planner_of(spec_of()).count()
        diverged = [result.lr for result in comparison.runs if result.state == FAILED]
        assert diverged in ([100.0], [100.0, 100.0]), "a run that diverges has failed, and no other"
        assert all(result.lr == 1e-2 for result in comparison.runs if result.stage == FINAL)
        assert kept_runs(folder) == {result.id for result in comparison.runs if result.scores}, "the rows behind them"
        for name in ("table.txt", "table.md", "table.csv", "table.tex", "table.png", "activations.png", "summary.json"):
            assert (folder / name).stat().st_size > 0
        assert json.loads(done.stdout.splitlines()[-1])["name"] == "tiny"
    finally:
        subprocess.run([*pedro, "down", "--yes"], env=env, capture_output=True, check=False)
