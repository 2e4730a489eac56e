"""Quantised backbones on the CPU kernel: equal to what the codes stand for, with any adapters; refused elsewhere."""

import copy

import pytest
import torch
from cli_commands import command_runner
from engine_models import make_adapter, make_engine, prompt, random_backbone, reference_logits, request, run
from test_engine_native import SIZES, generated, prefill
from torch import nn

from pedro.engine import native_model
from pedro.engine.panels import dequantise, quantise
from pedro.engine.runner import DecodeRow, Runner
from pedro.errors import BackboneError, ConfigError
from pedro.methods.servable import read_adapter

KINDS = ("int8", "int4")
METHODS = ("pedro", "lora", "ia3", None)


def assert_close(found, wanted):
    """Within 1e-4 of the largest logit."""
    torch.testing.assert_close(found, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0.0)


def dequantised(model, kind):
    """A copy whose weights are what the codes stand for: the slow reference."""
    model = copy.deepcopy(model)
    outer = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    inner = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    for weights, of in ((outer, native_model.HEAD_WEIGHTS.get(kind, kind)), (inner, kind)):
        for weight in {id(weight): weight for weight in weights}.values():  # tied ones once
            weight.data = dequantise(quantise(weight.data, of), weight.shape[1])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_off_by_half_a_step_of_its_group_at_most(kind):
    torch.manual_seed(0)
    weight = torch.randn(70, 75) * torch.rand(70, 1)
    weight[3] = 0
    weight[5, 32:64] = 0.25
    found = quantise(weight, kind)
    off = (dequantise(found, 75) - weight).abs()
    steps = found.scales.float().repeat_interleave(32, 1)[:, :75]
    assert found.codes.shape == (70, 3, 32)
    assert torch.all(off <= 0.51 * steps + 0.004 * weight.abs()), "beside what bfloat16 leaves of scale and minimum"
    assert not off[3].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(SIZES))
def test_quantised_kernels_equal_the_dequantised_model_for_any_sizes(name, kind):
    model = random_backbone("llama", **SIZES[name])
    reference = dequantised(model, kind)
    runner = Runner(model, slots=4, length=128, weights=kind)
    prompts = [prompt(n, n) for n in (1, 70, 33, 12)]
    logits = prefill(runner, *((i, ids, None) for i, ids in enumerate(prompts)))
    for step in range(3):
        for i, ids in enumerate(prompts):
            assert_close(logits.values[i], reference_logits(reference, ids, 1)[-1])
        assert logits.best == logits.values.argmax(-1).tolist()
        for i, ids in enumerate(prompts):
            ids.append(2 + (5 * i + step) % 90)
        logits = runner.decode([DecodeRow(i, ids[-1], len(ids) - 1) for i, ids in enumerate(prompts)])


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_and_dequantised_weights_give_the_same_bits_however_many_rows(kind):
    model = random_backbone("llama", **SIZES["odd"])
    runners = [
        Runner(made, slots=60, length=128, weights=weights)
        for made, weights in ((dequantised(model, kind), "float32"), (model, kind))
    ]
    for rows in (*range(1, 10), 60):
        asked = [(slot, prompt(1 + slot % 5, slot), None) for slot in range(rows)]
        left, right = (prefill(runner, *asked).values.clone() for runner in runners)
        assert torch.equal(left, right)
        steps = [DecodeRow(slot, 7, len(ids)) for slot, ids, _ in asked]
        left, right = (runner.decode(steps).values.clone() for runner in runners)
        assert torch.equal(left, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["gemma", "phi3", "qwen3"])
def test_adapters_of_every_kind_act_on_a_quantised_backbone_in_one_batch(model_type, kind, tmp_path):
    model = random_backbone(model_type)
    reference = dequantised(model, kind)
    tuned = [reference if m is None else make_adapter(reference, tmp_path / m, 1, method=m) for m in METHODS]
    runner = Runner(model, slots=4, length=64, weights=kind)
    adapters = [
        m and read_adapter(tmp_path / m, runner.architecture, "sha256:the-backbone", runner.device, runner.simd_width)
        for m in METHODS
    ]
    prompts = [prompt(9 + 7 * i, i) for i in range(len(METHODS))]
    logits = prefill(runner, *((i, ids, adapters[i]) for i, ids in enumerate(prompts)))
    for i, ids in enumerate(prompts):
        assert_close(logits.values[i], reference_logits(tuned[i], ids, len(ids))[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_that_the_dequantised_model_generates(kind, tmp_path):
    model = random_backbone("llama", **SIZES["smollm2"])
    reference = dequantised(model, kind)
    tuned = make_adapter(reference, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, weights=kind)
    assert engine.stats()["weights"] == kind
    asked = [request(who or "bare", prompt(30, 1), 12, adapter=who) for who in ("a", None)]
    answers = run(engine, *asked)
    for who, by in (("a", tuned), ("bare", reference)):
        assert answers[who].token_ids == generated(by, prompt(30, 1), 12)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.29), ("int4", 0.22)])  # with tables of rotations
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_backbone_takes_a_share_of_its_bytes_and_the_float32_ones_are_freed(kind, share, tied):
    model = random_backbone("llama", tie_word_embeddings=tied, hidden_size=64, intermediate_size=128, vocab_size=512)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    runner = Runner(model, slots=1, length=16, weights=kind)
    left = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert runner.stats()["weight_bytes"] < share * weights
    assert left < 0.02 * weights, "only norms stay"


def test_what_cannot_be_quantised_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"engine.weights: expected one of float32, int8, int4, got 'int3'"):
        make_engine(random_backbone("llama"), weights="int3")
    with pytest.raises(BackboneError, match=r"engine.weights: int8 .* not gpt2; use weights: float32"):
        make_engine(random_backbone("gpt2"), weights="int8")
    with pytest.raises(BackboneError, match="kernel: torch was asked for"):
        make_engine(random_backbone("llama"), kernel="torch", weights="int4")
    with pytest.raises(BackboneError, match="not on cpu from bfloat16"):
        make_engine(random_backbone("llama").bfloat16(), weights="int4")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "int3"], "'float32', 'int8' or 'int4'"),
        (["--weights", "int8", "--dtype", "bfloat16"], "--dtype bfloat16; use --weights float32"),
    ],
)
def test_serve_refuses_weights_that_cannot_be_before_it_starts_anything(arguments, said, tmp_path, monkeypatch, capfd):
    code, _, err = command_runner(monkeypatch, capfd)("serve", *arguments, PEDRO_HOME=tmp_path)
    assert code == 1
    assert said in err
