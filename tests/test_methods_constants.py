"""Constant vectors (RED, BitFit, (IA)³ with a projection): what they compute, save, merge, and start from."""

import pytest
import torch
from methods_models import MODEL_TYPES, tiny_backbone, tokens
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from pedro.errors import ConfigError
from pedro.methods import ConstantConfig, get_method
from pedro.methods.architectures import LINEARS, describe
from pedro.methods.constants import constant_vectors

KINDS = {
    "red": ConstantConfig(scale=("down",), shift=("down",)),
    "bitfit": ConstantConfig(shift=("q", "k", "v", "up", "o", "down")),
    "bitfit r=4": ConstantConfig(shift=("q", "v", "up", "down"), r=4),
    "ia3 r=4": ConstantConfig(scale=("k", "v", "up"), r=4),
    "both": ConstantConfig(scale=("v", "o"), shift=("v", "up"), r=3),
}


def shaken(model, seed: int = 1):
    """Random weights as after a long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".constant_" in n):
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.eval()


@torch.no_grad()
def reference(config: ConstantConfig, model, backbone, ids: torch.Tensor) -> torch.Tensor:
    """The adapter written into a bare backbone: scaled weights, and biases where there were none."""
    layers = [m for m in model.modules() if hasattr(m, "constant_scale")]
    for place, layer in zip(describe(backbone).layers, layers, strict=True):
        scales, shifts = layer.vectors("default")
        for target, (module, rows, _) in place.linears.items():
            at = slice(None) if rows is None else rows
            conv = not isinstance(module, torch.nn.Linear)
            weight = module.weight.T if conv else module.weight
            if module.bias is None:
                module.bias = torch.nn.Parameter(torch.zeros(len(weight)))
            if target in scales:
                weight[at] = weight[at] * scales[target][:, None]
                module.bias[at] = module.bias[at] * scales[target]
            if target in shifts:
                module.bias[at] = module.bias[at] + shifts[target]
    return backbone(ids).logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scales_and_shifts_equal_changed_weights_on_every_backbone(model_type):
    for config in KINDS.values():
        model = shaken(get_peft_model(tiny_backbone(model_type), config))
        expected = reference(config, model, tiny_backbone(model_type), tokens())
        torch.testing.assert_close(model(tokens()).logits, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_comes_back_to_the_bit(tmp_path, kind, dtype):
    model = shaken(get_peft_model(tiny_backbone().to(dtype), KINDS[kind]))
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(tiny_backbone().to(dtype), tmp_path)
    assert torch.equal(again(tokens()).logits, expected)
    assert {p.dtype for n, p in again.named_parameters() if ".constant_" in n} == {torch.float32}
    loaded = tiny_backbone().to(dtype)
    info = loaded.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert torch.equal(loaded(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_tensors_are_those_that_the_config_names_and_make_the_layers_vectors(tmp_path, kind):
    model = shaken(get_peft_model(tiny_backbone(), KINDS[kind]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for place in describe(tiny_backbone()).layers:
        widths = {target: site.width for target, site in place.linears.items()}
        prefix = f"base_model.model.{place.name}.vectors."
        tensors = {name: saved.pop(prefix + name) for name in KINDS[kind].shapes(widths)}
        assert {name: tuple(t.shape) for name, t in tensors.items()} == KINDS[kind].shapes(widths)
        made = constant_vectors(KINDS[kind], widths, tensors)
        live = model.get_base_model().get_submodule(place.name).vectors.vectors("default")
        for ours, theirs in zip(made, live, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[target], theirs[target]) for target in ours)
    assert not saved


@torch.no_grad()
def test_a_cached_step_equals_a_full_recompute():
    model, ids = shaken(get_peft_model(tiny_backbone(), KINDS["both"])), tokens()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in (6, 7, 8)], dim=1)
    torch.testing.assert_close(steps, model(ids).logits[:, 6:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gpt2"])
def test_scales_merge_into_the_weights(model_type):
    model = shaken(get_peft_model(tiny_backbone(model_type), KINDS["ia3 r=4"]))
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "constant" in name]


@torch.no_grad()
def test_shifts_refuse_to_merge_and_unload_leaves_the_backbone():
    model = shaken(get_peft_model(tiny_backbone(), KINDS["red"]))
    with pytest.raises(ConfigError, match=r"merge: a linear without a bias"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(tokens()).logits, tiny_backbone()(tokens()).logits)


@torch.no_grad()
def test_adapters_switch_and_add_up_and_can_be_disabled():
    bare = tiny_backbone()(tokens()).logits
    model = get_peft_model(tiny_backbone(), KINDS["red"])
    model.add_adapter("other", KINDS["bitfit"])
    shaken(model)
    one = model(tokens()).logits
    model.set_adapter("other")
    other = model(tokens()).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, bare)
    assert len({tuple(x.flatten().tolist()) for x in (one, other, both, bare)}) == 4


@pytest.mark.parametrize(
    ("name", "options", "trained"),
    [
        ("red", {}, 2 * 32),
        ("bitfit", {}, 32 + 16 + 16 + 48 + 48 + 32 + 32),
        ("bitfit", {"r": 2}, 2 * (224 + 7)),
        ("ia3", {"r": 2}, 2 * (16 + 16 + 48 + 3)),
        ("ia3", {}, 16 + 16 + 48),
    ],
)
def test_a_layer_trains_as_many_numbers_as_the_method_says(name, options, trained):
    model = get_method(name).apply(tiny_backbone(), options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "scale: expected at least one target"),
        ({"scale": ["query"]}, r"scale: expected distinct names of q, k, v"),
        ({"shift": ["q", "q"]}, "shift: expected distinct names"),
        ({"shift": ["q"], "r": 0}, "r: expected a whole number > 0 or null, got 0"),
    ],
)
def test_an_impossible_config_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ConstantConfig(**options)


def test_a_target_that_the_backbone_lacks_is_named():
    with pytest.raises(ConfigError, match="shift: this backbone has no gate; choose from q, k, v, up, o, down"):
        get_peft_model(tiny_backbone("gpt2"), ConstantConfig(shift=LINEARS))
