"""Adapters that act from a position of the prompt on: before it the bare backbone, from it on as PEFT computes them."""

import copy
import random

import pytest
import torch
from engine_models import (
    DIGEST,
    drain,
    make_adapter,
    make_engine,
    prompt,
    random_backbone,
    reference_logits,
    request,
    run,
)
from peft.tuners.lora.variants import calculate_alora_offsets

from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.methods.lora import _invoked_at
from pedro.methods.servable import read_adapter

INVOCATION = [7, 8]
TARGETS = {"gpt2": ["c_attn", "c_fc"], "phi3": ["qkv_proj", "down_proj"]}
CASES = [("llama", "torch"), ("phi3", "native"), ("gpt2", "torch")]


def make_alora(model, directory, seed=3, **options):
    """An aLoRA with random weights; gives the PEFT model that carries it."""
    targets = TARGETS.get(model.config.model_type, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    options = {"r": 4, "target_modules": targets, "alora_invocation_tokens": INVOCATION, **options}
    if model.config.model_type == "gpt2":
        options["fan_in_fan_out"] = True
    return make_adapter(model, directory, seed, "peft", peft_type="LORA", **options)


def words(length, seed=0, *invoked):
    """A prompt of random tokens with the invocation at these places and nowhere else."""
    ids = [9 if token in INVOCATION else token for token in prompt(length, seed)]
    for place in invoked:
        ids[place : place + len(INVOCATION)] = INVOCATION
    return ids


@torch.no_grad()
def peft_logits(tuned, ids, prompt_length):
    """PEFT's logits [T, V] of a prompt and tokens of its answer; the prompt alone says from where on the aLoRA acts."""
    (offset,) = calculate_alora_offsets(tuned.peft_config, "default", torch.tensor([ids[:prompt_length]]))
    offsets = [None if offset is None else offset + len(ids) - prompt_length]
    return tuned(input_ids=torch.tensor([ids]), alora_offsets=offsets).logits[0]


def peft_answer(tuned, ids, count):
    """What PEFT's generate() answers greedily."""
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return tuned.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def kept(runner, slot, length):
    """Keys and values of a slot's first positions, [layers, 2, K, length, d]."""
    pairs = zip(runner.cache.keys, runner.cache.values, strict=True)
    return torch.stack([torch.stack([tensor[slot, :, :length] for tensor in pair]) for pair in pairs])


def test_the_invocation_begins_where_peft_finds_it():
    rng = random.Random(4)
    config = {"default": type("Config", (), {"alora_invocation_tokens": None})()}
    found = set()
    for _ in range(300):
        tokens, ids = rng.choices(range(3), k=rng.randint(1, 3)), rng.choices(range(3), k=rng.randint(1, 9))
        config["default"].alora_invocation_tokens = tokens
        (offset,) = calculate_alora_offsets(config, "default", torch.tensor([ids]))
        start = _invoked_at(tokens, ids, len(ids))
        assert start == (None if offset is None else len(ids) - offset), (tokens, ids)
        found.add("none" if start is None else "first" if start == 0 else "later")
    assert found == {"none", "first", "later"}


@pytest.mark.parametrize(("model_type", "kernel"), CASES)
def test_an_alora_equals_peft_in_a_batch_of_all_kinds(model_type, kernel, tmp_path):
    model = random_backbone(model_type)
    runner = Runner(copy.deepcopy(model), slots=8, length=64, kernel=kernel)
    assert runner.kernel == kernel
    models, adapters = {}, {}
    for number, name in enumerate(("alora", "lora", "pedro", "red")):
        made = make_alora(model, tmp_path / name) if name == "alora" else None
        models[name] = made or make_adapter(model, tmp_path / name, number, name)
        adapters[name] = read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width)
    asked = [
        ("alora", words(12, 1, 5)),
        ("lora", words(9, 2, 3)),
        ("alora", words(7, 3, 0)),
        ("pedro", words(8, 4, 4)),
        (None, words(10, 5, 6)),
        ("alora", words(11, 6, 2, 9)),
        ("alora", words(9, 7)),
        ("red", words(6, 8, 1)),
    ]
    rows = []
    for slot, (name, ids) in enumerate(asked):
        start = 0 if name is None else adapters[name].start_in(ids, len(ids))
        adapter = None if start is None else adapters.get(name)
        rows.append(PrefillRow(slot, list(ids), len(ids), adapter, start=start or 0))
    assert [row.start for row in rows if asked[row.slot][0] == "alora"] == [5, 0, 9, 0]

    def wanted(slot):
        name, ids = asked[slot]
        length = len(rows[slot].token_ids)
        if name == "alora":
            return peft_logits(models["alora"], ids, length)[-1]
        return reference_logits(models.get(name, model), ids, length)[-1]

    bare = reference_logits(model, asked[0][1], 12)[-1]
    assert (wanted(0) - bare).abs().max() > 0.01, "it has an effect to compare"
    runner.begin(rows)
    for until in (1, 7, 30, None):
        runner.advance(until)
    logits, _ = runner.end()
    for step in range(3):
        for slot, got in enumerate(logits.values):
            torch.testing.assert_close(got, wanted(slot), atol=1e-4, rtol=1e-4, msg=lambda m, s=slot: f"{s}: {m}")
        for slot, (_, ids) in enumerate(asked):  # the answer may hold the invocation: that of the prompt counts
            ids.append(INVOCATION[step % 2] if slot in (0, 6) else (11 * slot + 5 * step) % 90 + 2)
        logits = runner.decode([DecodeRow(slot, ids[-1], len(ids) - 1) for slot, (_, ids) in enumerate(asked)])


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_keys_and_values_before_the_invocation_are_the_bare_backbones_to_the_bit(kernel, tmp_path):
    model = random_backbone("llama")
    make_alora(model, tmp_path / "a")
    runner = Runner(copy.deepcopy(model), slots=2, length=64, kernel=kernel)
    adapter = read_adapter(tmp_path / "a", runner.architecture, DIGEST, runner.device, runner.simd_width)
    ids = words(20, 1, 13)
    for slot, used in enumerate((adapter, None)):
        runner.begin([PrefillRow(slot, ids, 20, used, start=13)])
        runner.advance()
        runner.end()
    tuned, bare = (kept(runner, slot, 20) for slot in range(2))
    assert torch.equal(tuned[..., :13, :], bare[..., :13, :])
    assert (tuned[..., 13:, :] - bare[..., 13:, :]).abs().amax(dim=(0, 1, 2, 4)).min() > 1e-3


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_aloras_answer_as_peft_generates_beside_others_whatever_the_chunks(kernel, tmp_path):
    model = random_backbone("llama")
    tuned = make_alora(model, tmp_path / "alora")
    others = {name: make_adapter(model, tmp_path / name, seed, name) for seed, name in enumerate(("lora", "pedro"))}
    asked = {
        "middle": ("alora", words(30, 1, 11)),
        "end": ("alora", words(17, 2, 15)),
        "twice": ("alora", words(25, 3, 2, 20)),
        "never": ("alora", words(12, 4)),
        "lora": ("lora", words(20, 5, 4)),
        "pedro": ("pedro", words(14, 6, 4)),
        "bare": (None, words(9, 7, 4)),
    }
    options = {"kernel": kernel, "max_batch": 5, "prefill_tokens": 8}
    engine = make_engine(model, load=lambda ref: tmp_path / ref, **options)
    answers = run(engine, *(request(name, ids, 12, adapter=ref) for name, (ref, ids) in asked.items()))
    for name, (ref, ids) in asked.items():
        if ref == "alora":
            assert answers[name].token_ids == peft_answer(tuned, ids, 12), name
            assert [len(output.token_ids) for output in answers[name].outputs] == [1] * 12, "token by token"
    bare = run(make_engine(model, kernel=kernel), request("r", asked["never"][1], 12))["r"]
    assert answers["never"].token_ids == bare.token_ids
    for name in ("lora", "pedro", "bare"):
        reference = reference_logits(others.get(name, model), asked[name][1], len(asked[name][1]))
        assert answers[name].token_ids[0] == int(reference[-1].argmax())


def test_choices_and_beams_of_an_alora_are_those_of_its_prompt(tmp_path):
    model = random_backbone("llama")
    tuned = make_alora(model, tmp_path / "a")
    ids = words(20, 1, 9)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=4)
    sampled = request("n", ids, 10, adapter="a", n=3, temperature=0.8, seed=5, logprobs=0)
    beams = request("beams", ids, 6, adapter="a", num_beams=3, n=1)
    answers = run(engine, sampled, beams)
    assert len({tuple(answers["n" if i == 0 else ("n", i)].token_ids) for i in range(3)}) > 1
    for index in range(3):
        answer = answers["n" if index == 0 else ("n", index)]
        logits = peft_logits(tuned, ids + answer.token_ids, len(ids)).log_softmax(-1)
        for place, made in enumerate(answer.logprobs):
            assert made.logprob == pytest.approx(float(logits[len(ids) - 1 + place, made.token_id]), abs=1e-4)
    made = ids + answers["beams"].token_ids
    greedy = ids + run(engine, request("g", ids, 6, adapter="a"))["g"].token_ids

    def likelihood(tokens):
        logits = peft_logits(tuned, tokens, len(ids)).log_softmax(-1)
        return sum(float(logits[place - 1, tokens[place]]) for place in range(len(ids), len(tokens)))

    assert likelihood(made) >= likelihood(greedy) - 1e-3


@pytest.mark.parametrize("invoked", [(5,), ()])
def test_a_preempted_alora_goes_on_where_it_was(invoked, tmp_path):
    model = random_backbone("llama", max_position_embeddings=256)
    tuned = make_alora(model, tmp_path / "a")
    one = request("r", words(12, 2, *invoked), 100, adapter="a", tenant="long")
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=1, preempt_after=8)
    engine.add(one)
    begun = drain(engine, until=lambda answers: "r" in answers and len(answers["r"].token_ids) > 30)["r"].token_ids
    engine.add(request("rival", prompt(5), 30, tenant="t"))
    rest = drain(engine)["r"].token_ids
    assert engine.stats()["preempted"] >= 1
    assert begun + rest == peft_answer(tuned, one.prompt_ids, 100)
    assert engine.adapters.residents()["a"].refcount == 0


def test_an_answer_that_goes_on_elsewhere_is_invoked_by_its_prompt_alone(tmp_path):
    model = random_backbone("llama")
    make_alora(model, tmp_path / "a")
    for seed, invoked in ((1, (3,)), (2, ())):
        ids = words(12, seed, *invoked)
        whole = run(make_engine(model, load=lambda ref: tmp_path / ref), request("r", ids, 12, adapter="a"))["r"]
        engine = make_engine(model, load=lambda ref: tmp_path / ref)
        resumed = request("r", ids, 12, adapter="a", resumed_ids=tuple(whole.token_ids[:5]))
        assert run(engine, resumed)["r"].token_ids == whole.token_ids[5:]
    said = tuple(INVOCATION)
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    made = run(
        engine,
        request("alora", words(12, 2), 9, adapter="a", resumed_ids=said),
        request("bare", words(12, 2), 9, resumed_ids=said),
    )
    assert made["alora"].token_ids == made["bare"].token_ids


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("native", {"tail": 3}),
        ("torch", {}),
        ("native", {"pool": "mean", "window": 4, "tail": 2}),
        ("torch", {"pool": "mean", "tail": 50}),
    ],
)
def test_answer_side_pedro_equals_its_peft_model_beside_others(kernel, options, tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", 1, "pedro", apply_to="answer", **options)
    other = make_adapter(model, tmp_path / "b", 2, "pedro")
    make_alora(model, tmp_path / "c")
    runner = Runner(copy.deepcopy(model), slots=5, length=64, kernel=kernel)
    adapters = [
        read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width) for name in "abac"
    ]
    references, asked = [tuned, other, tuned], [words(12, 1), words(9, 2), words(7, 3), words(9, 4, 3)]
    lengths = [12, 9, 4, 9]  # the third is conditioned on its first four tokens
    rows = [
        PrefillRow(slot, list(ids), lengths[slot], adapter, start=adapter.start_in(ids, lengths[slot]) or 0)
        for slot, (ids, adapter) in enumerate(zip(asked, adapters, strict=True))
    ]
    assert not adapters[0].must_stay, "it is needed during prefill alone"
    runner.begin([*rows, PrefillRow(4, words(5, 9), 5)])
    for until in (3, 20, None):
        runner.advance(until)
    logits, _ = runner.end()
    for step in range(3):
        for slot, reference in enumerate(references):
            wanted = reference_logits(reference, asked[slot], lengths[slot])[-1]
            torch.testing.assert_close(logits.values[slot], wanted, atol=1e-4, rtol=1e-4)
        for slot, ids in enumerate(asked):
            ids.append(11 * slot + 5 * step + 10)
        logits = runner.decode([DecodeRow(slot, ids[-1], len(ids) - 1) for slot, ids in enumerate(asked)])
    start = rows[0].start
    runner.begin([PrefillRow(4, rows[0].token_ids, 12)])
    runner.advance()
    runner.end()
    assert torch.equal(kept(runner, 0, start), kept(runner, 4, start)), "the bare backbone's, to the bit"


def test_answer_side_pedro_answers_as_generate_and_goes_on_after_a_preemption(tmp_path):
    model = random_backbone("llama", max_position_embeddings=256)
    tuned = make_adapter(model, tmp_path / "a", 1, "pedro", apply_to="answer", tail=2)
    one = request("r", words(14, 3), 100, adapter="a", tenant="long")
    wanted = peft_answer(tuned, one.prompt_ids, 100)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=1, preempt_after=8)
    engine.add(one)
    begun = drain(engine, until=lambda answers: "r" in answers and len(answers["r"].token_ids) > 30)["r"].token_ids
    assert engine.adapters.evict("a"), "nothing of it is needed any more"
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    engine.add(request("rival", prompt(5), 30, tenant="t"))
    rest = drain(engine)["r"].token_ids
    assert engine.stats()["preempted"] >= 1
    assert begun + rest == wanted


@pytest.mark.parametrize(("kernel", "more"), [("native", {}), ("torch", {"apply_to": "answer", "tail": 2})])
def test_pedro_that_reads_a_head_answers_as_generate(kernel, more, tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", 1, "pedro", head_end=INVOCATION, **more)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, kernel=kernel)
    asked = {"early": words(20, 1, 6), "twice": words(20, 2, 3, 12), "late": words(9, 3, 7), "never": words(11, 4)}
    answers = run(engine, *(request(name, ids, 10, adapter="a") for name, ids in asked.items()))
    for name, ids in asked.items():
        assert answers[name].token_ids == peft_answer(tuned, ids, 10), name
    cut = request("cut", asked["early"], 10, adapter="a", conditioning_length=5)  # the head is no longer than that
    logits = reference_logits(tuned, asked["early"], 5)[-1]
    assert run(engine, cut)["cut"].token_ids[0] == int(logits.argmax())


def test_what_was_read_of_a_prompt_serves_another_only_as_far_as_both_are_read_alike(tmp_path):
    """Two prompts begin alike, with the invocation; in the second it comes again, so that the first place is bare."""
    model = random_backbone("llama")
    tuned = make_alora(model, tmp_path / "alora")
    tail = make_adapter(model, tmp_path / "tail", 1, "pedro", apply_to="answer", tail=2)
    first = words(40, 1, 5)
    prompts = {"first": first, "again": first, "later": [*first, *words(20, 2, 9)], "never": words(40, 3)}
    prompts |= {"never too": [*prompts["never"], *words(9, 4)], "at last": [*prompts["never"], *words(9, 4, 6)]}
    engine = make_engine(model, load=lambda ref: tmp_path / ref, prefix_bytes=1 << 24)
    for name, ids in prompts.items():
        for ref, reference in (("alora", tuned), ("tail", tail)):
            answer = run(engine, request(f"{name} {ref}", ids, 8, adapter=ref))[f"{name} {ref}"]
            assert answer.token_ids == peft_answer(reference, ids, 8), (name, ref)
        bare = run(engine, request(f"{name} bare", ids, 1))[f"{name} bare"]
        assert bare.token_ids[0] == int(reference_logits(model, ids, len(ids))[-1].argmax())


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_what_comes_before_the_start_is_shared_with_the_bare_backbone_and_other_adapters(kernel, tmp_path):
    model = random_backbone("llama")
    make_alora(model, tmp_path / "alora")
    for seed, (name, options) in enumerate(
        {
            "last": {"tail": 3},
            "window": {"tail": 1, "pool": "mean", "window": 10},
            "mean": {"pool": "mean"},
            "head": {"head_end": INVOCATION},
        }.items()
    ):
        make_adapter(model, tmp_path / name, seed, "pedro", apply_to="answer", **options)
    ids = words(56, 1, 38)
    engine, plain = (
        make_engine(model, load=lambda ref: tmp_path / ref, kernel=kernel, prefix_bytes=size) for size in (1 << 24, 0)
    )
    wanted = {"alora": 32, "last": 48, "window": 32, "mean": 0, "head": 32, None: 48}  # whole blocks of 16
    for ref, cached in [(None, 0), *wanted.items()]:
        one = request(f"{ref} {cached}", ids, 6, adapter=ref, logprobs=0)
        (answer,), (expected,) = run(engine, one).values(), run(plain, one).values()
        assert answer.last.cached_tokens == cached, ref
        assert answer.token_ids == expected.token_ids
        for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    stranger = run(engine, request("s", ids, 1, adapter="alora", tenant="another"))["s"]
    assert stranger.last.cached_tokens == 0, "another tenant finds nothing"


def test_conversations_with_one_head_share_its_vectors_and_all_that_they_have_in_common(tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", 1, "pedro", head_end=INVOCATION)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, prefix_bytes=1 << 24)
    head = words(20, 1, 18)
    turns = [*head, *words(20, 2)]
    for name, ids, cached in (
        ("first", turns, 0),
        ("next turn", [*turns, *words(12, 3)], 32),
        ("another chat", [*head, *words(9, 4)], 16),
        ("another head", [*words(20, 5, 18), *words(20, 2)], 0),
    ):
        answer = run(engine, request(name, ids, 5, adapter="a"))[name]
        assert answer.last.cached_tokens == cached, name
        assert answer.token_ids == peft_answer(tuned, ids, 5), name
