"""How a learning rate is searched, and what a run and a table say of the search and of the end of training."""

import json
from dataclasses import replace

import pytest
from comparisons import result, rows_of, write_comparison
from test_comparison_grid import executor_of, finished, planner_of, play, spec_of

from pedro.comparison.data import gather
from pedro.comparison.rate_search import chosen, next_rate
from pedro.comparison.report import as_markdown, make_report
from pedro.comparison.result_model import CAP, EARLY, FAILED, FINAL, TUNE, RunResult
from pedro.comparison.run_files import read_comparison
from pedro.comparison.single_run import execute_run
from pedro.comparison.spec_sections import TuneSpec

GRID = [3e-3, 1e-2, 3e-2]


def runs_of(values: dict[float, float | None]) -> list[RunResult]:
    """A search's runs with these scores on validation; None has failed."""
    made = result("PEDRO", "snips", 0, [1.0, 0.0])
    return [
        replace(made, lr=lr, state=FAILED, validation={})
        if value is None
        else replace(made, lr=lr, validation={"metric": "accuracy", "value": value, "loss": 1.0})
        for lr, value in values.items()
    ]


@pytest.mark.parametrize(
    ("values", "following"),
    [
        ({3e-3: 0.1, 1e-2: 0.3, 3e-2: 0.2}, None),
        ({3e-3: 0.1, 1e-2: 0.2, 3e-2: 0.3}, 1e-1),
        ({3e-3: 0.3, 1e-2: 0.2, 3e-2: 0.1}, 1e-3),
        ({3e-3: None, 1e-2: None, 3e-2: None}, 1e-3),
        ({3e-3: 0.1, 1e-2: 0.2, 3e-2: 0.3, 1e-1: 0.4}, 3e-1),
        ({3e-3: 0.1, 1e-2: 0.2, 3e-2: 0.3, 1e-1: None}, None),
        ({3e-3: 0.1, 1e-2: 0.2, 3e-2: 0.3, 1e-1: 0.4, 3e-1: 0.5}, None),  # two more were allowed
    ],
)
def test_a_search_goes_on_beyond_an_edge_that_was_picked_and_no_further_than_allowed(values, following):
    tune = TuneSpec(lr=tuple(GRID), extend=2)
    assert next_rate(runs_of(values), tune) == (None if following is None else pytest.approx(following))
    assert next_rate(runs_of(values), TuneSpec(lr=tuple(GRID))) is None


def test_a_search_of_one_or_two_values_goes_on_as_well_and_never_beyond_what_a_rate_may_be():
    assert next_rate(runs_of({1e-2: 0.1}), TuneSpec(lr=(1e-2,), extend=3)) == pytest.approx(3.3e-3)
    assert next_rate(runs_of({1e-3: 0.1, 1e-2: 0.2}), TuneSpec(lr=(1e-3, 1e-2), extend=1)) == pytest.approx(1e-1)
    assert next_rate(runs_of({10: 0.1, 100: 0.2}), TuneSpec(lr=(10, 100), extend=1)) is None


def test_what_a_search_tried_stands_in_every_run_that_it_led_to(tmp_path):
    spec = spec_of(tune={"lr": GRID, "seed": 0, "extend": 3})

    def value_of(plan) -> float:  # PEDRO is best at 0.3, LoRA at 0.01
        best = 0.3 if plan.group.method == "pedro" else 0.01
        return 1 - abs(plan.lr - best)

    ran = play(executor_of(spec, tmp_path), value_of)
    tried = {
        method: sorted({plan.lr for plan in ran if plan.group.method == method and plan.stage == TUNE})
        for method in ("pedro", "lora")
    }
    assert tried["lora"] == GRID
    assert tried["pedro"] == pytest.approx([*GRID, 1e-1, 3e-1, 1.0])
    shown = [run for run in read_comparison(tmp_path).runs if run.stage == FINAL]
    assert len(shown) == 4
    for run in shown:
        assert run.lr == pytest.approx(0.3 if run.method == "pedro" else 0.01)
        assert run.searched["extended"] == (3 if run.method == "pedro" else 0)
        assert not run.searched["at_edge"]
        assert len(run.searched["validation"]) == len(GRID) + run.searched["extended"]
        assert max(run.searched["validation"], key=run.searched["validation"].get) == f"{run.lr:g}"


def test_a_search_that_was_killed_while_it_was_extended_repeats_nothing(tmp_path):
    spec = spec_of(tune={"lr": GRID, "seed": 0, "extend": 2})
    executor = executor_of(spec, tmp_path)
    executor._begin()
    done = []
    while len(done) < 7:
        plan = executor._take()
        done.append(plan.id)
        executor._ended(plan, finished(plan, plan.lr))
    kept = {run.id: run for run in read_comparison(tmp_path).runs}
    resumed = executor_of(spec, tmp_path, kept)
    ran = play(resumed, lambda plan: plan.lr)
    assert not set(done) & {plan.id for plan in ran}
    whole = {run.id: run for run in read_comparison(tmp_path).runs}
    assert len(whole) == 2 * (5 + 1), "three values, two beyond, and the second seed"
    assert executor.planner.count() == len(whole) - 2 * 2
    assert resumed.total == len(whole), "what is left is counted with those beyond"
    assert play(executor_of(spec, tmp_path, whole), lambda plan: plan.lr) == []


def test_a_search_that_only_failed_ends_with_its_first_value():
    found = chosen(runs_of(dict.fromkeys(GRID)), TuneSpec(lr=tuple(GRID)))
    assert found.lr == GRID[0]
    assert found.searched["validation"] == {"0.003": None, "0.01": None, "0.03": None}


@pytest.mark.parametrize(("patience", "ended_by"), [(1, EARLY), (50, CAP)])
def test_a_run_says_what_ended_it_and_how_many_tokens_went_through_the_model(patience, ended_by, tmp_path):
    training = {
        "epochs": 100,
        "max_steps": 24,
        "batch_size": 4,
        "eval_every": 1,
        "patience": patience,
        "theta_every": 2,
    }
    spec = spec_of(training=training)
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = planner_of(spec, data.digest)
    run = execute_run(planner.finals(planner.groups[0], 1e-1)[0], data, spec.resources, None, tmp_path / "cache")
    assert run.ended_by == ended_by
    assert (run.steps < 24) == (ended_by == EARLY)
    assert run.samples == 4 * run.optimizer_steps
    assert run.all_tokens > run.tokens + run.samples, "prompts have more than a token each"
    assert run.tokens_per_second == pytest.approx(run.all_tokens / run.seconds, rel=0.05)
    assert run.answer_tokens_per_second == pytest.approx(run.tokens / run.seconds, rel=0.05)
    assert run.samples_per_second == pytest.approx(run.samples / run.seconds, rel=0.05)


def test_speeds_of_earlier_results_are_read_as_what_they_were():
    """`tokens_per_second` counted answers alone; it counts all tokens now."""
    values = {**result("PEDRO", "snips", 0, [1.0]).to_dict(), "tokens_per_second": 512.0}
    new = RunResult.from_dict({**values, "answer_tokens_per_second": 64.0})
    del values["answer_tokens_per_second"]
    old = RunResult.from_dict(json.loads(json.dumps(values)))
    assert (old.answer_tokens_per_second, old.tokens_per_second) == (512.0, 0.0)
    assert (new.answer_tokens_per_second, new.tokens_per_second) == (64.0, 512.0)


def test_a_table_says_how_often_the_cap_was_hit_and_a_search_extended(tmp_path):
    searched = {"validation": {}, "extended": 2, "at_edge": False}
    training = {"batch_size": 16, "max_steps": 900, "patience": 4, "eval_every": 50}
    runs = [
        result(
            label,
            "snips",
            seed,
            rows_of("snips", seed, 1, label=label),
            ended_by=CAP if label == "LoRA" and seed else EARLY,
            steps=900 if label == "LoRA" and seed else 300 + 50 * seed,
            searched=searched if label == "LoRA" else {**searched, "extended": 0},
            training={**training, "seed": seed},
        )
        for label in ("PEDRO", "LoRA")
        for seed in range(3)
    ]
    folder = write_comparison(tmp_path / "made", runs, equal="effort")
    head = json.loads((folder / "comparison.json").read_text())
    head["spec"]["tune"]["extend"] = 4
    (folder / "comparison.json").write_text(json.dumps(head))
    text = as_markdown(make_report(read_comparison(folder)))
    assert "after 4 validations (50 steps apart) without a better loss, or at a cap" in text
    assert "The cap was hit by 2 of 6 runs (900 steps; LoRA on snips: 2)." in text
    assert "up to 4 values beyond it are tried (1 times by 2)" in text
    assert "Equal for all methods: effort" in text
    assert "Not equal: steps (300 to 900" in text


def test_tables_of_runs_that_do_not_say_what_ended_them_say_nothing_of_it(tmp_path):
    runs = [result("PEDRO", "snips", seed, rows_of("snips", seed, 1)) for seed in range(2)]
    assert "cap" not in as_markdown(make_report(read_comparison(write_comparison(tmp_path / "made", runs))))
