"""Where the table says that projections live: every supported backbone against the same one with scaled weights."""

import pytest
import torch
from methods_models import MODEL_TYPES, tiny_backbone, tokens, tuned
from peft import get_peft_model

from pedro import PedroConfig
from pedro.errors import BackboneError, ConfigError
from pedro.methods.architectures import LAYOUTS, describe
from pedro.methods.output_head import logits_at

HEADS, WIDTH = 4, 8  # of the tiny backbones


def rows_by_hand(model_type: str, block, target: str) -> tuple[torch.nn.Module, list[int]]:
    """Module and output rows of a target, written down from each model's own source rather than from the table."""
    if model_type == "gpt2":
        if target == "up":
            return block.mlp.c_fc, list(range(48))
        start = {"q": 0, "k": 32, "v": 64}[target]
        return block.attn.c_attn, list(range(start, start + 32))
    if model_type == "gpt_neox":
        if target == "up":
            return block.mlp.dense_h_to_4h, list(range(48))
        part = {"q": 0, "k": 1, "v": 2}[target]
        rows = [head * 3 * WIDTH + part * WIDTH + i for head in range(HEADS) for i in range(WIDTH)]
        return block.attention.query_key_value, rows
    if model_type == "phi3":
        if target in ("gate", "up"):
            start = {"gate": 0, "up": 48}[target]
            return block.mlp.gate_up_proj, list(range(start, start + 48))
        start, end = {"q": (0, 32), "k": (32, 48), "v": (48, 64)}[target]
        return block.self_attn.qkv_proj, list(range(start, end))
    module = block.get_submodule({"gate": "mlp.gate_proj", "up": "mlp.up_proj"}.get(target, f"self_attn.{target}_proj"))
    return module, list(range(module.out_features))


def blocks(model):
    if hasattr(model, "transformer"):
        return model.transformer.h
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers


def scale_rows(module, rows: list[int], vector: torch.Tensor) -> None:
    """Scale the given outputs of a Linear (weight [out, in]) or a Conv1D (weight [in, out]), bias included."""
    with torch.no_grad():
        if isinstance(module, torch.nn.Linear):
            module.weight[rows] *= vector[:, None]
        else:
            module.weight[:, rows] *= vector
        if module.bias is not None:
            module.bias[rows] *= vector


def around_norm(model, model_type: str, index: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What goes into (residual) and comes out of (normed) the attention's norm of block `index`, [T, D] each."""
    block, seen = blocks(model)[index], []
    norm = block.ln_1 if model_type == "gpt2" else block.input_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(ids)
    handle.remove()
    return {"residual": seen[0][0][0], "normed": seen[0][1][0]}


def generator_by_hand(weights: dict, pooled: torch.Tensor) -> torch.Tensor:
    """Equations 6 and 7, written out."""
    hidden = pooled @ weights["down"]
    above = sum(weights["a"][j] * hidden**j for j in range(7))
    below = 1 + sum(weights["b"][i - 1] * hidden**i for i in range(1, 6)).abs()
    return (above / below) @ weights["up"] + weights["bias"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "pool", "pool_source"),
    [
        *((model_type, "last", "normed") for model_type in MODEL_TYPES),
        *(("llama", pool, source) for pool in ("last", "mean", "max") for source in ("normed", "residual")),
        ("gpt_neox", "max", "residual"),
    ],
)
def test_modulation_equals_the_backbone_with_scaled_weights(model_type, pool, pool_source):
    targets = ("v", "up", "q", "k") if model_type in ("gpt2", "gpt_neox") else ("v", "up", "q", "gate", "k")
    model = tuned(model_type, r=4, targets=targets, pool=pool, pool_source=pool_source)
    ids, prompt = tokens(rows=1, length=12), 7

    reference = tiny_backbone(model_type)
    parameters = dict(model.named_parameters())
    for index, block in enumerate(blocks(reference)):
        read = around_norm(reference, model_type, index, ids)[pool_source][:prompt]
        pooled = {"last": read[-1], "mean": read.mean(dim=0), "max": read.max(dim=0).values}[pool]
        name = next(n for n in parameters if f".{index}.modulation.pedro_down." in n)
        weights = {part: parameters[name.replace("_down.", f"_{part}.")] for part in ("down", "up", "bias", "a", "b")}
        places = [rows_by_hand(model_type, block, target) for target in targets]
        vectors = generator_by_hand(weights, pooled).split([len(rows) for _, rows in places])
        for (module, rows), vector in zip(places, vectors, strict=True):
            scale_rows(module, rows, vector)

    expected, bare = reference(ids).logits, tiny_backbone(model_type)(ids).logits
    got = model(ids, prompt_lens=torch.tensor([prompt])).logits
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_fresh_adapter_is_the_backbone_to_the_bit(model_type):
    ids = tokens()
    expected = tiny_backbone(model_type)(ids).logits
    assert torch.equal(get_peft_model(tiny_backbone(model_type), PedroConfig())(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cached_generation_equals_full_recomputation(model_type):
    model, ids = tuned(model_type), tokens(rows=2, length=7)
    new = 10  # past the sliding window of 8
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(made.sequences, prompt_lens=torch.tensor([7, 7])).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(made.logits, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_the_table_covers_what_the_tests_cover():
    assert set(LAYOUTS) == set(MODEL_TYPES)


def test_an_unsupported_backbone_is_named_with_the_supported_ones():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(BackboneError, match=r"'bloom' is not supported; use one of .*llama.*phi3"):
        get_peft_model(model, PedroConfig())


def test_a_target_that_the_backbone_lacks_is_named_and_nothing_is_left_behind():
    model = tiny_backbone("gpt2")
    with pytest.raises(ConfigError, match="targets: this backbone has no gate; choose from q, k, v, up"):
        get_peft_model(model, PedroConfig.variant(3))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_backbone_without_its_head_can_be_described():
    model = tiny_backbone("llama")
    assert [layer.name for layer in describe(model.model).layers] == ["layers.0", "layers.1", "layers.2"]
    assert next(layer.name for layer in describe(model).layers) == "model.layers.0"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_at_some_positions_are_those_of_all_of_them(model_type):
    model = tuned(model_type)
    ids = tokens(3, 7)
    positions = torch.zeros(3, 7, dtype=torch.bool)
    positions[0, 2:4] = positions[2, 6] = True
    full = model(input_ids=ids, prompt_lens=torch.tensor([2, 2, 2])).logits
    with logits_at(model, positions):
        few = model(input_ids=ids, prompt_lens=torch.tensor([2, 2, 2])).logits
    assert few.shape == (1, 3, full.shape[-1])
    torch.testing.assert_close(few[0], full[positions])
    assert model(input_ids=ids, prompt_lens=torch.tensor([2, 2, 2])).logits.shape == full.shape
