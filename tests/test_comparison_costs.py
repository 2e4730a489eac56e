"""What a comparison measures beside scores: forgetting, saved bytes, served tokens; their columns and Pareto fronts."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from comparisons import result, rows_of, write_comparison
from typer.testing import CliRunner

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.cli import app
from pedro.comparison import data as task_data
from pedro.comparison.costs import METRICS, front, points_of, undominated
from pedro.comparison.data import gather
from pedro.comparison.forgetting import AbilityMeter
from pedro.comparison.report import draw_front, make_report, print_report, summarize, write_report
from pedro.comparison.run_files import read_comparison
from pedro.comparison.run_planner import RunPlanner
from pedro.comparison.single_run import execute_run
from pedro.comparison.spec import ComparisonSpec
from pedro.comparison.spec_sections import ForgettingSpec
from pedro.data.general_text import FILE, WINDOW, windows
from pedro.data.tasks import get_task
from pedro.errors import ConfigError
from pedro.methods.registry import get_method
from pedro.spec_reader import validate_spec
from pedro.training.quantised_load import load_quantised
from pedro.training.spec import TrainingSpec

HIRA = {"peft_type": "HIRA", "label": "HiRA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
FORGOT = {"loss_before": 2.0, "loss": 2.5, "tokens": 64}


def spec_of(**changes) -> ComparisonSpec:
    tree = {
        "name": "costs",
        "tasks": [{"task": "snips", "train_rows": 32, "validation_rows": 4, "test_rows": 4}],
        "methods": [{"name": "pedro", "label": "PEDRO", "r": 2}, HIRA, {"name": "full", "label": "Full"}],
        "seeds": [0],
        "training": {"lr": 1e-2, "epochs": 100, "max_steps": 2, "batch_size": 4, "eval_every": 2},
        "forgetting": {"tokens": 64, "task": "banking77", "rows": 3},
        "serving": {"requests": 2, "tokens": 4},
    }
    return validate_spec({**tree, **changes}, ComparisonSpec)


# the text


@pytest.mark.parametrize("name", ["stories260K", "pedro-nano"])
def test_windows_of_general_text_hold_exactly_the_tokens_asked_for_one_after_the_other(name):
    tokenizer = load_tokenizer(resolve_backbone(name))
    rows = windows(tokenizer, 1000, 512)
    assert sum(len(row["input_ids"]) - row["prompt_len"] for row in rows) == 1000
    assert {len(row["input_ids"]) for row in rows[:-1]} == {WINDOW}
    assert rows == windows(tokenizer, 1000, 512)
    assert rows[:3] == windows(tokenizer, 2000, 512)[:3]
    own = [token for row in rows for token in row["input_ids"] if token != tokenizer.bos_token_id]
    text = tokenizer.decode(own).strip()
    assert text[:200].split() == FILE.read_text(encoding="utf-8")[:200].split()[: len(text[:200].split())]
    assert max(len(row["input_ids"]) for row in windows(tokenizer, 100, 40)) == 40


# forgetting


def meter_of(name: str = "stories260K", general: task_data.TestSet | None = None, tokens: int = 300) -> AbilityMeter:
    return AbilityMeter(resolve_backbone(name), ForgettingSpec(tokens=tokens), general)


@torch.no_grad()
def slowly(model, tokenizer, tokens: int) -> float:
    """Nats of a token, a window at a time, from all logits."""
    nats = []
    for row in windows(tokenizer, tokens, 512):
        ids, length = torch.tensor([row["input_ids"]]), torch.tensor([row["prompt_len"]])
        logits = model(input_ids=ids, prompt_lens=length).logits[0].log_softmax(-1)
        nats += [-float(logits[at - 1, ids[0, at]]) for at in range(row["prompt_len"], ids.shape[1])]
    return sum(nats) / len(nats)


@pytest.mark.parametrize("method", ["pedro", "lora"])
def test_a_fresh_adapter_forgot_nothing_and_a_changed_one_what_a_plain_loop_says(method):
    meter = meter_of()
    before = meter.measure(load_model(meter.backbone))
    model = get_method(method).apply(load_model(meter.backbone), {"r": 2}).eval()
    assert meter.measure(model).loss == before.loss
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    changed = meter.changed(before, model)
    assert changed["loss_before"] == before.loss
    assert changed["loss"] != before.loss
    assert changed["loss"] == pytest.approx(slowly(model, meter.tokenizer, 300), abs=1e-4)


def test_what_a_backbone_in_4_bit_forgot_is_measured_from_itself():
    meter = meter_of()
    training = TrainingSpec(backbone_dtype="nf4")
    before = meter.bare(training, "cpu")
    assert before.loss == meter.measure(load_quantised(meter.backbone, "float32", "nf4", "cpu")).loss
    assert before.loss != meter.bare(TrainingSpec(), "cpu").loss == meter.measure(load_model(meter.backbone)).loss


def test_nothing_that_is_predicted_conditions_the_vectors():
    meter = meter_of(tokens=100)
    model = get_method("pedro").apply(load_model(meter.backbone), {"r": 2}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    (row,) = meter._windows
    ids = torch.tensor([row["input_ids"]])
    other = ids.clone()
    other[0, -20:] = 7
    with torch.no_grad():
        length = torch.tensor([row["prompt_len"]])
        one, two = (model(input_ids=each, prompt_lens=length).logits[0, :-21] for each in (ids, other))
    assert torch.equal(one, two)


def test_the_general_task_is_scored_as_the_backbones_own_row_is(tmp_path):
    asked = {"task": "banking77", "train_rows": 32, "validation_rows": 4, "test_rows": 12}
    spec = spec_of(backbones=["pedro-nano"], tasks=[asked], methods=["backbone"], forgetting=None, serving=None)
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"banking77": data.digest})
    (plan,) = planner.finals(planner.groups[0], None)
    row = execute_run(plan, data, spec.resources, None, tmp_path / "cache")
    meter = meter_of("pedro-nano", task_data.TestSet(get_task("banking77"), data.tests[0].rows), 64)
    measured = meter.measure(load_model(meter.backbone))
    assert (measured.score, measured.rows) == (row.scores[0].value, 12)


# runs


def test_a_run_says_what_it_forgot_and_what_serving_it_costs(tmp_path):
    spec = spec_of()
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"snips": data.digest})
    plans = [planner.finals(group, None)[0] for group in planner.groups]
    runs = [execute_run(plan, data, spec.resources, None, tmp_path / "cache") for plan in plans]
    assert not [run.message for run in runs if run.message]
    pedro, hira, full = runs
    for run in runs:
        assert run.forgetting["tokens"] == 64
        assert run.forgetting["loss_before"] == pedro.forgetting["loss_before"] != run.forgetting["loss"]
        assert (run.forgetting["task"], run.forgetting["rows"]) == ("banking77", 3)
    assert pedro.served_tokens_per_second > 0
    assert not pedro.not_served
    assert pedro.saved_bytes > pedro.adapter_bytes, "the file has a head"
    assert not hira.served_tokens_per_second
    assert "not HIRA" in hira.not_served
    assert "a whole model" in full.not_served
    assert full.saved_bytes == 4 * full.trainable_parameters
    table = print_report(make_report(read_comparison(write_comparison(tmp_path / "out", runs))))
    assert "Saved adapter (kB)" in table
    assert "n/a" in table
    assert "HiRA is not" in table


def test_ids_hold_where_nothing_is_measured_and_the_backbones_rows_measure_nothing():
    def ids(**changes):
        planner = RunPlanner(spec_of(methods=["pedro", "backbone"], **changes), {"snips": "d"})
        return [planner.finals(group, None)[0].id for group in planner.groups]

    off = ids(forgetting=None, serving=None)
    for changes in ({"serving": None}, {"forgetting": None}, {"forgetting": {"tokens": 65}}):
        on = ids(**changes)
        assert on[0] != off[0]
        assert on[1] == off[1]
    assert ids(forgetting={"tokens": 64}) != ids(forgetting={"tokens": 65})
    assert ids(forgetting={"tokens": 64, "data": "here"}) == ids(forgetting={"tokens": 64})


@pytest.mark.parametrize(
    ("forgetting", "said"),
    [
        ({"task": "snips"}, "snips is trained on"),
        ({"task": "mmul"}, "did you mean 'mmlu'"),
        ({"task": "squad"}, "has no labels"),
        ({"tokens": 10**6}, "forgetting.tokens"),
        ({"rows": 0}, "forgetting.rows"),
    ],
)
def test_what_cannot_be_measured_is_refused(forgetting, said):
    with pytest.raises(ConfigError, match=said):
        spec_of(forgetting=forgetting)


# tables and figures


def made(folder: Path):
    """Three methods on two tasks; the second could not be served."""
    changes = {
        "PEDRO": {"saved_bytes": 80_000, "served_tokens_per_second": 500.0, "forgetting": FORGOT},
        "LoRA": {"saved_bytes": 120_000, "not_served": "adapter: LORA is not; train another", "forgetting": FORGOT},
        "Plain": {},
    }
    skills = {"PEDRO": 2.0, "LoRA": 1.0, "Plain": 0.0}
    runs = [
        result(label, task, seed, rows_of(task, seed, skills[label], 60, label=label), parameters=size, **more)
        for (label, more), size in zip(changes.items(), (20_000, 30_000, 10_000), strict=True)
        for task in ("sst2", "rte")
        for seed in (0, 1)
    ]
    return read_comparison(write_comparison(folder, runs))


def test_a_table_has_columns_for_what_was_measured_and_says_how(tmp_path):
    report = make_report(made(tmp_path / "made"))
    text = " ".join(print_report(report).split())
    assert "+4.79" in text, "e^2.5 - e^2"
    assert "Served: answers of equal length" in text
    assert "LoRA is not (adapter: LORA is not)" in text
    assert "64 tokens of WikiText-2" in text
    (table,) = summarize(report)["tables"]
    costs = {row["label"]: row["costs"] for row in table["rows"]}
    assert costs["PEDRO"]["saved_bytes"]["value"] == 80_000
    assert costs["LoRA"]["served_tokens_per_second"]["value"] is None
    assert costs["Plain"] == {}
    write_report(report)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "made" / "table.csv").read_text())))
    assert {row["saved_bytes"] for row in rows if row["label"] == "PEDRO"} == {"80000.0"}
    assert {row["served_tokens_per_second"] for row in rows if row["label"] == "LoRA"} == {""}


def test_runs_that_were_asked_for_nothing_have_no_such_columns(tmp_path):
    runs = [result(label, "sst2", 0, rows_of("sst2", 0, 1.0, 20)) for label in ("PEDRO", "LoRA")]
    text = print_report(make_report(read_comparison(write_comparison(tmp_path / "old", runs))))
    assert "served" not in text
    assert "orgetting" not in text


def test_a_loss_that_is_no_number_is_no_forgetting(tmp_path):
    runs = [result("PEDRO", "sst2", 0, rows_of("sst2", 0, 1.0, 20), forgetting={**FORGOT, "loss": float("nan")})]
    found = make_report(read_comparison(write_comparison(tmp_path / "made", runs)))
    assert not found.tables[0].costs
    json.dumps(summarize(found), allow_nan=False)


def test_the_front_of_any_two_columns_is_drawn_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    report = make_report(made(tmp_path / "made"))
    figure, unbeaten = draw_front(report, "parameters", "score")
    assert figure.read_bytes().startswith(b"\x89PNG")
    points = points_of(report.tables, report.selection.runs)
    assert unbeaten == [point.name for point in front(points, "parameters", "score")]
    assert unbeaten[0] == "Plain", "nothing has fewer parameters"
    assert "LoRA" not in unbeaten
    assert undominated(points, ["forgetting", "saved_bytes"]) == [True, False, False]
    assert draw_front(report, "saved_bytes", "sst2")[1] == ["PEDRO"]
    with pytest.raises(ConfigError, match="no column 'speed'"):
        draw_front(report, "speed", "score")
    with pytest.raises(ConfigError, match="no method has both"):
        draw_front(report, "general_task", "score")
    spec = tmp_path / "made.yaml"
    spec.write_text("name: made\ntasks: [snips]\nmethods: [pedro, lora]\n")
    words = ["compare", str(spec), "--out", str(tmp_path / "made"), "--report"]
    done = CliRunner().invoke(app, [*words, "--pareto", "parameters,score"])
    assert done.exit_code == 0, done.output
    assert "no other beats Plain" in done.output
    refused = CliRunner().invoke(app, [*words, "--pareto", "parameters,speed"])
    assert refused.exit_code != 0
    assert all(name in refused.output for name in ("served_tokens_per_second", "snips"))


def test_every_metric_says_what_it_is():
    assert all(metric.title for metric in METRICS.values())
