"""Beam search gives the hypotheses of transformers' own, in its order, alone and among other requests."""

import pytest
import torch
from engine_models import drain, make_adapter, make_engine, prompt, random_backbone, request, run, stories
from transformers import GenerationConfig

from pedro.engine import SamplingParams
from pedro.errors import PedroError


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


def reference(model, ids, beams, max_tokens, n=1, eos=None, **options):
    """The answers of transformers' generate, without padding, and how each ended."""
    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=n,
        max_new_tokens=max_tokens,
        do_sample=False,
        min_new_tokens=options.pop("min_tokens", 0),
        eos_token_id=eos,
        pad_token_id=95,
        **options,
    )
    inputs = torch.tensor([ids])
    made = model.generate(input_ids=inputs, generation_config=config, attention_mask=torch.ones_like(inputs))
    answers = []
    for row in made[:, len(ids) :].tolist():
        ends = [i for i, token in enumerate(row) if token in (eos or ())]
        answers.append(row[: ends[0] + 1] if ends else row)
    return answers


def hypotheses(answers, name="r"):
    """The token ids of all answers to a request, best first; each came as one output."""
    mine = {(key[1] if isinstance(key, tuple) else 0): a for key, a in answers.items() if name in (key, key[0])}
    assert all(len(answer.outputs) == 1 for answer in mine.values())
    return [mine[index].token_ids for index in range(len(mine))]


@pytest.mark.parametrize(
    ("options", "eos"),
    [
        ({}, None),
        ({}, (7, 11, 30, 52, 60)),
        ({"length_penalty": 0.0}, tuple(range(2, 40))),
        ({"length_penalty": 2.0}, tuple(range(2, 20))),
        ({"length_penalty": -1.0}, tuple(range(2, 20))),
        ({"early_stopping": True}, tuple(range(2, 20))),
        ({"repetition_penalty": 1.3}, (7, 11)),
        ({"min_tokens": 5}, tuple(range(2, 40))),
    ],
)
def test_beams_equal_those_of_transformers(model, options, eos):
    for beams, n, seed in ((2, 1, 0), (4, 4, 1), (3, 2, 2)):
        ids = prompt(7 + seed, seed)
        expected = reference(model, ids, beams, 12, n, list(eos) if eos else None, **options)
        asked = request("r", ids, 12, n=n, num_beams=beams, stop_token_ids=eos or (), **options)
        answers = run(make_engine(model), asked)
        assert hypotheses(answers) == expected
        for key, tokens in zip([*answers], expected, strict=True):
            assert answers[key].last.finish_reason == ("stop" if eos and tokens[-1] in eos else "length")
            assert answers[key].last.completion_tokens == len(tokens)


def test_beams_with_adapters_among_other_requests_are_those_of_each_alone(model, tmp_path):
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=8)
    others = [request(f"o{i}", prompt(5, i), 6 + i, adapter=("a", None)[i % 2], tenant=f"t{i}") for i in range(4)]
    asked = request("r", prompt(9), 10, num_beams=3, n=3, adapter="a")
    bare = request("b", prompt(9), 10, num_beams=2, n=2)
    answers = run(engine, *others[:2], asked, *others[2:], bare)
    assert hypotheses(answers) == reference(tuned, prompt(9), 3, 10, 3)
    assert hypotheses(answers, "b") == reference(model, prompt(9), 2, 10, 2)
    for one in others:
        alone = run(make_engine(model, load=lambda ref: tmp_path / ref), one)
        assert answers[one.id].token_ids == alone[one.id].token_ids
    assert engine.stats()["slots_free"] == 8


def test_the_text_of_a_beam_is_that_of_its_tokens_and_ends_at_a_stop_text():
    model, tokenizer, _ = stories()
    ids = tokenizer("Once upon a time").input_ids
    whole = run(make_engine(model, tokenizer), request("r", ids, 24, num_beams=3))["r"]
    expected = reference(model, ids, 3, 24, eos=[tokenizer.eos_token_id])
    assert whole.token_ids == expected[0]
    assert whole.text == tokenizer.decode([*ids, *expected[0]], skip_special_tokens=True)[len("Once upon a time") :]
    stopped = run(make_engine(model, tokenizer), request("r", ids, 24, num_beams=3, stop=(".",)))["r"]
    assert "." not in stopped.text
    assert "." in tokenizer.decode(stopped.token_ids[-1:])
    assert stopped.last.finish_reason == "stop"


def test_beams_wait_for_their_slots_and_are_not_passed_over(model):
    engine = make_engine(model, max_batch=4)
    for i in range(20):
        engine.add(request(f"o{i}", prompt(5, i), 4 + i % 3, tenant="flood"))
    engine.add(request("r", prompt(6), 5, num_beams=4, tenant="beams"))
    answers = drain(engine)
    assert answers["r"].token_ids == reference(model, prompt(6), 4, 5)[0]
    order = [key for key, answer in answers.items() if answer.last.finish_reason]
    assert order.index("r") < 12, "the flood did not keep taking the slots that came free"


def test_a_search_cancelled_before_it_had_slots_leaves_the_wants_of_others_alone(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=4)
    engine.adapters.load("a", timeout_s=30.0)
    engine.add(request("running", prompt(5), 60))
    engine.step()
    engine.add(request("beams", prompt(6), 5, num_beams=4, adapter="a"))
    engine.add(request("behind", prompt(6), 5, adapter="a"))
    engine.step()
    assert engine.adapters.residents()["a"].refcount == 0, "who waits for slots holds nothing"
    engine.cancel("beams")
    assert engine.adapters._waiters["a"] == 1
    engine.step()
    assert (engine.adapters.residents()["a"].refcount, engine.adapters._waiters["a"]) == (0, 0)


def test_more_beams_than_slots_are_refused(model):
    with pytest.raises(PedroError, match=r"5 beams .* 4 sequences") as caught:
        make_engine(model).add(request("r", prompt(6), 5, num_beams=5))
    assert caught.value.param == "num_beams"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs"),
        ({"num_beams": 2, "max_tokens": 0, "prompt_logprobs": 0}, "max_tokens"),
        ({"length_penalty": float("inf")}, "length_penalty"),
        ({"num_beams": 2, "stop": ("x",), "min_tokens": 1}, "min_tokens"),
    ],
)
def test_options_that_do_not_go_together_are_named(wrong, param):
    with pytest.raises(PedroError) as caught:
        SamplingParams(**wrong)
    assert caught.value.param == param


def test_a_search_that_is_cancelled_or_late_ends_every_answer_and_frees_its_slots(model):
    engine = make_engine(model, max_batch=4)
    engine.add(request("r", prompt(6), 100, num_beams=3, n=2))
    engine.add(request("late", prompt(6), 100, num_beams=3, n=2, deadline_s=0.001))
    outputs = [output for _ in range(4) for output in engine.step()]
    engine.cancel("r")
    ends = {(one.request_id, one.index): one for one in (*outputs, *engine.take_outputs())}
    assert {ends["r", i].finish_reason for i in (0, 1)} == {"cancelled"}
    assert {ends["late", i].error.code for i in (0, 1)} == {"deadline_exceeded"}
    assert engine.stats()["slots_free"] == 4
    assert hypotheses(run(engine, request("r", prompt(6), 5, num_beams=4))) == reference(model, prompt(6), 4, 5)


def test_a_search_over_numbers_that_are_not_finite_fails_alone(model):
    engine = make_engine(model, max_batch=4)
    engine.add(request("bad", prompt(20), 20, num_beams=2, n=2))
    engine.add(request("good", prompt(6), 8))
    engine.step()
    engine._runner.cache.values[1][0, :, 15] = float("nan")
    answers = drain(engine)
    assert {answers[key].last.error.code for key in ("bad", ("bad", 1))} == {"engine_error"}
    assert answers["good"].last.error is None
    assert hypotheses(run(engine, request("r", prompt(6), 5, num_beams=4))) == reference(model, prompt(6), 4, 5)
