"""Runs of the wordings that were committed keep their ids; the template makes new ones, and chats where it can."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_data_wordings import CHAT

from pedro.backbone import EMBEDDED
from pedro.comparison.data import _plain, gather
from pedro.comparison.pipeline import prepare
from pedro.comparison.result_model import FINISHED
from pedro.comparison.run_files import read_comparison
from pedro.comparison.run_planner import RunPlanner
from pedro.comparison.single_run import execute_run
from pedro.comparison.spec import ComparisonSpec, load_comparison_spec
from pedro.comparison.untrained_run import BackboneAsker
from pedro.config import Settings
from pedro.data.prompt_format import encode_prompt
from pedro.errors import ConfigError
from pedro.spec_reader import validate_spec

ROOT = Path(__file__).parents[1]
TRAINING = {"max_steps": 2, "batch_size": 4, "lr": 1e-2, "eval_every": 2, "b_up_lr_ratio": None}


def ids_of(spec, folder, lrs) -> set[str]:
    digests = {choice.task: gather(spec, choice, str(folder)).digest for choice in spec.tasks}
    planner = RunPlanner(spec, digests)
    return {plan.id for group in planner.groups for lr in lrs for plan in planner.finals(group, lr)}


@pytest.mark.parametrize("name", ["nano_table4", "nano_variants", "nano_context"])
def test_a_committed_run_is_named_as_its_spec_names_it_today(name, tmp_path, monkeypatch):
    monkeypatch.delenv("PEDRO_TASK_DATA", raising=False)
    spec = load_comparison_spec(ROOT / f"jobs/configs/{name}.yaml")
    committed = [run for run in read_comparison(ROOT / "jobs/results" / name).runs if run.stage == "final"]
    lrs = {run.lr for run in committed} if spec.tune else {None}
    assert committed
    assert {run.id for run in committed} <= ids_of(spec, tmp_path, lrs)
    on_template = tuple(choice.model_copy(update={"wording": "template"}) for choice in spec.tasks)
    again = ids_of(spec.model_copy(update={"tasks": on_template}), tmp_path, lrs)
    assert again
    assert not again & {run.id for run in committed}


def chat_backbone(folder: Path) -> str:
    """pedro-nano with a chat template."""
    shutil.copytree(EMBEDDED / "pedro-nano", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return str(folder)


@pytest.mark.parametrize(
    ("wording", "given", "form"),
    [("template", {}, "chat"), ("bare", {}, "raw"), ("template", {"chat_template": False}, "raw")],
)
def test_a_run_is_a_chat_where_the_backbone_has_a_template_for_it(wording, given, form, tmp_path):
    task = {"task": "snips", "wording": wording, "train_rows": 40, "validation_rows": 6, "test_rows": 6}
    tree = {"name": "chats", "tasks": [task], "methods": [{"name": "lora", "r": 1}], "seeds": [0], "training": TRAINING}
    tree |= given
    spec = validate_spec({**tree, "backbones": [chat_backbone(tmp_path / "chat")]}, ComparisonSpec)
    plain = validate_spec({**tree, "backbones": ["pedro-nano"]}, ComparisonSpec)
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    assert (data.chats is not None) == (form == "chat")
    assert gather(plain, plain.tasks[0], str(tmp_path / "storage")).chats is None
    planner = RunPlanner(spec, {"snips": data.digest})
    (plan,) = planner.finals(planner.groups[0], None)
    result = execute_run(plan, data, spec.resources, None, tmp_path / "cache")
    assert (result.state, result.message, result.prompt_format) == (FINISHED, "", form)
    assert result.scores[0].rows == 6


def test_a_system_turn_conditions_a_run_and_tells_the_bare_backbone(tmp_path):
    task = {"task": "snips", "wording": "system", "train_rows": 40, "validation_rows": 6, "test_rows": 6}
    methods = [
        {"name": "pedro", "r": 2, "conditioning": "system"},
        {"name": "pedro", "label": "answer", "r": 2, "apply_to": "answer", "tail": 5},
        {"name": "backbone", "by": "match"},
    ]
    tree = {"name": "told", "tasks": [task], "methods": methods, "seeds": [0], "training": TRAINING}
    spec = validate_spec({**tree, "backbones": [chat_backbone(tmp_path / "chat")]}, ComparisonSpec)
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"snips": data.digest})
    plans = [plan for group in planner.groups for plan in planner.finals(group, None)]
    assert {plan.wording for plan in plans} == {"system"}
    for plan in plans:
        kept: list = []
        result = execute_run(plan, data, spec.resources, None, tmp_path / "cache", kept.append)
        assert (result.state, result.message, result.prompt_format) == (FINISHED, "", "chat")
        assert kept[0].rows[0].prompt.startswith("Say which intent the text has: add, ")
    asked = BackboneAsker(plans[-1], spec.resources)
    row = data.tests[0].rows[0]
    prompt = asked.encoder.form.prompt(row.messages, asked.tokenizer)
    assert asked.encoder.prompt(row.prompt, row.system) == encode_prompt(asked.tokenizer, prompt)
    other = replace(data.tests[0], rows=(replace(row, system="Say it."), *data.tests[0].rows[1:]))
    assert _plain(other) != _plain(data.tests[0]), "another system turn is another comparison"


def test_a_backbone_with_worked_examples_wants_them_in_the_users_turn():
    tree = {"name": "told", "methods": [{"name": "backbone", "shots": 2}]}
    with pytest.raises(ConfigError, match="the wording 'system' of snips tells"):
        validate_spec({**tree, "tasks": [{"task": "snips", "wording": "system"}]}, ComparisonSpec)


def test_a_method_may_be_shown_other_words_as_a_row_of_its_own(tmp_path):
    methods = [{"name": "lora", "label": "LoRA", "r": 1}, {"name": "lora", "label": "bare", "r": 1, "wording": "bare"}]
    tree = {"name": "words", "tasks": [{"task": "snips", "test_rows": 6}], "methods": methods, "training": {"lr": 1e-2}}
    spec = validate_spec({**tree, "seeds": [0], "tune": None}, ComparisonSpec)
    prepared = prepare(spec, Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")}), tmp_path / "out", False, print)
    assert set(prepared.data) == {"snips", "snips, bare"}
    template, bare = (prepared.planner.finals(group, None)[0] for group in prepared.planner.groups)
    assert (template.wording, template.data_key) == ("template", "snips")
    assert (bare.wording, bare.data_key) == ("full", "snips, bare")
    assert template.id != bare.id
    shown = [[row.prompt for row in prepared.data[plan.data_key].tests[0].rows] for plan in (template, bare)]
    assert shown[0] == [f"Text: {prompt}\nIntent:" for prompt in shown[1]], "the same rows"
    trained = [[row.prompt for row in prepared.data[plan.data_key].train_rows] for plan in (template, bare)]
    assert trained[0] == [f"Text: {prompt}\nIntent:" for prompt in trained[1]]
    held = [[row.prompt for row in prepared.data[plan.data_key].validation_rows] for plan in (template, bare)]
    assert held[0] == [f"Text: {prompt}\nIntent:" for prompt in held[1]]
    with pytest.raises(ConfigError, match=r"alpaca has no 'bare'"):
        validate_spec({**tree, "tasks": ["alpaca"]}, ComparisonSpec)
