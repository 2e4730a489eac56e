"""LoRA-SIBO, MoDE and LoRETTA: their equations written out, their counts, and what they become in special cases."""

import pytest
import torch
from methods_models import tiny_backbone, tokens
from torch import nn
from torch.nn import functional

from pedro.methods import get_method
from pedro.methods.architectures import describe
from pedro.methods.capabilities import count_on_llama_2_7b
from pedro.methods.loretta import contracted, core_shapes, factorized

LAYERS, HIDDEN, FFN = 32, 4096, 11008


def shaken(name: str, options: dict, kind: str = "llama") -> nn.Module:
    """A tiny backbone with an adapter as after a long training."""
    torch.manual_seed(7)
    model = get_method(name).apply(tiny_backbone(kind), options).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def layers(model: nn.Module) -> list:
    return list(model.base_model.layers())


def agree(model: nn.Module, reference: nn.Module) -> None:
    """Both say the same; read in pieces with a cache, too; the adapter does something."""
    ids = tokens()
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        cache = model(ids[:, :6], use_cache=True).past_key_values
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in (6, 7, 8)], dim=1)
        torch.testing.assert_close(steps, expected[:, 6:], atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert (model(ids).logits - expected).abs().max() > 0.01


def test_sibo_mixes_the_first_representation_into_loras_input():
    model, reference, kept = shaken("sibo", {"r": 3, "residual": 0.3}), tiny_backbone(), {}
    reference.model.embed_tokens.register_forward_hook(lambda module, args, output: kept.update(h=output))
    for place, layer in zip(describe(reference).layers, layers(model), strict=True):
        for target in ("q", "k", "v", "gate", "up"):
            a, b = (getattr(layer, f"sibo_{part}_{target}")["default"] for part in "ab")

            def add(module, args, output, a=a, b=b):
                return output + (16 / 3) * ((0.7 * args[0] + 0.3 * kept["h"]) @ a.T) @ b.T

            place.sites[target].module.register_forward_hook(add)
    agree(model, reference)


@torch.no_grad()
def test_sibo_without_its_residual_is_lora():
    sibo = shaken("sibo", {"r": 3, "residual": 0.0, "targets": ["q", "up"]})
    lora = get_method("lora").apply(tiny_backbone(), {"r": 3, "targets": ["q", "up"]}).eval()
    for place, layer in zip(describe(lora.get_base_model()).layers, layers(sibo), strict=True):
        for target in ("q", "up"):
            module = place.sites[target].module
            module.lora_A["default"].weight.copy_(getattr(layer, f"sibo_a_{target}")["default"])
            module.lora_B["default"].weight.copy_(getattr(layer, f"sibo_b_{target}")["default"])
    torch.testing.assert_close(sibo(tokens()).logits, lora(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_mode_mixes_rank_one_experts_for_every_token_rank_by_rank():
    r, m = 3, 4
    model, reference = shaken("mode", {"r": r, "experts": m, "targets": ["q", "down"]}), tiny_backbone()
    for place, layer in zip(describe(reference).layers, layers(model), strict=True):
        for target in ("q", "down"):
            down, up, router = (getattr(layer, f"mode_{part}_{target}")["default"] for part in ("down", "up", "router"))

            def add(module, args, output, down=down, up=up, router=router):
                for row, column in [(i, j) for i in range(output.shape[0]) for j in range(output.shape[1])]:
                    x = args[0][row, column]
                    for j in range(r):
                        shares = torch.softmax(torch.stack([router[j, i] @ x for i in range(m)]), dim=0)
                        output[row, column] += sum(shares[i] * (x @ down[j]) * up[j, i] for i in range(m))
                return output

            place.linears[target].module.register_forward_hook(add)
    agree(model, reference)


@torch.no_grad()
def test_mode_with_one_expert_is_lora():
    mode = shaken("mode", {"r": 4, "experts": 1, "targets": ["v"]})
    lora = get_method("lora").apply(tiny_backbone(), {"r": 4, "alpha": 4, "targets": ["v"]}).eval()
    for place, layer in zip(describe(lora.get_base_model()).layers, layers(mode), strict=True):
        module = place.sites["v"].module
        module.lora_A["default"].weight.copy_(layer.mode_down_v["default"])
        module.lora_B["default"].weight.copy_(layer.mode_up_v["default"][:, 0].T)
    torch.testing.assert_close(mode(tokens()).logits, lora(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # RMS norms and a gate; layer norms with biases and none
def test_loretta_puts_adapters_of_tensor_trains_around_the_feed_forward_and_trains_the_norms(kind):
    model, reference = shaken("loretta", {"r": 8, "rank": 3}, kind), tiny_backbone(kind)
    architecture = describe(reference)
    for place, layer in zip(architecture.layers, layers(model), strict=True):
        config = layer.configs["default"]

        def adapted(target, hidden, layer=layer, config=config):
            wide, narrow = factorized(32, 16), factorized(8, 4)
            down, up = (
                train(getattr(layer, f"loretta_{target}_{side}_cores")["default"], core_shapes(*sizes, rank=3))
                for side, sizes in (("down", (wide, narrow)), ("up", (narrow, wide)))
            )
            biases = [getattr(layer, f"loretta_{target}_{side}_bias")["default"] for side in ("down", "up")]
            return functional.relu(hidden @ down.reshape(32, 8) + biases[0]) @ up.reshape(8, 32) + biases[1]

        for target in (t for t in config.targets if t != "down"):
            place.sites[target].module.register_forward_pre_hook(
                lambda module, args, target=target, adapted=adapted: (args[0] + adapted(target, args[0]),)
            )
        place.down.register_forward_hook(lambda module, args, output, adapted=adapted: output + adapted("down", output))
        norms = [m for m in place.block.modules() if type(m) is type(place.norm)]
        if place is architecture.layers[-1]:
            norms += [m for m in architecture.decoder.children() if type(m) is type(place.norm)]
        changes = {"weight": layer.loretta_norm_weight, "bias": layer.loretta_norm_bias}
        for i, norm in enumerate(norms):
            for part, held in changes.items():
                if "default" in held:
                    getattr(norm, part).data += held["default"].detach().split(32)[i]
    agree(model, reference)


def train(cores: torch.Tensor, shapes: list[tuple[int, int, int]]) -> torch.Tensor:
    """A tensor train entry by entry, as its definition says."""
    parts = [c.view(s) for c, s in zip(cores.split([a * n * b for a, n, b in shapes]), shapes, strict=True)]
    entries = []
    for index in torch.cartesian_prod(*[torch.arange(n) for _, n, _ in shapes]).tolist():
        product = torch.ones(1, 1)
        for part, i in zip(parts, index, strict=True):
            product = product @ part[:, i]
        entries.append(product[0, 0])
    return torch.stack(entries)


def test_a_tensor_train_is_the_product_of_its_slices():
    shapes = core_shapes((4, 3), (2, 2), rank=3)
    cores = torch.randn(sum(a * n * b for a, n, b in shapes))
    assert shapes == [(1, 4, 3), (3, 3, 3), (3, 2, 3), (3, 2, 1)]
    torch.testing.assert_close(contracted(cores, shapes), train(cores, shapes))


def test_sizes_are_cut_into_factors():
    assert (factorized(4096, 16), factorized(64, 4)) == ((16, 16, 16), (4, 4, 4))  # the authors' shape for LLaMA-2 7B
    assert (factorized(768, 16), factorized(1, 4), factorized(34, 16)) == ((16, 16, 3), (1,), (2, 17))


def test_counts_on_llama_2_7b_are_those_of_the_papers_formulas():
    inputs, outputs = 4 * HIDDEN + 2 * HIDDEN + FFN, 4 * HIDDEN + 2 * FFN + HIDDEN
    counts = {name: count_on_llama_2_7b(get_method(name), {}) for name in ("sibo", "mode", "loretta")}
    five = 32 * 8 * (5 * HIDDEN + 3 * HIDDEN + 2 * FFN)
    assert counts["sibo"]["trainable"] == five  # LoRA's r (in + W) on the five linears that read the hidden state
    assert counts["mode"]["trainable"] == LAYERS * (4 * (inputs + 4 * outputs) + 4 * 4 * inputs)  # and the routers
    cores = 2 * (80 + 400 + 400 + 100 + 100 + 20)  # 5 · 16, 5 · 16 · 5 …: 1,100 in place of 262,144
    norms = (2 * LAYERS + 1) * HIDDEN
    assert (
        counts["loretta"]["trainable"] == LAYERS * 3 * (cores + 64 + HIDDEN) + norms == 876_800
    )  # 0.88 M in the paper
    assert counts["loretta"]["trainable_without_bias"] == LAYERS * 3 * cores + norms
