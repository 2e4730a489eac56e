"""Tokens are chosen as asked, and the same ones whoever shares the batch."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine_models import (
    Letters,
    drain,
    make_engine,
    prompt,
    random_backbone,
    reference_logits,
    request,
    run,
    stories,
)
from transformers import GenerationConfig

from pedro.engine import SamplingParams
from pedro.engine.sampler import SampleRow, greedy, sample, uniform
from pedro.engine.token_mask import allowed, allowed_by_shifts
from pedro.errors import PedroError


def draw(logits, count=400, prompt_ids=(), output_ids=(), **params):
    """How often each token is drawn over `count` seeds."""
    fields = {"temperature": 1.0, **params}
    rows = [SampleRow(SamplingParams(**fields), seed, 0, list(prompt_ids), list(output_ids)) for seed in range(count)]
    return Counter(s.token_id for s in sample(torch.tensor([logits]).repeat(count, 1), rows))


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


def test_the_uniform_numbers_are_spread_and_below_one():
    numbers = [uniform(seed, choice, position) for seed in range(20) for choice in range(5) for position in range(20)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


@pytest.mark.parametrize("vocabulary", [31, 64, 90, 96, 100])
def test_a_mask_lets_the_tokens_through_whose_bits_are_set_and_none_past_its_end(vocabulary):
    drawn = torch.Generator().manual_seed(vocabulary)
    masks = [torch.randint(-(2**31), 2**31, (3,), generator=drawn, dtype=torch.int32) for _ in range(4)]
    slow = [[t < 96 and bool(mask[t // 32].item() >> (t % 32) & 1) for t in range(vocabulary)] for mask in masks]
    assert allowed(masks, vocabulary, torch.device("cpu")).tolist() == slow
    assert allowed_by_shifts(torch.stack(masks), vocabulary).tolist() == slow


def test_masked_rows_of_a_mixed_batch_choose_among_what_is_let_through():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    rows = [SampleRow(SamplingParams(temperature=0), 0, 0, [], [], mask=mask) for mask in (None, word(0, 3), word(2))]
    assert [one.token_id for one in sample(logits, rows)] == [1, 3, 2]


def word(*tokens):
    """A mask that lets these tokens through."""
    return torch.tensor([sum(1 << token for token in tokens)], dtype=torch.int32)


def test_draws_follow_the_distribution():
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.softmax(torch.tensor(logits), -1)
    counts = draw(logits, count=4000)
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 1}, {2}),
        ({"top_k": 10**400}, {0, 1, 2, 3}),
        ({"top_p": 1e-300}, {2}),
        ({"top_p": 0.6}, {2}),
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),
        ({"min_p": 1.0}, {2}),
        ({"temperature": 0.01}, {2}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.01}, {0, 1, 2}),
        ({"logit_bias": {3: 100.0}}, {3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_what_they_promise(params, kept):  # probabilities 0.09, 0.24, 0.64, 0.03
    assert set(draw([0.0, 1.0, 2.0, -1.0], **params)) == kept


def test_each_position_and_each_choice_draws_anew():
    params = SamplingParams(temperature=1.0)
    positions = [SampleRow(params, 5, 0, [], [0] * position) for position in range(30)]
    choices = [SampleRow(params, 5, choice, [], []) for choice in range(30)]
    for rows in (positions, choices):
        assert len({s.token_id for s in sample(torch.zeros(30, 50), rows)}) > 15


def test_biases_of_a_mixed_batch_give_what_a_loop_over_their_tokens_gives(model):
    """Also beside penalties, in beam search, and for each of n answers; neighbours keep the model's own."""
    bias = {5: 4.0, 17: -100.0, 40: 2.5, 41: 2.5}
    prompts = [prompt(6, 1), prompt(9, 2)]

    def slow(ids, biases, count):
        ids, at = list(ids), len(ids)
        for _ in range(count):
            logits = reference_logits(model, ids, at)[-1].clone()
            for token, value in biases.items():
                logits[token] += value
            best = logits.topk(2)
            assert best.values[0] - best.values[1] > 1e-3, "clear enough to compare"
            ids.append(int(best.indices[0]))
        return ids[at:]

    answers = run(
        make_engine(model, max_batch=8),
        *(request(f"biased{i}", ids, 10, logit_bias=bias) for i, ids in enumerate(prompts)),
        *(request(f"bare{i}", ids, 10) for i, ids in enumerate(prompts)),
        request("several", prompts[0], 10, logit_bias=bias, n=2),
        request("beams", prompts[0], 10, logit_bias={23: 100.0}, num_beams=2),
    )
    for i, ids in enumerate(prompts):
        wanted = slow(ids, bias, 10)
        assert answers[f"biased{i}"].token_ids == wanted
        assert answers[f"bare{i}"].token_ids == slow(ids, {}, 10)
    assert answers["biased0"].token_ids != answers["bare0"].token_ids
    assert answers["several"].token_ids == answers["several", 1].token_ids == answers["biased0"].token_ids
    assert answers["beams"].token_ids == [23] * 10


def test_a_bias_of_a_token_that_is_none_is_refused(model):
    with pytest.raises(PedroError, match="token 96 is outside the vocabulary of 96") as refused:
        make_engine(model).add(request("r", prompt(4), 2, logit_bias={95: 1.0, 96: 1.0}))
    assert refused.value.param == "logit_bias"


def test_rows_of_one_batch_keep_their_own_filters():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(3, 1)
    for seed in range(50):
        rows = [
            SampleRow(SamplingParams(temperature=1.0, top_k=1), seed, 0, [], []),
            SampleRow(SamplingParams(temperature=1.0, logit_bias={0: 100.0}), seed, 0, [], []),
            SampleRow(SamplingParams(), seed, 0, [], []),
        ]
        assert [s.token_id for s in sample(logits.clone(), rows)] == [2, 0, 2]


def test_penalties_lower_what_was_said():
    logits = [2.0, 1.9, -5.0]
    greedy = {"temperature": 0.0, "count": 1}
    assert draw(logits, **greedy) == {0: 1}
    assert draw(logits, prompt_ids=[0], repetition_penalty=1.2, **greedy) == {1: 1}
    assert draw(logits, prompt_ids=[0], presence_penalty=1.0, **greedy) == {0: 1}, "the prompt was not said"
    assert draw(logits, output_ids=[0], presence_penalty=0.2, **greedy) == {1: 1}
    assert draw(logits, output_ids=[0], frequency_penalty=0.06, **greedy) == {0: 1}
    assert draw(logits, output_ids=[0, 0], frequency_penalty=0.06, **greedy) == {1: 1}


def test_logprobs_are_the_models_own():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    row = SampleRow(SamplingParams(logprobs=2, logit_bias={0: 100.0}), 0, 0, [], [])
    (made,) = sample(logits, [row])
    expected = torch.log_softmax(logits[0], -1)
    assert made.token_id == made.logprob.token_id == 0
    assert made.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in made.logprob.top] == [2, 1]


def test_a_seed_gives_the_same_answer_whoever_else_is_served(model):
    fields = {"temperature": 1.0, "seed": 11, "top_p": 0.95}
    alone = run(make_engine(model), request("r", prompt(6), 12, **fields))["r"].token_ids
    others = [request(f"o{i}", prompt(4 + i, i), 5 + i, temperature=1.0, seed=i) for i in range(7)]
    among = run(make_engine(model, max_batch=5), *others, request("r", prompt(6), 12, **fields))["r"].token_ids
    assert among == alone
    assert run(make_engine(model), request("r", prompt(6), 12, **{**fields, "seed": 12}))["r"].token_ids != alone


def test_n_answers_differ_and_each_is_reproducible(model):
    asked = request("r", prompt(6), 10, temperature=1.0, seed=3, n=3)
    first, second = run(make_engine(model), asked), run(make_engine(model, max_batch=2), asked)
    texts = [first[key].text for key in ("r", ("r", 1), ("r", 2))]
    assert len(set(texts)) == 3
    assert texts == [second[key].text for key in ("r", ("r", 1), ("r", 2))]


def test_without_a_seed_answers_vary(model):
    answers = run(make_engine(model), *(request(f"r{i}", prompt(6), 10, temperature=1.5) for i in range(4)))
    assert len({answer.text for answer in answers.values()}) > 1


def test_a_stop_text_ends_the_answer_across_token_borders():
    model, tokenizer, _ = stories()
    ids = tokenizer("Once upon a time").input_ids
    whole = run(make_engine(model, tokenizer), request("r", ids, 30))["r"].text
    stop = whole[20:27]
    assert len(tokenizer(stop, add_special_tokens=False).input_ids) > 1
    stopped = run(make_engine(model, tokenizer), request("r", ids, 30, stop=(stop, "never said")))["r"]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.last.finish_reason == "stop"


def test_stop_ids_and_eos_end_the_answer_and_give_no_text(model):
    whole = run(make_engine(model), request("r", prompt(6), 10))["r"]
    third = whole.token_ids[2]
    until = whole.token_ids.index(third)
    stopped = run(make_engine(model), request("r", prompt(6), 10, stop_token_ids=(third,)))["r"]
    assert (stopped.token_ids, stopped.text) == (whole.token_ids[: until + 1], whole.text[:until])
    assert stopped.last.finish_reason == "stop"

    class Ending(Letters):
        eos_token_id = third

    ended = run(make_engine(model, Ending()), request("r", prompt(6), 10))["r"]
    assert (ended.text, ended.last.finish_reason) == (stopped.text, "stop")
    ignored = run(make_engine(model, Ending()), request("r", prompt(6), 10, ignore_eos=True))["r"]
    assert ignored.token_ids == whole.token_ids


def generated(model, ids, count, least, eos):
    """The answer of transformers' greedy generate."""
    config = GenerationConfig(
        max_new_tokens=count, min_new_tokens=least, do_sample=False, eos_token_id=list(eos), pad_token_id=95
    )
    made = model.generate(torch.tensor([ids]), generation_config=config, attention_mask=torch.ones(1, len(ids)))
    return made[0, len(ids) :].tolist()


def test_min_tokens_holds_off_every_token_that_would_end_the_answer_as_generate_does(model):
    ends = tuple(range(2, 50))
    for least, seed in itertools.product((1, 4, 12), range(3)):
        ids = prompt(6, seed)
        expected = generated(model, ids, 12, least, ends)
        neighbours = [request(f"n{i}", prompt(5, 9 + i), 12, stop_token_ids=ends) for i in range(2)]
        asked = request("r", ids, 12, stop_token_ids=ends, min_tokens=least)
        answers = run(make_engine(model), asked, *neighbours)
        assert answers["r"].token_ids == expected
        assert least <= len(expected)
        assert [answers[n.id].token_ids for n in neighbours] == [
            generated(model, n.prompt_ids, 12, 0, ends) for n in neighbours
        ]
        if len(expected) > 3:
            again = request("r", ids, 12, stop_token_ids=ends, min_tokens=least, resumed_ids=tuple(expected[:3]))
            assert run(make_engine(model), again)["r"].token_ids == expected[3:], "tokens of before a failover count"


def test_no_draw_ends_an_answer_before_min_tokens():
    row = SampleRow(SamplingParams(temperature=1.0), 0, 0, [], [], barred=frozenset({1, 2}))
    rows = [replace(row, seed=seed) for seed in range(200)]
    assert {one.token_id for one in sample(torch.tensor([[0.0, 1.0, 9.0, -1.0]]).repeat(200, 1), rows)} == {0, 3}


def test_max_tokens_ends_the_answer_and_none_fills_the_context(model):
    engine = make_engine(model, max_length=32)
    answers = run(engine, request("r", prompt(6), 5), request("all", prompt(6), None))
    assert answers["r"].last.finish_reason == "length"
    assert (len(answers["r"].token_ids), answers["r"].last.completion_tokens) == (5, 5)
    assert len(answers["all"].token_ids) == 32 - 6


def test_logits_that_are_no_numbers_fail_their_request_and_poison_no_other(model):
    engine = make_engine(model, max_batch=2)
    expected = run(make_engine(model), request("r", prompt(6), 8))["r"].token_ids
    engine.add(request("bad", prompt(20), 20))
    engine.step()
    engine._runner.cache.values[1][0, :, 15] = float("nan")
    bad = drain(engine)["bad"].last
    assert (bad.finish_reason, bad.error.code) == ("error", "engine_error")
    after = run(engine, request("r", prompt(6), 8), request("longer", prompt(30), 8))
    assert after["r"].token_ids == expected, "in the slot that held the numbers, masked but not weightless"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 4, "max_tokens": 3},
        {"repetition_penalty": 1e-40},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -3.0},
        {"stop": ("",)},
        {"logprobs": 99},
        {"logit_bias": {1: 1000.0}},
    ],
)
def test_a_parameter_out_of_range_is_named(wrong):
    with pytest.raises(PedroError) as caught:
        SamplingParams(**wrong)
    assert caught.value.param == next(iter(wrong))
    assert next(iter(wrong)) in caught.value.message


def test_what_top_k_and_top_p_keep_is_the_same_whether_few_candidates_are_sorted_or_all(monkeypatch):
    """Ties included: a model in bfloat16 has many, and the order among them must not depend on the way taken."""
    logits = torch.randn(12, 1000, generator=torch.Generator().manual_seed(3)).mul(4).bfloat16().float()
    options = [{"top_k": k} for k in (1, 40, 255, 256, 300)] + [{"top_p": p} for p in (0.1, 0.9, 0.999)]
    options += [{"top_k": 60, "top_p": 0.8}, {"top_k": 60, "min_p": 0.05}, {"top_p": 0.9, "min_p": 0.02}, {}]
    params = [SamplingParams(temperature=1.3, **option) for option in options]

    def draw_all(order):
        drawn = [[] for _ in params]
        for seed in range(60):
            made = sample(logits[order], [SampleRow(params[i], seed, 0, [], []) for i in order])
            for i, one in zip(order, made, strict=True):
                drawn[i].append(one.token_id)
        return drawn

    few = draw_all(list(range(12)))
    assert few == draw_all([7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6]), "neighbours and their order change nothing"
    monkeypatch.setattr("pedro.engine.sampler.CANDIDATES", 1000)
    assert few == draw_all(list(range(12)))


def test_a_temperature_near_zero_is_greedy_and_rows_without_numbers_say_so():
    logits = torch.tensor(
        [[0.0, 9.0, 8.9], [float("nan"), 1.0, 0.0], [0.0, float("inf"), 1.0], [float("-inf"), 1.0, 0.0]]
    )
    rows = [SampleRow(SamplingParams(temperature=t), 1, 0, [], []) for t in (1e-30, 1.0, 1.0, 1e-30)]
    assert [one.token_id for one in sample(logits, rows)] == [1, -1, -1, 1]
    assert greedy(logits) == [1, -1, -1, 1]
