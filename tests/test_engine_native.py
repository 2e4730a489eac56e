"""The compiled CPU kernel: equal to the model's own forward, independent of neighbours, optional."""

import copy
import logging

import pytest
import torch
from engine_models import (
    drain,
    make_adapter,
    make_engine,
    prompt,
    random_backbone,
    reference_logits,
    request,
    run,
)

from pedro.engine import native, native_model
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.errors import BackboneError
from pedro.methods.servable import read_adapter

SMOLLM2 = {  # SmolLM2-135M with 16 in place of 64 channels a head, and 3 layers
    "hidden_size": 144,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
    "vocab_size": 49_152,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
SIZES = {  # few a multiple of a strip, several prompts longer than a block of rows
    "odd": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 44},
    "wide": {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    "biased": {"attention_bias": True, "mlp_bias": True, "vocab_size": 131},
    "tied": {"tie_word_embeddings": True, "hidden_size": 64, "head_dim": 16},
    "smollm2": SMOLLM2,
}


def prefill(runner, *rows):
    runner.begin([PrefillRow(slot, ids, len(ids), adapter) for slot, ids, adapter in rows])
    runner.advance()
    return runner.end()[0]


def generated(model, ids, count):
    """Greedy tokens by transformers, or PEFT."""
    with torch.inference_mode():
        made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", sorted(SIZES))
def test_prefill_and_decode_equal_the_models_forward_for_any_sizes(name):
    model = random_backbone("llama", **SIZES[name])
    runner = Runner(copy.deepcopy(model), slots=4, length=128, kernel="native")
    prompts = [prompt(n, n) for n in (1, 70, 33, 12)]
    logits = prefill(runner, *((i, ids, None) for i, ids in enumerate(prompts)))
    for step in range(3):
        for i, ids in enumerate(prompts):
            torch.testing.assert_close(logits.values[i], reference_logits(model, ids, 1)[-1], atol=1e-4, rtol=1e-4)
        assert logits.best == logits.values.argmax(-1).tolist()
        for i, ids in enumerate(prompts):
            ids.append(2 + (5 * i + step) % 90)
        logits = runner.decode([DecodeRow(i, ids[-1], len(ids) - 1) for i, ids in enumerate(prompts)])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_a_row_is_the_same_to_the_bit_alone_and_among_any_number_of_others(model_type, tmp_path):
    model = random_backbone(model_type)
    make_adapter(model, tmp_path / "a", seed=1)
    runner = Runner(copy.deepcopy(model), slots=40, length=64, kernel="native")
    adapter = read_adapter(tmp_path / "a", runner.architecture, "sha256:the-backbone", runner.device, runner.simd_width)
    mine = (7, prompt(21), adapter)
    alone = [prefill(runner, mine).values[0].clone()]
    alone += [runner.decode([DecodeRow(7, 5 + t, 21 + t)]).values[0].clone() for t in range(3)]
    for others in (1, 6, 13, 39):
        rows = [(slot, prompt(2 + slot % 9, slot), adapter if slot % 2 else None) for slot in range(40) if slot != 7]
        rows = rows[:others]
        among = [prefill(runner, *rows, mine).values[-1].clone()]
        for t in range(3):
            steps = [DecodeRow(slot, 3, len(ids) + t) for slot, ids, _ in rows]
            among.append(runner.decode([*steps, DecodeRow(7, 5 + t, 21 + t)]).values[-1].clone())
        for left, right in zip(alone, among, strict=True):
            assert torch.equal(left, right)


def test_both_kernels_give_the_same_answers(tmp_path):
    model = random_backbone("qwen2")
    make_adapter(model, tmp_path / "a", seed=1)
    requests = [request(f"r{i}", prompt(4 + 5 * i, i), 12, adapter=(None, "a")[i % 2]) for i in range(5)]
    made = []
    for kernel in ("native", "torch"):
        engine = make_engine(model, load=lambda ref: tmp_path / ref, kernel=kernel)
        assert engine.stats()["kernel"] == kernel
        made.append({name: answer.token_ids for name, answer in run(engine, *requests).items()})
    assert made[0] == made[1]


def test_a_language_models_shape_takes_the_kernel_and_answers_as_generate(tmp_path):
    model = random_backbone("llama", **SMOLLM2)
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref)
    assert engine.stats()["kernel"] == "native", "it is what auto takes"
    prompts = [prompt(5 + 40 * i, i) for i in range(3)]
    asked = [request(f"{who}{i}", ids, 12, adapter=who or None) for who in ("a", "") for i, ids in enumerate(prompts)]
    answers = run(engine, *asked)
    for who, reference in (("a", tuned), ("", model)):
        for i, ids in enumerate(prompts):
            assert answers[f"{who}{i}"].token_ids == generated(reference, ids, 12)


def test_a_prompt_of_2048_tokens_read_in_chunks_equals_one_read_in_a_piece(tmp_path):
    model = random_backbone("llama", **SMOLLM2)
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    ids = prompt(2048)
    made = []
    for options in ({}, {"prefill_tokens": 300}):
        engine = make_engine(model, load=lambda ref: tmp_path / ref, **options)
        engine.add(request("beside", prompt(4, 1), 60))
        drain(engine, until=lambda answers: "beside" in answers)
        longs = [request(f"long {who}", ids, 6, adapter=who, logprobs=0) for who in ("a", None)]
        for one in longs:
            engine.add(one)
        answers = drain(engine)
        made.append([answers[one.id] for one in longs])
        between = len(answers["beside"].token_ids)
    assert between > 14, "the other answer went on between the chunks"
    for whole, chunks, reference in zip(*made, (tuned, model), strict=True):
        assert whole.token_ids == chunks.token_ids == generated(reference, ids, 6)
        for left, right in zip(whole.logprobs, chunks.logprobs, strict=True):
            assert left.logprob == right.logprob, "a row's numbers do not depend on how it was cut"


def test_the_last_layer_is_computed_where_it_is_asked_for_and_nothing_else_changes():
    model = random_backbone("llama", max_position_embeddings=1024)
    prompts = [prompt(n, n) for n in (600, 33, 90)]  # the first is longer than a part of a prefill
    read = {}
    for which in (None, 1):
        runner = Runner(copy.deepcopy(model), slots=3, length=700, kernel="native")
        asked = [0 if i == which else None for i in range(3)]
        runner.begin([PrefillRow(i, prompts[i], len(prompts[i]), prompt_logprobs=asked[i]) for i in range(3)])
        state = runner._prefills[-1].state
        runner.advance()
        logits, logprobs = runner.end()
        read[which] = [state.asked.tolist(), state.buffers["x"][610].clone(), logits.values.clone()]
        step = runner.decode([DecodeRow(i, 7, len(ids)) for i, ids in enumerate(prompts)])
        read[which].append(step.values.clone())
    assert [asked for asked, *_ in read.values()] == [[599, 632, 722], [599, *range(600, 633), 722]]
    assert not torch.equal(read[None][1], read[1][1]), "of a token inside a prompt nobody asks for the output"
    assert torch.equal(read[None][2], read[1][2])
    assert torch.equal(read[None][3], read[1][3]), "its keys and values are there"
    for made, ids in zip(read[None][2], prompts, strict=True):
        torch.testing.assert_close(made, reference_logits(model, ids, 1)[-1], atol=1e-4, rtol=1e-4)
    expected = reference_logits(model, prompts[1], 1).log_softmax(-1)[:-1]
    expected = expected.gather(1, torch.tensor(prompts[1][1:])[:, None])[:, 0]
    assert [one.logprob for one in logprobs[1][1:]] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_row_that_is_not_finite_is_told_apart_from_its_neighbours():
    model = random_backbone("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    runner = Runner(model, slots=2, length=32, kernel="native")
    logits = prefill(runner, (0, [3, 4, 5], None), (1, [3, 50, 4], None))
    assert logits.best[0] >= 0
    assert logits.best[1] == -1


def test_weights_exist_once():
    model = random_backbone("llama", tie_word_embeddings=True, hidden_size=64)
    held = sum(parameter.numel() for parameter in model.parameters())
    runner = Runner(model, slots=1, length=16, kernel="native")
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left < 0.02 * held, "the model's own weights are released: only norms stay"
    assert runner.kernel == "native"


def test_a_user_without_a_home_gets_a_kernel_all_the_same(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", no_home)
    assert native._cache_directory().is_dir()


def test_without_a_compiler_the_engine_runs_on_torch_and_says_so(monkeypatch, caplog):
    native.load_kernel.cache_clear()
    monkeypatch.setenv("CC", "/nonexistent/cc")
    try:
        with caplog.at_level(logging.WARNING):
            assert not native_model.supported(random_backbone("llama"))
        assert "decodes with PyTorch" in caplog.text
        engine = make_engine(random_backbone("llama"))
        assert engine.stats()["kernel"] == "torch"
        assert len(run(engine, request("r", prompt(5)))["r"].token_ids) == 8
        with pytest.raises(BackboneError, match="C compiler"):
            make_engine(random_backbone("llama"), kernel="native")
    finally:
        native.load_kernel.cache_clear()
