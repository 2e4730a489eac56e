"""`data.template`: the same words around every prompt, in training, in scoring and in what an adapter is asked with."""

import json

import pytest
from training_runs import LocalReporter, context_for, spec_for, write_rows

from pedro.adapter_directory import read_manifest
from pedro.data.prompt_format import FORMATS, PromptFormat, around
from pedro.errors import ConfigError, DataError
from pedro.evaluation.saved import score_file
from pedro.training import worker
from pedro.training.spec import DataSpec

TEMPLATE = 'Say "the colour" of {prompt}\nIt is:'


def with_template(spec, template=TEMPLATE):
    return spec.model_copy(update={"data": spec.data.model_copy(update={"template": template})})


def test_every_prompt_ends_with_the_same_tokens(tmp_path):
    ends = {}
    for name, spec in (("bare", spec_for(tmp_path)), ("template", with_template(spec_for(tmp_path)))):
        context = context_for(spec, tmp_path)
        rows = [context.data.train[place] for place in range(len(context.data.train))]
        ends[name] = {tuple(row["input_ids"][: row["prompt_len"]][-3:]) for row in rows}
    assert len(ends["bare"]) > 1
    assert len(ends["template"]) == 1


def test_an_adapter_carries_the_template_and_is_scored_and_asked_in_it(tmp_path):
    context = context_for(with_template(spec_for(tmp_path, max_steps=2, eval_every=2)), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run"))
    worker.save(context, trained, tmp_path / "adapter")
    form = PromptFormat.from_dict(read_manifest(tmp_path / "adapter")["prompt_format"])
    asked = form.prompt([{"role": "user", "content": "item 3 {{ shade }}"}], context.tokenizer)
    assert asked == TEMPLATE.replace("{prompt}", "item 3 {{ shade }}"), "what a tenant writes is no template"
    file = write_rows(tmp_path / "test.jsonl", 12, start=100)
    scored = score_file(tmp_path / "adapter", file, tmp_path / "cache")
    assert scored["rows"] == 12
    assert scored["loss"] == pytest.approx(expected_loss(context, file, tmp_path), rel=1e-4)


def expected_loss(context, file, folder) -> float:
    """Of the same rows with the template written into their prompts."""
    from pedro.data import load_rows
    from pedro.evaluation.scoring import score

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    written = folder / "written.jsonl"
    written.write_text(
        "".join(json.dumps({**row, "prompt": TEMPLATE.replace("{prompt}", row["prompt"])}) + "\n" for row in rows)
    )
    encoded = load_rows(written, context.tokenizer, FORMATS["raw"], 64, folder / "rows")
    return score(context.model, context.tokenizer, list(encoded)).loss


@pytest.mark.parametrize("wrong", ["Text:", "{prompt}", "{prompt} and {prompt}", " {prompt}\n"])
def test_a_template_without_one_place_for_the_prompt_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected text with {prompt} in it once"):
        DataSpec(train="a.jsonl", template=wrong)
    with pytest.raises(ConfigError, match=r"data\.template: expected text with {prompt}"):
        around(FORMATS["raw"], wrong)


def test_rows_that_have_a_format_of_their_own_take_no_template(tmp_path):
    spec = with_template(spec_for(tmp_path))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(DataError, match=r"data\.template: is for rows of prompt and completion; these have the chat"):
        context_for(spec, tmp_path)
