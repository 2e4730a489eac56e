"""MELoRA, LoRA-Dash, LoRTA, GIFT, ETHER: each is the change of weights that its paper writes down, and counts as it."""

import pytest
import torch
from methods_models import tiny_backbone, tokens
from torch import nn

from pedro.errors import ConfigError
from pedro.methods import get_method
from pedro.methods.architectures import describe
from pedro.methods.capabilities import count_on_llama_2_7b

HIDDEN, FFN, LAYERS = 4096, 11008, 32
SEVEN = 32 * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + FFN))  # inputs and outputs of all linears of LLaMA-2 7B


def shaken(name: str, options: dict | None = None, kind: str = "llama", **changes) -> nn.Module:
    """A tiny backbone with an adapter as after a long training."""
    torch.manual_seed(7)
    model = get_method(name).apply(tiny_backbone(kind, **changes), options).eval()
    for layer in model.base_model.layers() if name == "lora-dash" else ():
        layer.launch("default")
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def dense(model: nn.Module, change, targets, kind: str = "llama", **changes) -> nn.Module:
    """The backbone with `change(tensors, layer, target, weight)` added to its weights."""
    backbone = tiny_backbone(kind, **changes)
    for index, (place, tuned) in enumerate(
        zip(describe(backbone).layers, describe(model.get_base_model()).layers, strict=True)
    ):
        layer = getattr(tuned.block, model.base_model.child)
        first = layer.first

        def tensor(name, layer=layer, first=first):
            held = getattr(layer, model.base_model.prefix + name)
            return (held if "default" in held else getattr(first, model.base_model.prefix + name))["default"]

        for target in targets:
            weight = place.linears[target].module.weight
            weight.data += change(tensor, index, target, weight.data.clone())
    return backbone


def agree(model: nn.Module, expected: nn.Module) -> None:
    """Both say the same, and so does the model when it is merged; the adapter does something."""
    with torch.no_grad():
        wanted = expected(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, wanted, atol=2e-4, rtol=1e-4)
        with model.disable_adapter():
            assert (model(tokens()).logits - wanted).abs().max() > 0.01
        torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, wanted, atol=2e-4, rtol=1e-4)


def test_melora_is_small_loras_on_the_diagonal():
    r, n = 3, 2

    def change(tensor, layer, target, weight):
        delta, (wide, narrow) = torch.zeros_like(weight), (weight.shape[0] // n, weight.shape[1] // n)
        for i in range(n):
            block = tensor(f"b_{target}")[i] @ tensor(f"a_{target}")[i] * (16 / r)
            delta[i * wide : (i + 1) * wide, i * narrow : (i + 1) * narrow] = block
        return delta

    model = shaken("melora", {"r": r, "n": n})
    agree(model, dense(model, change, ("q", "k", "v", "gate", "up", "o", "down")))


def test_lora_dash_is_lora_and_a_sum_over_singular_directions():
    def change(tensor, layer, target, weight):
        lora = tensor(f"b_{target}") @ tensor(f"a_{target}") * (16 / 4)
        sigma, u, v = (tensor(f"{name}_{target}") for name in ("sigma", "u", "v"))
        return lora + sum(sigma[i] * torch.outer(u[:, i], v[i]) for i in range(5))

    model = shaken("lora-dash", {"r": 4, "directions": 5, "targets": ["q", "down"]})
    agree(model, dense(model, change, ("q", "down")))


def test_lora_dash_launches_along_the_directions_of_the_highest_change_rate():
    model = get_method("lora-dash").apply(tiny_backbone(), {"r": 4, "directions": 3})
    layer = next(model.base_model.layers())
    with torch.no_grad():
        layer.lora_dash_b_up["default"].normal_()
        weight, b, a = layer.base_weight("up"), layer.lora_dash_b_up["default"], layer.lora_dash_a_up["default"]
        layer.launch("default")
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        rates = torch.diag(left.T @ (4.0 * b @ a) @ right.T).abs() / sigma
        chosen = set(rates.topk(3).indices.tolist())
        found = (left.T @ layer.lora_dash_u_up["default"]).abs().argmax(0).tolist()
    assert set(found) == chosen
    assert not layer.lora_dash_u_up["default"].requires_grad


def test_lorta_is_a_cp_tensor_over_heads_layers_and_matrices():
    heads, width, targets = 4, 8, ("q", "k", "v", "o")

    def change(tensor, layer, target, weight):
        a, b, head, depth, matrix = (tensor(name) for name in ("input", "width", "head", "layer", "matrix"))
        delta = torch.zeros(heads * width, 32)
        for h in range(heads):
            c = head[h] * depth[layer] * matrix[targets.index(target)]
            for i in range(5):  # sum of outer products, one a component
                delta[h * width : (h + 1) * width] += c[i] * torch.outer(b[:, i], a[:, i]) * (16 / 5)
        return delta.T if target == "o" else delta

    model = shaken("lorta", {"r": 5}, num_key_value_heads=4)
    agree(model, dense(model, change, targets, num_key_value_heads=4))


def test_lorta_leaves_out_matrices_with_fewer_heads_and_says_why():
    config = tiny_backbone().config  # 4 heads, 2 of them for keys and values
    assert get_method("lorta").config(config).targets == ("q", "o")
    with pytest.raises(ConfigError, match=r"method\.targets: expected matrices with 4 heads, as q has, which k and v"):
        get_method("lorta").config(config, {"targets": ["q", "k"]})


def test_gift_changes_weights_by_themselves_with_one_pair_for_all_layers():
    def change(tensor, layer, target, weight):
        return weight @ tensor(f"phi_{target}") @ tensor(f"psi_{target}")

    model = shaken("gift", {"r": 3})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 3 * 32
    agree(model, dense(model, change, ("q", "v")))


@pytest.mark.parametrize("blocks", [1, 4])
def test_ether_reflects_weights_at_hyperplanes(blocks):
    def change(tensor, layer, target, weight):
        return weight @ reflection(blocks, (-2, tensor(f"u_{target}"))) - weight

    model = shaken("ether", {"blocks": blocks, "targets": ["q", "up", "down"]})
    agree(model, dense(model, change, ("q", "up", "down")))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2's q has a bias, which is not reflected
def test_ether_plus_moves_weights_between_two_hyperplanes_on_both_sides(kind):
    def change(tensor, layer, target, weight):
        inside, outside = (
            reflection(2, (-1, tensor(f"{side}u_{target}")), (1, tensor(f"{side}v_{target}"))) for side in ("", "out_")
        )
        return outside @ weight @ inside - weight

    model = shaken("ether-plus", {"blocks": 2, "targets": ["q", "down"]}, kind)
    agree(model, dense(model, change, ("q", "down"), kind))


def reflection(blocks: int, *planes: tuple[int, torch.Tensor]) -> torch.Tensor:
    """I + Σ factor · û ûᵀ in diagonal blocks."""
    parts = []
    for i in range(blocks):
        part = torch.eye(len(planes[0][1]) // blocks)
        for factor, plane in planes:
            unit = plane.chunk(blocks)[i] / plane.chunk(blocks)[i].norm()
            part = part + factor * torch.outer(unit, unit)
        parts.append(part)
    return torch.block_diag(*parts)


COUNTS = [
    ("melora", {"r": 4, "n": 8}, 4 * SEVEN, "n (r in/n + r W/n) = r (in + W), as a LoRA of rank r, at rank n r"),
    ("lora-dash", {"r": 8}, 8 * SEVEN + 32 * 7 * 8, "a LoRA's and s = 8 coordinates a projection"),
    ("lorta", {"r": 16}, 16 * (HIDDEN + 128 + 32 + LAYERS + 4), "r (D + D_h + H + L + M)"),
    ("gift", {"r": 64}, 2 * 2 * 64 * HIDDEN, "2 r in for q and for v: 1.05 M"),
    ("ether", {"blocks": 32}, LAYERS * 2 * HIDDEN, "one vector for q and v: 0.26 M in the paper"),
    ("ether-plus", {"blocks": 32}, LAYERS * 2 * 4 * HIDDEN, "two of both sides: 1.05 M (1.04 in the paper)"),
]


@pytest.mark.parametrize(("name", "options", "count", "why"), COUNTS)
def test_counts_on_llama_2_7b_are_those_of_the_papers_formulas(name, options, count, why):
    assert count_on_llama_2_7b(get_method(name), options)["trainable"] == count, why


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("melora", {"n": 5}, r"n: expected a divisor of q's 32 inputs and 32 outputs, got 5"),
        ("melora", {"n": 0}, r"n: expected a whole number > 0, got 0"),
        ("lora-dash", {"directions": 33}, r"directions: expected at most 32, the directions of q, got 33"),
        ("lora-dash", {"launch": 0}, r"method\.launch: expected a whole number > 0, got 0"),
        ("gift", {"targets": ["queue"]}, r"method\.targets: expected a list of q, k"),
        ("ether", {"blocks": 3}, r"blocks: expected a divisor of 32, a side of q, got 3"),
        ("lorta", {"targets": ["up"]}, r"method\.targets: expected distinct names of q, k, v, o"),
    ],
)
def test_what_does_not_fit_the_backbone_is_told_before_anything_is_changed(name, options, message):
    backbone = tiny_backbone()
    modules = [n for n, _ in backbone.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_method(name).apply(backbone, options)
    assert [n for n, _ in backbone.named_modules()] == modules


def test_a_launch_after_the_last_step_is_refused():
    model = get_method("lora-dash").apply(tiny_backbone())
    with pytest.raises(ConfigError, match=r"method\.launch: expected less than the 50 steps of the run, got 100"):
        get_method("lora-dash").training_hook(model, {}, steps=50)
