"""Bottleneck adapters: the equation, two sites or one, and the learned activation."""

import pytest
import torch
from methods_models import tiny_backbone, tokens
from peft import get_peft_model
from torch.nn import functional

from pedro.methods.architectures import describe
from pedro.methods.bottleneck import CANDIDATES, BottleneckConfig


def shaken(config: BottleneckConfig, dtype=torch.float32):
    """A tiny backbone with an adapter as after a long training."""
    model = get_peft_model(tiny_backbone().to(dtype), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".bottleneck_" in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("sites", [("attention", "mlp"), ("mlp",)])
def test_an_adapter_adds_its_equation_to_the_sublayers_output(sites):
    model, ids = shaken(BottleneckConfig(r=5, sites=sites, activation="gelu")), tokens()
    backbone = tiny_backbone()
    for place, adapted in zip(describe(backbone).layers, describe(model.get_base_model()).layers, strict=True):
        layer = adapted.block.adapters
        for number, site in enumerate(sites):
            down, bias, up, shift = (
                getattr(layer, f"bottleneck_{name}")["default"][number]
                for name in ("down", "down_bias", "up", "up_bias")
            )

            def add(module, args, h, down=down, bias=bias, up=up, shift=shift):
                return h + functional.gelu(h @ down + bias) @ up + shift

            (place.output if site == "attention" else place.down).register_forward_hook(add)
    torch.testing.assert_close(model(ids).logits, backbone(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_learned_activation_is_the_mixture_that_its_weights_say():
    model = shaken(BottleneckConfig(r=5, sites=("mlp",), activation="learned"))
    layer, hidden = describe(model.get_base_model()).layers[0].block.adapters, torch.randn(2, 3, 32)
    mixed = layer(hidden, "mlp", "default")
    for place, name in enumerate(CANDIDATES):
        one_hot = torch.full((1, len(CANDIDATES)), -1e9)
        one_hot[0, place] = 0.0
        layer.bottleneck_mix["default"].data.copy_(one_hot)
        narrow = hidden @ layer.bottleneck_down["default"][0] + layer.bottleneck_down_bias["default"][0]
        expected = CANDIDATES[name](narrow) @ layer.bottleneck_up["default"][0] + layer.bottleneck_up_bias["default"][0]
        alone = layer(hidden, "mlp", "default")
        torch.testing.assert_close(alone, expected)
        assert not torch.allclose(alone, mixed)


@torch.no_grad()
def test_a_cached_step_equals_a_full_recompute_and_two_adapters_add_up():
    model, ids = shaken(BottleneckConfig(r=5)), tokens()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in (6, 7, 8)], dim=1)
    torch.testing.assert_close(steps, model(ids).logits[:, 6:], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_backbone()(ids).logits)
    assert torch.equal(model.unload()(ids).logits, tiny_backbone()(ids).logits)
