"""The backbone itself as rows of a table: how it is asked, how its answer is taken, what the table says of it."""

import json
import math
from collections import Counter

import pytest
import torch
from comparisons import result, rows_of, write_comparison

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.comparison.data import gather
from pedro.comparison.report import make_report, summarize, write_report
from pedro.comparison.result_model import FAILED, FINISHED
from pedro.comparison.run_executor import RunExecutor
from pedro.comparison.run_files import read_comparison
from pedro.comparison.run_planner import RunPlanner, check
from pedro.comparison.single_run import _job, execute_run
from pedro.comparison.spec import ComparisonSpec
from pedro.comparison.untrained import Untrained, candidates, prompt_of
from pedro.comparison.untrained_run import BackboneAsker
from pedro.data.prompt_format import encode_prompt, encode_text
from pedro.data.tasks import get_task
from pedro.errors import ConfigError
from pedro.evaluation.ranking import PromptReader, likeliest
from pedro.evaluation.scoring import answer_logprobs
from pedro.spec_reader import validate_spec
from pedro.training.context import build_context

WAYS = [{"name": "backbone", "shots": shots, "by": by} for by in ("likelihood", "match") for shots in (0, 4, "label")]


def spec_of(**changes) -> ComparisonSpec:
    task = {"task": "snips", "train_rows": 80, "validation_rows": 10, "test_rows": 20}
    tree = {"name": "bare", "backbones": ["pedro-nano"], "tasks": [task], "methods": WAYS, "seeds": [0, 1]}
    return validate_spec({**tree, **changes}, ComparisonSpec)


@pytest.mark.parametrize("name", ["stories260K", "pedro-nano"])
def test_answers_that_share_one_reading_of_the_prompt_are_as_likely_as_by_themselves(name):
    backbone = resolve_backbone(name)
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    prompt = encode_prompt(tokenizer, "Text: play some jazz\nIntent:")
    answers = [encode_text(tokenizer, text) for text in (" play", " small talk about nothing", " x", " play")]
    rows = [{"input_ids": [*prompt, *answer], "prompt_len": len(prompt)} for answer in answers]
    slowly = [nats for nats, _ in answer_logprobs(model, tokenizer, rows, shared=False)]
    nats = [each for each, _ in PromptReader(model).scores(prompt, answers)]
    assert nats == pytest.approx(slowly, abs=1e-3)
    assert likeliest(PromptReader(model), prompt, answers) == nats.index(max(nats))
    ((alone, _),) = PromptReader(model).scores(prompt, [answers[2][:1]])
    assert [alone] == pytest.approx([first_token(model, prompt, answers[2])], abs=1e-4)


@torch.no_grad()
def first_token(model, prompt, answer) -> float:
    return float(model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[answer[0]])


def test_examples_are_training_rows_others_for_each_seed_and_of_every_label_where_asked():
    task = get_task("snips")
    rows = list(task.rows("train"))
    every = Untrained("label", "likelihood").examples(task, rows, 0)
    assert Counter(row.completion for row in every) == Counter(set(task.words.labels.values()))
    assert every == Untrained("label", "likelihood").examples(task, rows, 0)
    assert every != Untrained("label", "likelihood").examples(task, rows, 1)
    four = Untrained(4, "likelihood").examples(task, rows, 0)
    assert len({row.completion for row in four}) == len(four) == 4
    assert len(Untrained(9, "match").examples(task, rows, 0)) == 9
    assert set(map(id, four)) <= set(map(id, rows))


def test_a_prompt_tells_what_is_asked_then_shows_then_asks():
    task = get_task("snips")
    asked, shown = list(task.rows("test"))[:2]
    text = prompt_of(task, asked, [shown])
    told, example, question = text.split("\n\n")
    assert all(label in told for label in task.words.labels.values())
    assert example == f"{shown.prompt} {shown.completion}"
    assert question == asked.prompt
    assert prompt_of(get_task("sst2"), asked, []) == asked.prompt, "its wording says what is asked"
    assert candidates(task, asked) == list(task.words.labels.values())


def test_each_way_is_a_run_that_trains_nothing(tmp_path):
    spec = spec_of()
    check(spec)
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"snips": data.digest})
    assert planner.count() == sum(len(planner.finals(group, None)) for group in planner.groups) == 2 * (1 + 2 + 2)
    assert len({plan.id for group in planner.groups for plan in planner.finals(group, None)}) == planner.count()
    for group in planner.groups:
        found = execute_run(planner.finals(group, None)[0], data, spec.resources, None, tmp_path / "cache")
        assert (found.state, found.message) == (FINISHED, "")
        assert (found.steps, found.trainable_parameters, found.prompt_format) == (0, 0, "raw")
        assert found.scores[0].rows == 20
        assert math.isnan(found.lr)
        if group.untrained.by == "likelihood":
            assert found.scores[0].unparsed == 0, "one of the labels is always the likeliest"
        json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_a_model_that_knows_the_answer_is_not_given_zero(tmp_path):
    """Exact match of a model that was never told the labels is 0.000 and says nothing; their likelihoods do."""
    spec = spec_of(methods=[{"name": "backbone", "shots": "label"}], seeds=[0])
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"snips": data.digest})
    found = execute_run(planner.finals(planner.groups[0], None)[0], data, spec.resources, None, tmp_path / "cache")
    assert found.scores[0].value > 0


@torch.no_grad()
def test_it_is_asked_with_the_weights_that_methods_train_over(tmp_path):
    def plans(**training):
        spec = spec_of(methods=["backbone", "lora"], seeds=[0], training={"max_steps": 1, **training})
        data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
        planner = RunPlanner(spec, {"snips": data.digest})
        return spec, data, *(planner.finals(group, None)[0] for group in planner.groups)

    spec, data, asked, trained = plans(backbone_dtype="nf4")
    asker = BackboneAsker(asked, spec.resources)
    context = build_context(_job(trained, data, spec.resources), tmp_path / "cache")
    ids = torch.tensor([asker.encoder.prompt("play some jazz")])
    with context.engine.bare():
        torch.testing.assert_close(asker.model(input_ids=ids).logits, context.model(input_ids=ids).logits)
    (_, _, whole, _), (_, _, short, _) = plans(), plans(precision="bf16")
    assert BackboneAsker(short, spec.resources).model.dtype == torch.bfloat16
    bare = BackboneAsker(whole, spec.resources).model(input_ids=ids).logits
    assert not torch.allclose(asker.model(input_ids=ids).logits, bare, atol=1e-3)
    assert [plan.training for plan in (asked, short, whole)] == [{"backbone_dtype": "nf4"}, {"precision": "bf16"}, {}]
    assert len({asked.id, short.id, whole.id}) == 3
    assert " lr " not in str(asked)


def test_prompts_that_do_not_fit_are_a_failed_run_that_says_so(tmp_path):
    spec = spec_of(methods=[{"name": "backbone", "shots": 200}], tasks=[{"task": "snips", "test_rows": 5}], seeds=[0])
    data = gather(spec, spec.tasks[0], str(tmp_path / "storage"))
    planner = RunPlanner(spec, {"snips": data.digest})
    found = execute_run(planner.finals(planner.groups[0], None)[0], data, spec.resources, None, tmp_path / "cache")
    assert found.state == FAILED
    assert "snips: no prompt with 200 examples fits into 512 tokens" in found.message


def test_what_cannot_be_asked_is_refused_or_left_out():
    for change, words in (
        ({"tasks": [{"task": "snips", "wording": "bare"}]}, "the wording 'bare' of snips does not say what is asked"),
        ({"methods": [{"name": "backbone", "shots": -1}]}, "method.shots: expected a number from 0 to 256, or 'label'"),
        ({"methods": [{"name": "backbone", "by": "guess"}]}, "method.by: expected likelihood or match, got 'guess'"),
        ({"methods": [{"name": "backbone", "r": 2}]}, "method.r: unknown option; the backbone takes shots, by"),
        (
            {"tasks": [{"task": "alpaca", "evaluate": ["mmlu"]}], "methods": [{"name": "backbone", "shots": 4}]},
            "examples are rows that are trained on, and these are alpaca's; use shots: 0 for mmlu",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            spec_of(**change)
        assert words in caught.value.message
    free = spec_of(tasks=["squad"])
    asked = {(g.untrained.shots, g.untrained.by) for g in RunPlanner(free, {"squad": "d"}).groups}
    assert asked == {(0, "match"), (4, "match")}, "free text has no labels"


def test_a_search_leaves_the_backbone_alone(tmp_path):
    methods = [{"name": "backbone"}, {"name": "lora", "r": 1}]
    spec = spec_of(methods=methods, tune={"lr": [1e-3, 1e-2]}, training={"max_steps": 2})
    (tmp_path / "comparison.json").write_text(json.dumps({"name": spec.name}))
    executor = RunExecutor(spec, RunPlanner(spec, {"snips": "d"}), {}, tmp_path, {})
    executor._begin()
    queued = [(plan.group.label, plan.stage) for *_, plan in executor._queue]
    assert queued.count(("Backbone, no examples, likeliest label", "final")) == 1
    assert len(queued) == 3


def test_a_table_says_what_the_backbones_rows_are_and_counts_no_training_for_them(tmp_path):
    bare = {"method": "backbone", "lr": math.nan, "training": {}, "steps": 0, "optimizer_steps": 0, "parameters": 0}
    runs = [result("LoRA", "snips", seed, rows_of("snips", seed, 2)) for seed in (0, 1, 2)]
    runs.append(result("Backbone, no examples, likeliest label", "snips", 0, rows_of("snips", 7, 0), **bare))
    folder = write_comparison(tmp_path / "made", runs)
    report = make_report(read_comparison(folder))
    write_report(report)
    text = (folder / "table.md").read_text()
    assert "Backbone: nothing is trained." in text
    assert "Whether compute" not in text
    assert "Equal for all methods: compute" in text
    assert "nan" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Backbone"))
    assert "| - |" in row, "no trained parameters"
    json.dumps(summarize(report), allow_nan=False)
