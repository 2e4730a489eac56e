"""PEDRO's further options: vectors by group, a window of the prompt's last tokens, r and orders by layer."""

import json

import pytest
import torch
from methods_models import SIZES, randomize, tiny_backbone, tokens, tuned
from peft import PeftModel, get_peft_model

from pedro import PedroConfig
from pedro.errors import ConfigError
from pedro.methods import count_parameters, get_method
from pedro.methods.architectures import describe

LAYERS, HEAD = SIZES["num_hidden_layers"], 8
OPTIONS = [
    {"group_size": "head"},
    {"group_size": 4},
    {"pool": "mean", "window": 3},
    {"pool": "max", "window": 2},
    {"r": [2, 5, 12]},
    {"orders": [[6, 5], [4, 3], [2, 2]]},
    {"init_std": "width"},
]


def first_vectors(model, ids, **given) -> dict[str, torch.Tensor]:
    """The first block's vectors for these prompts."""
    kept = {}
    layer = describe(model.get_base_model()).layers[0].block.modulation
    handle = layer.register_forward_hook(lambda module, args, output: kept.update(output))
    model(ids, **given)
    handle.remove()
    return kept


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_starts_as_the_identity_and_comes_back_from_its_directory(tmp_path, options):
    ids, backbone = tokens(), tiny_backbone()
    expected = backbone(ids).logits
    model = get_peft_model(backbone, PedroConfig(task_type="CAUSAL_LM", **options)).eval()
    assert torch.equal(model(ids).logits, expected)
    made = randomize(model)(ids).logits
    assert not torch.allclose(made, expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_backbone(), tmp_path).eval()
    assert torch.equal(again(ids).logits, made)
    assert again.peft_config["default"].by_layer(LAYERS) == model.peft_config["default"].by_layer(LAYERS)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["group_size"] == {"head": HEAD}.get(options.get("group_size"), options.get("group_size", 1))


@torch.no_grad()
def test_channels_of_a_group_share_one_entry():
    vectors = first_vectors(tuned(group_size="head"), tokens())
    assert {target: vector.shape[-1] for target, vector in vectors.items()} == {"q": 32, "v": 16, "up": 48}
    for vector in vectors.values():
        grouped = vector.unflatten(-1, (-1, HEAD))
        assert torch.equal(grouped, grouped[..., :1].expand_as(grouped))
        assert len(vector[0].unique()) == vector.shape[-1] // HEAD


@torch.no_grad()
def test_an_ordinary_adapter_with_equal_columns_does_what_groups_do():
    grouped, plain = tuned(group_size=4), tuned()
    wide = dict(plain.named_parameters())
    for name, p in grouped.named_parameters():
        if ".pedro_" in name:
            spread = p.repeat_interleave(4, dim=-1) if "pedro_up" in name or "pedro_bias" in name else p
            wide[name].copy_(spread)
    torch.testing.assert_close(grouped(tokens()).logits, plain(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("how", ["mean", "max"])
def test_a_window_pools_the_last_tokens_of_the_prompt_whatever_the_padding(how):
    ids, model = tokens(rows=1, length=8), tuned(pool=how, window=3)
    wanted = first_vectors(model, ids)
    other = ids.clone()
    other[:, :5] = (other[:, :5] + 1) % 60 + 3
    assert all(torch.equal(made, wanted[target]) for target, made in first_vectors(model, other).items())
    other[:, 5] += 1
    assert not torch.allclose(first_vectors(model, other)["q"], wanted["q"])
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1)
    found = first_vectors(model, padded, attention_mask=(torch.arange(10) > 1).long()[None])
    torch.testing.assert_close(found["q"], wanted["q"])
    short = first_vectors(model, ids, prompt_lens=torch.tensor([2]))  # shorter than the window: all of it
    whole = first_vectors(tuned(pool=how), ids, prompt_lens=torch.tensor([2]))
    assert all(torch.equal(vector, whole[target]) for target, vector in short.items())


def test_a_window_of_one_is_the_last_token():
    window, last = (first_vectors(tuned(**o), tokens()) for o in ({"pool": "mean", "window": 1}, {"pool": "last"}))
    assert all(torch.equal(vector, last[target]) for target, vector in window.items())


def test_each_layer_has_its_own_width_and_orders():
    model = tuned(r=[2, 5, 12], orders=[[6, 5], [4, 3], [2, 2]])
    layers = [place.block.modulation for place in describe(model.get_base_model()).layers]
    assert [tuple(layer.pedro_down["default"].shape) for layer in layers] == [(32, 2), (32, 5), (32, 12)]
    assert [len(layer.pedro_a["default"]) for layer in layers] == [7, 5, 3]
    assert [len(layer.pedro_b["default"]) for layer in layers] == [5, 3, 2]


def test_the_defaults_are_what_they_were():
    config = PedroConfig()
    assert (config.r, config.orders, config.pool, config.window, config.group_size) == (12, (6, 5), "last", None, 1)
    assert config.init_std == 0.02
    assert config.by_layer(2) == [("rational", 12, (6, 5))] * 2


def test_groups_and_widths_by_layer_count_as_they_should():
    down, widths, coefficients = 32, 32 + 16 + 48, 7 + 5
    grouped = count_parameters(get_method("pedro").apply(tiny_backbone(), {"group_size": "head"}))
    assert grouped["trainable"] == LAYERS * (down * 12 + 13 * widths // HEAD + coefficients)
    layered = count_parameters(get_method("pedro").apply(tiny_backbone(), {"r": [2, 10, 24]}))
    plain = count_parameters(get_method("pedro").apply(tiny_backbone()))
    assert layered["trainable"] == plain["trainable"]  # the same budget, dealt out otherwise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, r"method\.window: expected null with pool: last; use pool: mean, got 3"),
        ({"pool": "mean", "window": 0}, r"method\.window: expected a whole number of tokens > 0, or null, got 0"),
        ({"group_size": "layer"}, r"method\.group_size: expected a whole number of channels > 0, or head, got 'layer'"),
        ({"r": [12, 12]}, r"method\.r: expected one width for each of the backbone's 3 layers, got '2 widths'"),
        ({"r": [12, 0, 12]}, r"method\.r: expected a whole number > 0, or a list of one a layer, got \(12, 0, 12\)"),
        ({"orders": [[6, 5]]}, r"method\.orders: expected one pair for each of the backbone's 3 layers, got '1 pair'"),
        ({"orders": [[6, 5], [4], [2, 2]]}, r"method\.orders: expected two whole numbers \(m, n\) with"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        get_method("pedro").config(tiny_backbone().config, options)


def test_groups_that_do_not_divide_a_projection_are_refused_before_anything_is_changed():
    backbone = tiny_backbone()
    with pytest.raises(ConfigError, match=r"group_size: expected a divisor of 32, the width of a target; .*got 5"):
        get_method("pedro").apply(backbone, {"group_size": 5})
    assert not any("modulation" in name for name, _ in backbone.named_modules())


def test_a_fresh_w_down_can_be_as_wide_as_the_width_asks(tmp_path):
    def spread(**options) -> float:
        torch.manual_seed(0)
        model = get_method("pedro").apply(tiny_backbone(), {"r": 64, **options})
        layers = [layer.block.modulation.pedro_down["default"] for layer in describe(model.get_base_model()).layers]
        return float(torch.stack([layer.detach() for layer in layers]).std())

    width = 32
    assert spread() == pytest.approx(0.02, rel=0.05)
    assert spread(init_std=0.1) == pytest.approx(0.1, rel=0.05)
    assert spread(init_std="width") == pytest.approx(0.02 * (4096 / width) ** 0.5, rel=0.05)
    for wrong in (0, -1, "height", True):
        with pytest.raises(ConfigError, match=r"method\.init_std: expected a number > 0, or width"):
            get_method("pedro").apply(tiny_backbone(), {"init_std": wrong})
    assert get_method("para").apply(tiny_backbone(), {"init_std": "width"})
