"""Scores: from the prompt alone, the same in any batch, adding up over workers."""

import math

import pytest
import torch

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
