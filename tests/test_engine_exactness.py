"""What the engine computes equals the slow reference: one row alone, uncached, through PEFT or the bare model."""

import copy

import pytest
import torch
from engine_models import (
    ARCHITECTURES,
    DIGEST,
    drain,
    make_adapter,
    make_engine,
    prompt,
    random_backbone,
    reference_greedy,
    reference_logits,
    request,
    run,
    stories,
)

from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.errors import BackboneError
from pedro.methods.servable import read_adapter

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
METHODS = {
    "pedro": {},
    "pedro-1": {},
    "pedro-2": {"pool_source": "residual"},
    "pedro-3": {},
    "pedro-4": {},
    "pedro-7": {},
    "para": {},
}


def check_rows_against_references(model, references, prompts, tmp_path, steps=6):
    """Prefill all rows at once, decode with made-up tokens, compare each step's logits with an uncached forward."""
    own = copy.deepcopy(model)
    runner = Runner(own, slots=len(prompts) + 2, length=64)
    adapters = [
        None if path is None else read_adapter(path, runner.architecture, DIGEST, runner.device, runner.simd_width)
        for _, path in references
    ]
    rows = [PrefillRow(i, ids, len(ids), a) for i, (ids, a) in enumerate(zip(prompts, adapters, strict=True))]
    runner.begin(rows)
    for until in (1, 9, 20, None):
        runner.advance(until)
    (logits, _), _ = runner.end()
    tokens = [list(ids) for ids in prompts]
    for step in range(steps):
        for i, (reference, _) in enumerate(references):
            expected = reference_logits(reference, tokens[i], len(prompts[i]))[-1]
            torch.testing.assert_close(logits[i], expected, **CLOSE)
        for i, ids in enumerate(tokens):
            ids.append((7 * i + 3 * step) % 90 + 2)
        # The order of rows must not matter, nor a row that pauses.
        order = list(range(len(prompts)))[:: -1 if step % 2 else 1]
        made = runner.decode([DecodeRow(i, tokens[i][-1], len(tokens[i]) - 1) for i in order])
        logits = made.values[torch.tensor([order.index(i) for i in range(len(prompts))])]


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_a_batch_of_adapters_bare_rows_and_lengths_equals_each_row_alone(model_type, tmp_path):
    model = random_backbone(model_type)
    first = make_adapter(model, tmp_path / "first", seed=1)
    second = make_adapter(model, tmp_path / "second", seed=2, r=5, orders=(4, 3))
    references = [
        (first, tmp_path / "first"),
        (model, None),
        (second, tmp_path / "second"),
        (first, tmp_path / "first"),
    ]
    check_rows_against_references(model, references, [prompt(n, n) for n in (5, 9, 3, 14)], tmp_path)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_generator_method_is_served_as_it_was_trained(method, tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=3, method=method, **METHODS[method])
    bare = reference_logits(model, prompt(11), 11)
    assert (reference_logits(tuned, prompt(11), 11) - bare).abs().max() > 0.05, "the adapter has an effect to compare"
    check_rows_against_references(model, [(tuned, tmp_path / "a"), (model, None)], [prompt(11), prompt(4)], tmp_path)


def test_fused_projections_take_every_target(tmp_path):
    model = random_backbone("phi3")
    tuned = make_adapter(model, tmp_path / "a", seed=3, method="pedro-3")
    check_rows_against_references(model, [(tuned, tmp_path / "a"), (model, None)], [prompt(11), prompt(4)], tmp_path)


def test_idle_slots_between_running_ones_change_nothing(tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    runner = Runner(copy.deepcopy(model), slots=9, length=64)
    adapter = read_adapter(tmp_path / "a", runner.architecture, DIGEST, runner.device, runner.simd_width)
    slots, prompts = [1, 3, 8], [prompt(5, 1), prompt(12, 2), prompt(7, 3)]
    runner.begin([PrefillRow(s, ids, len(ids), adapter) for s, ids in zip(slots, prompts, strict=True)])
    runner.advance()
    runner.end()
    for rows in ([0, 1, 2], [0, 1], [2]):  # gathered, scattered, gathered
        made = runner.decode([DecodeRow(slots[i], 40 + i, len(prompts[i])) for i in rows])
        for logits, i in zip(made.values, rows, strict=True):
            expected = reference_logits(tuned, [*prompts[i], 40 + i], len(prompts[i]))[-1]
            torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_bare_row_in_a_slot_that_held_an_adapter_is_bare(tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=2)
    one, two = prompt(6, 1), prompt(8, 2)
    beside = request("beside", prompt(5), 30, adapter="a")
    engine.add(request("tuned", one, 3, adapter="a"))
    engine.add(beside)
    first = drain(engine, until=lambda answers: "tuned" in answers and answers["tuned"].last.finish_reason)
    assert first["tuned"].token_ids == reference_greedy(tuned, one, 3)
    bare = run(engine, request("bare", two, logprobs=0))["bare"]
    logits = reference_logits(model, [*two, *bare.token_ids], 8)[7:-1]
    for logprob, expected in zip(bare.logprobs, torch.log_softmax(logits, -1), strict=True):
        assert logprob.logprob == pytest.approx(float(expected[logprob.token_id]), abs=1e-4)


def test_the_engine_equals_generate_of_the_peft_model(tmp_path):
    model, tokenizer, digest = stories()
    tuned = make_adapter(model, tmp_path / "a", seed=5, digest=digest)
    texts = ["Once upon a time", "The dog", "Lily and Tom went to the park because they wanted to"]
    prompts = [tokenizer(text).input_ids for text in texts]
    engine = make_engine(model, tokenizer, load=lambda ref: tmp_path / ref, digest=digest)
    requests = [
        request(f"{who}{i}", ids, 24, adapter=who or None) for who in ("a", "") for i, ids in enumerate(prompts)
    ]
    answers = run(engine, *requests)
    for who, reference in (("a", tuned), ("", model)):
        for i, ids in enumerate(prompts):
            made = reference.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None
            )
            assert answers[f"{who}{i}"].token_ids == made[0, len(ids) :].tolist()
    assert answers["a0"].token_ids != answers["0"].token_ids


def test_a_request_gives_the_same_logprobs_alone_and_in_a_crowd(tmp_path):
    model = random_backbone("llama")
    for number in range(3):
        make_adapter(model, tmp_path / f"a{number}", seed=number)
    mine = request("mine", prompt(9), 10, adapter="a0", logprobs=3)
    alone = run(make_engine(model, load=lambda ref: tmp_path / ref), mine)["mine"]
    crowd = [request(f"r{i}", prompt(3 + i, i), 4 + i, adapter=(None, "a1", "a2")[i % 3]) for i in range(9)]
    among = run(make_engine(model, load=lambda ref: tmp_path / ref, max_batch=6), *crowd[:4], mine, *crowd[4:])["mine"]
    assert among.token_ids == alone.token_ids
    for left, right in zip(among.logprobs, alone.logprobs, strict=True):
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert [i for i, _ in left.top] == [i for i, _ in right.top]


def test_a_prefill_cut_between_layers_equals_one_in_a_piece():
    model = random_backbone("llama")
    short, long = request("short", prompt(4, 1), 12), request("long", prompt(60, 2), 6)
    whole = run(make_engine(model), short, long)
    engine = make_engine(model, prefill_tokens=20)
    engine.add(short)
    engine.step()
    engine.add(long)
    steps = 0
    answers = {"short": [], "long": []}
    while engine.has_work():
        for output in engine.step():
            answers[output.request_id] += output.token_ids
        steps += not answers["long"]
    assert steps >= 2, "the long prompt took several steps, one token of the short answer in each"
    assert answers["long"] == whole["long"].token_ids
    assert answers["short"] == whole["short"].token_ids[1:]


def test_a_prefill_that_was_abandoned_leaves_nothing_behind():
    model = random_backbone("llama")
    runner = Runner(copy.deepcopy(model), slots=2, length=64, kernel="torch")
    runner.begin([PrefillRow(0, prompt(40), 40)])
    runner.advance(20)
    runner.cache.values[0][0, :, 20] = float("nan")  # as of an adapter that makes numbers overflow
    runner.abandon()
    runner.begin([PrefillRow(0, prompt(5), 5), PrefillRow(1, prompt(30), 30)])
    runner.advance()
    runner.end()
    made = runner.decode([DecodeRow(0, 40, 5), DecodeRow(1, 40, 30)])
    for logits, ids in zip(made.values, (prompt(5), prompt(30)), strict=True):
        torch.testing.assert_close(logits, reference_logits(model, [*ids, 40], len(ids))[-1], **CLOSE)


def test_the_conditioning_length_keeps_the_answer_out_of_the_vectors(tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    ids = prompt(12)
    scored = request("r", ids, 0, adapter="a", prompt_logprobs=2, conditioning_length=7)
    last = run(engine, scored)["r"].last
    expected = torch.log_softmax(reference_logits(tuned, ids, 7), -1)
    assert (last.prompt_logprobs[0], last.finish_reason, last.completion_tokens) == (None, "length", 0)
    for at, logprob in enumerate(last.prompt_logprobs[1:], start=1):
        assert logprob.token_id == ids[at]
        assert logprob.logprob == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        assert logprob.top[0][0] == int(expected[at - 1].argmax())


def test_an_answer_resumed_elsewhere_goes_on_as_if_nothing_happened(tmp_path):
    model = random_backbone("llama")
    make_adapter(model, tmp_path / "a", seed=1)
    fields = {"adapter": "a", "temperature": 0.8, "seed": 7, "frequency_penalty": 0.5}
    whole = run(make_engine(model, load=lambda ref: tmp_path / ref), request("r", prompt(6), 12, **fields))["r"]
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    rest = run(engine, request("r", prompt(6), 12, resumed_ids=tuple(whole.token_ids[:5]), **fields))["r"]
    assert rest.token_ids == whole.token_ids[5:]
    assert rest.text == whole.text[5:]
    assert rest.last.completion_tokens == 12


def test_a_backbone_whose_rows_would_change_each_other_is_refused():
    model = random_backbone("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(BackboneError, match="dynamic"):
        make_engine(model)


def test_bfloat16_backbones_are_served(tmp_path):
    model = random_backbone("llama").to(torch.bfloat16)
    make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    answers = run(engine, request("a", prompt(6), adapter="a"), request("b", prompt(9)))
    assert all(len(answer.token_ids) == 8 for answer in answers.values())
