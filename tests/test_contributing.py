"""The guides of CONTRIBUTING.md, taken from the page: its method is trained and served, its task taught and scored."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine_models import make_adapter, make_engine, prompt, random_backbone, reference_greedy, request
from engine_models import run as run_engine
from methods_models import SIZES, tiny_backbone, tokens
from peft import PeftModel
from test_methods_training import by_heart, recalled, train_on
from training_runs import context_for, run

from pedro.data import encode_completion, encode_prompt
from pedro.data.tasks import TASKS, get_task
from pedro.evaluation.metrics import score_answers
from pedro.evaluation.scoring import generate
from pedro.methods import METHODS, count_parameters
from pedro.training.spec import FineTuneSpec

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def taken(name: str, folder: Path) -> ModuleType:
    """The code block of the page that is `name`, as a module from a file of its own."""
    blocks = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    file = folder / Path(name).name
    file.write_text(blocks[name], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"guide_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dyad(tmp_path, monkeypatch):
    """The method of the guide, in the registry."""
    method = taken("platform/pedro/methods/dyad.py", tmp_path).METHOD
    monkeypatch.setitem(METHODS, method.name, method)
    return method


@pytest.fixture
def shades(tmp_path, monkeypatch):
    """The task of the guide, by name, and a folder of its data."""
    task = taken("platform/pedro/data/tasks/shades.py", tmp_path).TASK
    monkeypatch.setitem(TASKS, task.name, task)
    for part, count in (("train", 48), ("test", 6)):
        rows = [
            {"text": f"{('red', 'blue')[i % 2]} {i} and {('blue', 'red')[i % 2]}", "first": "rb"[i % 2]}
            for i in range(count)
        ]
        (tmp_path / "data" / "shades").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "shades" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return get_task("shades"), tmp_path / "data"


def test_the_guides_method_starts_as_the_identity_learns_by_heart_and_merges(dyad, tmp_path):
    with torch.no_grad():
        fresh = dyad.apply(tiny_backbone())
        assert torch.equal(fresh(tokens()).logits, tiny_backbone()(tokens()).logits)
    hidden, ffn, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 16
    inputs, outputs = 6 * hidden + ffn, 2 * hidden + 2 * kv + 2 * ffn + hidden
    assert count_parameters(fresh)["trainable"] == SIZES["num_hidden_layers"] * (inputs + outputs)
    rows = by_heart()
    model, _ = train_on("dyad", rows, steps=40)
    assert recalled(model, rows) >= 0.9
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        learned = model(tokens()).logits
        again = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter").eval()
        assert torch.equal(again(tokens()).logits, learned)
        torch.testing.assert_close(again.merge_and_unload()(tokens()).logits, learned, atol=1e-4, rtol=1e-4)


def test_the_guides_method_is_served_beside_another_without_any_other_line(dyad, tmp_path):
    model = random_backbone()
    tuned = {
        name: make_adapter(model, tmp_path / name, seed=number, method=name)
        for number, name in enumerate(("dyad", "pedro"), 1)
    }
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    answers = run_engine(engine, *(request(name, prompt(6), 5, adapter=name) for name in tuned))
    bare = reference_greedy(model, prompt(6), 5)
    for name, reference in tuned.items():
        expected = reference_greedy(reference, prompt(6), 5)
        assert answers[name].token_ids[: len(expected)] == expected != bare[: len(expected)]
    assert METHODS["dyad"].mixed_batches


def test_the_guides_method_learns_the_guides_task_and_is_scored(dyad, shades, tmp_path):
    task, data = shades
    task.write("train", tmp_path / "train.jsonl", data)
    assert (tmp_path / "train.jsonl").read_text().splitlines()[1] == json.dumps(
        {"prompt": "blue 1 and red\nThe first colour is", "completion": "blue"}
    )
    spec = FineTuneSpec.model_validate(
        {
            "tenant": "acme",
            "adapter": "shades",
            "data": {"train": str(tmp_path / "train.jsonl"), "validation": 0.2},
            "method": {"name": "dyad"},
            "training": {"max_steps": 30, "epochs": 100, "batch_size": 8, "lr": 0.03, "max_length": 64},
        }
    )
    context = context_for(spec, tmp_path)
    run(context, tmp_path / "run")
    rows, tokenizer = list(task.rows("test", data)), context.tokenizer
    asked = [
        {"input_ids": [*before, *encode_completion(tokenizer, row.completion)], "prompt_len": len(before)}
        for row in rows
        if (before := encode_prompt(tokenizer, row.prompt))
    ]
    answers = generate(context.model.eval(), tokenizer, asked, task.max_new_tokens)
    assert score_answers(task, rows, answers).value >= 0.8


def test_the_guides_name_what_there_is():
    page = PAGE.read_text(encoding="utf-8")
    guides = page[page.index("## Add a method") : page.index("## Add a dashboard page")]
    for name in re.findall(r"`((?:low_rank/|constants/|adapter_kinds/)?\w+\.py)`", guides):
        found = [*PAGE.parent.glob(f"platform/pedro/**/{name}"), *PAGE.parent.glob(f"tests/{name}")]
        assert found, f"{name} is not to be found"
