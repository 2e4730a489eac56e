"""The registry: every method through one forward call, its options, its parameters and what it says it can do."""

import pytest
import torch
from methods_models import MODEL_TYPES, tiny_backbone, tokens
from peft import PeftModel

from pedro.errors import BackboneError, ConfigError
from pedro.methods import METHODS, count_parameters, get_method

PEDROS = ["pedro", *(f"pedro-{n}" for n in range(1, 8))]
TUNERS = ["para", "lora", "ia3", "bitfit", "red", "adalora", "ssp", "houlsby", "learned-adapter", "p-tuning-v2", "lpt"]
TUNERS += ["loreft"]
FIELD = ["melora", "lora-dash", "lorta", "miss", "gift", "ether", "ether-plus", "sibo", "mode", "loretta"]
ALL = [*PEDROS, *TUNERS, *FIELD, "peft", "full"]
SMALL = {
    "p-tuning-v2": {"tokens": 4},
    "lpt": {"tokens": 4, "r": 8},
    "lora-dash": {"launch": 1, "directions": 4},
    "loretta": {"r": 4, "rank": 2},
    "peft": {"peft_type": "VERA", "r": 4},
}
EXPLICIT = [name for name in ALL if name != "peft"]  # whose capabilities do not depend on the options


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = tokens(rows, 8)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(torch.arange(8) < 5, -100),
        "prompt_lens": torch.full((rows,), 5),
    }


def test_the_registry_holds_the_methods_of_the_comparison():
    assert list(METHODS) == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_method_trains_one_step_through_the_same_forward_call(name):
    method = get_method(name)
    model = method.apply(tiny_backbone(), SMALL.get(name)).train()
    hook = method.training_hook(model, SMALL.get(name, {}), steps=10)
    omega, theta = method.parameter_groups(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in omega + theta], lr=1e-2)
    losses = []
    for step in (1, 2, 3):
        loss = model(**batch(), prompt_mask=None).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if name == "lora-dash":  # its directions are trained from the launch on
            hook.after_step(step)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, _ in omega + theta}
    assert moved <= trained
    assert len(moved) >= len(trained) - 2  # an embedding row or a norm may stay where it is


@torch.no_grad()
@pytest.mark.parametrize("name", EXPLICIT)
def test_identity_at_init_is_true_to_the_bit_or_said_to_be_none(name):
    method = get_method(name)
    expected = tiny_backbone()(tokens()).logits
    found = method.apply(tiny_backbone(), SMALL.get(name)).eval()(tokens()).logits
    assert torch.equal(found, expected) == method.identity_at_init


@pytest.mark.parametrize("name", EXPLICIT)
def test_what_is_called_mergeable_merges(name):
    method = get_method(name)
    model = method.apply(tiny_backbone(), SMALL.get(name))
    with torch.no_grad():
        for _, p in method.parameter_groups(model)[0]:
            p.add_(0.01)
        expected = model.eval()(tokens()).logits
    if not hasattr(model, "merge_and_unload"):
        assert method.mergeable == (name == "full")  # soft tokens have nothing to merge into
    elif method.mergeable:
        with torch.no_grad():
            torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ConfigError):
            model.merge_and_unload()


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_only_prompt_conditioned_methods_heed_the_prompt(name):
    method = get_method(name)
    model = method.apply(tiny_backbone(), SMALL.get(name)).eval()
    generator = torch.Generator().manual_seed(0)
    for _, p in method.parameter_groups(model)[0]:
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    ids = tokens()
    short, long = (model(ids, prompt_lens=torch.tensor([n, n])).logits for n in (2, 7))
    assert torch.equal(short, long) != method.conditions_on_prompt


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", ["pedro", *TUNERS, *FIELD, "full"])
def test_every_method_runs_on_every_backbone(name, model_type):
    if name == "lpt" and model_type in ("mistral", "gemma2", "gemma3_text"):
        with pytest.raises(BackboneError, match="sliding windows"):
            get_method(name).apply(tiny_backbone(model_type), SMALL[name])
        return
    if (name, model_type) == ("miss", "gpt2"):
        with pytest.raises(BackboneError, match="gpt2's are of another kind; take lora"):
            get_method(name).apply(tiny_backbone(model_type))
        return
    model = get_method(name).apply(tiny_backbone(model_type), SMALL.get(name)).train()
    model(**batch()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in ALL if n != "full"])
def test_adapter_parameters_are_float32_on_a_bfloat16_backbone(name):
    method = get_method(name)
    model = method.apply(tiny_backbone().to(torch.bfloat16), SMALL.get(name))
    omega, theta = method.parameter_groups(model)
    assert {p.dtype for _, p in omega + theta} == {torch.float32}
    model(**batch()).loss.backward()


@pytest.mark.parametrize(("name", "layers_with_theta"), [("pedro", 3), ("pedro-4", 3), ("pedro-7", 0), ("lora", 0)])
def test_theta_is_exactly_a_and_b_and_omega_the_rest(name, layers_with_theta):
    method = get_method(name)
    model = method.apply(tiny_backbone())
    omega, theta = method.parameter_groups(model)
    assert (
        sorted(n.split(".")[-2] for n, _ in theta) == ["pedro_a"] * layers_with_theta + ["pedro_b"] * layers_with_theta
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, _ in omega} | {n for n, _ in theta} == trainable
    assert not {n for n, _ in omega} & {n for n, _ in theta}


def test_ia3_scales_keys_values_and_the_feed_forward_on_every_backbone():
    for model_type in MODEL_TYPES:
        config = get_method("ia3").config(tiny_backbone(model_type).config)
        assert config.feedforward_modules < config.target_modules
        assert len(config.target_modules) == (2 if model_type in ("phi3", "gpt2", "gpt_neox") else 3)


def test_counting_leaves_out_bias_vectors_when_asked():
    model = get_method("pedro").apply(tiny_backbone())
    down, up, bias, coefficients = 32 * 12, 12 * (32 + 16 + 48), 32 + 16 + 48, 7 + 5
    counts = count_parameters(model)
    assert counts["trainable_without_bias"] == 3 * (down + up + coefficients)
    assert counts["trainable"] == counts["trainable_without_bias"] + 3 * bias
    assert counts["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pedro", {"rr": 4}, r"method\.rr: unknown option; did you mean r\? pedro takes r, targets, activation"),
        ("pedro", {"pol": "last"}, r"method\.pol: unknown option; did you mean pool\?"),
        ("para", {"orders": [6, 5]}, r"method\.orders: unknown option; para takes"),
        ("lora", {"lora_alpha": 2, "x": 1}, r"method\.lora_alpha: .*did you mean alpha\?.*; method\.x: unknown option"),
        ("full", {"r": 4}, r"method\.r: unknown option; full takes no options"),
        ("pedro", {"r": -1}, r"method\.r: expected a whole number > 0, or a list of one a layer, got -1"),
        ("pedro", {"orders": [6, 5, 4]}, r"method\.orders: expected two whole numbers"),
        (
            "pedro",
            {"activation": ["gelu"]},
            r"method\.activation: expected one name for each of the backbone's 3 layers",
        ),
        ("para", {"activation": "rational"}, r"method\.activation: expected gelu or relu"),
        ("lora", {"r": "8"}, r"method\.r: expected a whole number > 0, got '8'"),
        ("lora", {"targets": ["q", "query"]}, r"method\.targets: expected a list of q, k, v, gate, up, o, down"),
        ("lora", {"dropout": 1.5}, r"method\.dropout: expected a number in \[0, 1\)"),
        ("adalora", {"target_r": 9}, r"method\.target_r: expected at most r = 8, got 9"),
        ("adalora", {"start": 0.6}, r"method\.end: expected more than start = 0\.6, got 0\.5"),
        ("ssp", {"budget": 0}, r"method\.budget: expected a share in \(0, 1\], got 0"),
        ("ssp", {"search": 1}, r"method\.search: expected a share in \(0, 0\.9\], got 1"),
        ("houlsby", {"activation": "gelo"}, r"method\.activation: expected learned or one of relu"),
        ("learned-adapter", {"r": 0}, r"method\.r: expected a whole number > 0, got 0"),
        ("p-tuning-v2", {"tokens": 0}, r"method\.tokens: expected a whole number > 0, got 0"),
        ("lpt", {"layer": 3}, r"method\.layer: expected 1 to 2, the backbone's last, got 3"),
        (
            "loreft",
            {"positions": "l2+f3"},
            r"method\.positions: expected numbers of first and last tokens.*got 'l2\+f3'",
        ),
        ("loreft", {"positions": "f0"}, r"method\.positions: expected numbers of first and last tokens"),
        ("loreft", {"layers": [0, 3]}, r"method\.layers: expected 0 to 2, got 3"),
        ("loreft", {"layers": [1, 1]}, r"method\.layers: expected a list of distinct whole numbers"),
        ("loreft", {"direct": 1}, r"method\.direct: expected true or false, got 1"),
        ("loreft", {"r": 33}, r"method\.r: expected at most 32, the backbone's width, got 33"),
        ("pedro", {"r": 10**30}, r"method\.r: expected at most 1,000,000, got 1000"),
        ("pedro", {"r": [1, 2, 10**7]}, r"method\.r: expected at most 1,000,000, got 10000000"),
        ("lora", {"alpha": 10**400}, r"method\.alpha: expected at most 1,000,000"),
        ("miss", {"r": 33}, r"method\.r: expected at most 32, the inputs of the narrowest target, got 33"),
        ("miss", {"r": 49, "targets": ["down"]}, r"method\.r: expected at most 48, the inputs of the narrowest"),
        ("sibo", {"targets": 5}, r"method\.targets: expected a list of names, got 5"),
        ("lorta", {"targets": "qo"}, r"method\.targets: expected a list of names, got 'qo'"),
        ("loretta", {"targets": {"q": 1}}, r"method\.targets: expected a list of names"),
        ("para", {"targets": "q"}, r"method\.targets: expected a list of names, got 'q'"),
        ("lora", {"targets": [["q"]]}, r"method\.targets: expected a list of names, got \[\['q'\]\]"),
        ("loretta", {"activation": [8]}, r"method\.activation: expected one of relu.*got \[8\]"),
        ("peft", {"peft_type": ["LORA"]}, r"method\.peft_type: expected a type of PEFT, got \['LORA'\]"),
        ("peft", {}, r"method\.peft_type: expected a type of PEFT, got None; use one of ADALORA, "),
        ("peft", {"peft_type": "VERE"}, r"method\.peft_type: .* got 'VERE'; did you mean VERA\?"),
        ("peft", {"peft_type": "PEDRO"}, r"method\.peft_type: train PEDRO by its own name: method\.name=pedro"),
        ("peft", {"peft_type": "VERA", "ranc": 4}, r"method\.ranc: unknown option; peft takes peft_type, r, "),
        (
            "peft",
            {"peft_type": "VERA", "save_projection": 4, "layers_pattern": "x"},
            r"method\.peft_type: VERA refuses",
        ),
    ],
)
def test_a_wrong_option_is_named_with_the_valid_ones(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get_method(name).config(tiny_backbone().config, options)


def test_a_target_that_the_backbone_lacks_is_told_before_any_model_is_touched():
    with pytest.raises(ConfigError, match=r"method\.targets: expected names that gpt2 has .*got \['gate'\]"):
        get_method("pedro-3").config(tiny_backbone("gpt2").config)


def test_an_unsupported_backbone_is_told_for_every_adapter_method():
    from transformers import BloomConfig

    for name in ALL:
        if name not in ("full", "peft"):
            with pytest.raises(BackboneError, match="'bloom' is not supported"):
                get_method(name).config(BloomConfig())


def test_an_unknown_method_is_named_with_a_suggestion():
    with pytest.raises(ConfigError, match="unknown method 'perdo'; did you mean pedro"):
        get_method("perdo")


def test_options_override_a_variants_own():
    config = get_method("pedro-3").config(tiny_backbone().config, {"r": 2, "orders": [3, 2], "pool_source": "residual"})
    assert (config.r, config.orders, config.pool_source) == (2, (3, 2), "residual")
    assert len(config.targets) == 5


def test_peft_says_in_its_own_words_what_does_not_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"method\.peft_type: MISS cannot be put on this backbone: `r` \(64\) must"):
        get_method("peft").apply(tiny_backbone(), {"peft_type": "MISS"})
    for options in ({"peft_type": "VERA", "r": 0}, {"peft_type": "LORA", "target_modules": "(((("}):
        with pytest.raises(ConfigError, match=rf"method\.peft_type: {options['peft_type']} "):
            get_method("peft").apply(tiny_backbone(), options)


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "LORA", "target_modules": r"(\w+\.?)+!"},
        {"peft_type": "LORA", "target_modules": "q_proj", "exclude_modules": r"(.*a?)*!"},
        {"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {r"(\w|\d)+(\w+)+!": 4}},
    ],
)
def test_a_pattern_that_would_match_for_years_is_refused_by_field(monkeypatch, options):
    monkeypatch.setattr("pedro.methods.patterns.LIMIT_S", 0.5)
    with pytest.raises(ConfigError, match=r"method\.(target_modules|exclude_modules|rank_pattern): .* takes too long"):
        get_method("peft").apply(tiny_backbone(), options)


def test_an_ordinary_pattern_still_names_modules():
    options = {
        "peft_type": "LORA",
        "target_modules": r".*\.layers\.\d+\..*\.(q|v)_proj",
        "rank_pattern": {"q_proj$": 4},
    }
    model = get_method("peft").apply(tiny_backbone(), options)
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"q_proj", "v_proj"}


def test_a_mistake_that_only_the_model_shows_is_told_as_the_specs_option():
    with pytest.raises(ConfigError, match=r"method\.group_size: expected a divisor of \d+, the width of a target"):
        get_method("pedro").apply(tiny_backbone(), {"group_size": 7})
    with pytest.raises(
        ConfigError, match=r"method\.peft_type: expected options that leave something to train, got 'PROMPT_TUNING'"
    ):
        get_method("peft").apply(tiny_backbone(), {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0})


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["adalora", "ssp", "houlsby", "learned-adapter", "p-tuning-v2", "lpt", "loreft", "peft", *FIELD]
)
def test_an_adapter_comes_back_from_its_directory_to_the_bit(tmp_path, name):
    model = get_method(name).apply(tiny_backbone(), SMALL.get(name)).eval()
    generator = torch.Generator().manual_seed(0)
    omega, theta = get_method(name).parameter_groups(model)
    for _, p in omega + theta:
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".md", ".safetensors"}
    again = PeftModel.from_pretrained(tiny_backbone(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, expected)


def test_wrapping_twice_registers_once():
    method = get_method("lora")
    model = method.apply(tiny_backbone())
    hooks = len(model.get_base_model()._forward_pre_hooks)
    assert len(method.wrap(model).get_base_model()._forward_pre_hooks) == hooks == 1
