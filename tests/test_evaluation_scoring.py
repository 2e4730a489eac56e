"""Scores: from the prompt alone, the same in any batch, adding up over workers."""

import math

import pytest
import torch
from engine_models import make_adapter, make_engine, request, run

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data import encode_completion, encode_prompt
from pedro.evaluation.scoring import Score, answer_loss, exact_match, generate, majority, score

PROMPTS = ["Once upon a time", "Lily", "The big red dog went to the park and", "One day, a boy named Tim"]


@pytest.fixture(scope="module")
def backbone():
    torch.set_num_threads(1)
    found = resolve_backbone("stories260K")
    return load_model(found), load_tokenizer(found)


def _rows(tokenizer, answers):
    rows = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        before, after = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, answer)
        rows.append({"input_ids": [*before, *after], "prompt_len": len(before), "completion": answer})
    return rows


def test_generation_sees_the_prompt_alone(backbone):
    model, tokenizer = backbone
    one = generate(model, tokenizer, _rows(tokenizer, ["a", "b", "c", "d"]), 8)
    other = generate(model, tokenizer, _rows(tokenizer, ["cat dog", "x", "happy", "the end"]), 8)
    assert one == other
    assert all(one)


def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(backbone):
    model, tokenizer = backbone
    rows = _rows(tokenizer, ["a"] * 4)
    together = generate(model, tokenizer, rows, 8, batch_size=4)
    assert together == [generate(model, tokenizer, [row], 8)[0] for row in rows]


def test_the_output_projection_has_the_rows_of_a_batch_side_by_side(backbone):
    """Else its weights, most of a small backbone's, would be read once a row."""
    model, tokenizer = backbone
    projection, seen = model.get_output_embeddings(), []
    watch = projection.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].is_contiguous()))
    generate(model, tokenizer, _rows(tokenizer, ["a"] * 4), 3, batch_size=4)
    watch.remove()
    assert len(seen) == 3
    assert all(seen)
    assert not projection._forward_pre_hooks


def test_scores_of_parts_add_up_to_the_score_of_the_whole(backbone):
    model, tokenizer = backbone
    wanted = generate(model, tokenizer, _rows(tokenizer, ["a"] * 4), 3)
    rows = _rows(tokenizer, [wanted[0].strip(), "zebra", wanted[2].strip(), "zebra"])
    whole = score(model, tokenizer, rows)
    parts = sum((score(model, tokenizer, rows[rank::3]) for rank in range(3)), Score())
    assert (parts.correct, parts.rows, parts.tokens) == (whole.correct, whole.rows, whole.tokens)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_the_loss_is_the_models_own_mean_over_answer_tokens(backbone):
    model, tokenizer = backbone
    row = _rows(tokenizer, ["there was a girl"] * 4)[0]
    labels = torch.tensor([[-100] * row["prompt_len"] + row["input_ids"][row["prompt_len"] :]])
    reference = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
    total, tokens = answer_loss(model, tokenizer, [row])
    assert total / tokens == pytest.approx(reference, rel=1e-5)


def test_no_rows_score_as_no_number():
    assert math.isnan(Score().accuracy)
    assert math.isnan(Score().loss)


def test_answers_are_compared_without_the_white_space_around_them():
    assert exact_match(" play\n", "play")
    assert not exact_match("play music", "play")


def test_the_majority_answer_is_the_most_frequent_and_ties_go_to_the_alphabet():
    assert majority(["b", "a", "b "]) == "b"
    assert majority(["b", "a"]) == "a"
    assert majority([]) == ""


@pytest.mark.parametrize(
    "habits",
    [
        {"repetition_penalty": 1.3, "eos_token_id": [2, 400], "suppress_tokens": [5, 8, 13], "max_length": 3},
        {"use_cache": False, "num_beams": 3, "do_sample": True, "temperature": 3.0},
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_scoring_decodes_as_the_engine_serves_whatever_the_backbones_generation_config_says(
    backbone, tmp_path, habits, adapted
):
    _, tokenizer = backbone
    found = resolve_backbone("stories260K")
    bare = load_model(found)
    bare.generation_config.update(**habits)
    bare.config.use_cache = habits.get("use_cache", True)
    before = bare.generation_config.to_dict()
    model = make_adapter(bare, tmp_path / "adapter", 1, digest=found.digest) if adapted else bare
    rows = _rows(tokenizer, ["a"] * 4)
    scored = generate(model, tokenizer, rows, 12)
    assert bare.generation_config.to_dict() == before
    engine = make_engine(bare, tokenizer, lambda ref: tmp_path / ref, digest=found.digest)
    adapter = {"adapter": "adapter"} if adapted else {}
    asked = [request(str(i), row["input_ids"][: row["prompt_len"]], 12, **adapter) for i, row in enumerate(rows)]
    answers = run(engine, *asked)
    assert [text.strip() for text in scored] == [answers[str(i)].text.strip() for i in range(len(rows))]
