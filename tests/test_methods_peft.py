"""PEDRO as PEFT and transformers see it: files, several adapters, switching, checkpointing, precision."""

import subprocess
import sys
import warnings

import peft
import pytest
import torch
from methods_models import randomize, tiny_backbone, tokens, tuned
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pedro import PedroConfig
from pedro.errors import ConfigError
from pedro.methods import count_parameters, get_method
from pedro.methods.pedro.layer import PedroLayer

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def run(code: str, *words: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


APART = """
import os, sys
import torch, transformers  # as slow as all else together, and without a part in what is shown
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(code)
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
TUNED = """
from pedro import PedroConfig
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
backbone = LlamaForCausalLM(config)
backbone.save_pretrained(FOLDER + "/backbone")
ids = torch.arange(12).view(2, 6)
bare = backbone(ids).logits
model = get_peft_model(LlamaForCausalLM.from_pretrained(FOLDER + "/backbone"), PedroConfig(r=12))
assert torch.equal(model(ids).logits, bare)
for name, p in model.named_parameters():
    if p.requires_grad:
        p.data.add_(0.1)
changed = model(ids).logits
assert not torch.equal(changed, bare)
model.save_pretrained(FOLDER + "/adapter")
again = PeftModel.from_pretrained(backbone, FOLDER + "/adapter")
assert torch.equal(again(ids).logits, changed)
print("one import:", again.peft_config["default"].peft_type.value)
"""
LOADED = """
import pedro.methods
from peft import PeftConfig
print("methods alone:", type(PeftConfig.from_pretrained(FOLDER + "/adapter")).__name__)
"""


def test_in_a_fresh_process_one_import_is_enough_to_tune_save_and_load_and_that_of_the_methods_to_load(tmp_path):
    folder = f"FOLDER = {str(tmp_path)!r}"
    said = run(APART, *(f"{folder}\n{code}" for code in (TUNED, LOADED)))
    assert [line for line in said if ": " in line][-2:] == ["one import: PEDRO", "methods alone: PedroConfig"]


def test_importing_the_package_alone_imports_neither_torch_nor_peft():
    code = "import sys, pedro; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    assert run(code) == ["[]"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_comes_back_to_the_bit(tmp_path, low_cpu_mem_usage, dtype):
    config = PedroConfig(activation=("rational", "gelu", "relu"), orders=(4, 3), targets=("k", "up"))
    model, ids = randomize(get_peft_model(tiny_backbone().to(dtype), config)), tokens()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        warnings.simplefilter("ignore", FutureWarning)
        again = PeftModel.from_pretrained(tiny_backbone().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(ids).logits, expected)
    config = again.peft_config["default"]
    assert (config.activation, config.orders, config.targets) == (("rational", "gelu", "relu"), (4, 3), ("k", "up"))


@torch.no_grad()
def test_auto_peft_model_finds_backbone_and_adapter(tmp_path):
    tiny_backbone().save_pretrained(tmp_path / "backbone")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "backbone"), PedroConfig(task_type="CAUSAL_LM"))
    expected = randomize(model).eval()(tokens()).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again(tokens()).logits, expected)
    model.peft_config["default"].task_type = None
    model.save_pretrained(tmp_path / "untyped")
    assert torch.equal(peft.AutoPeftModel.from_pretrained(tmp_path / "untyped")(tokens()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_load_adapter_fills_every_weight(tmp_path, dtype):
    model, ids = tuned(), tokens()
    model.save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(tiny_backbone().to(dtype), tmp_path)(ids).logits
    backbone = tiny_backbone().to(dtype)
    bare = backbone(ids).logits
    info = backbone.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert {p.dtype for n, p in backbone.named_parameters() if "pedro_" in n} == {torch.float32}
    assert torch.equal(backbone(ids).logits, expected)
    assert not torch.equal(expected, bare)
    backbone.disable_adapters()
    assert torch.equal(backbone(ids).logits, bare)
    backbone.enable_adapters()
    backbone.load_adapter(str(tmp_path), adapter_name="second")
    backbone.set_adapter("second")
    assert torch.equal(backbone(ids).logits, expected)
    backbone.delete_adapter("default")
    assert torch.equal(backbone(ids).logits, expected)


@torch.no_grad()
def test_adapters_are_switched_disabled_and_deleted(tmp_path):
    ids, bare = tokens(), tiny_backbone()(tokens()).logits
    model = tuned()
    first = model(ids).logits
    tuned(seed=2, r=5, targets=("q",), pool="mean").save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    second = model(ids).logits
    assert torch.equal(second, PeftModel.from_pretrained(tiny_backbone(), tmp_path)(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, bare)
    assert torch.equal(model(ids).logits, second)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, second)
    assert not [name for name, _ in model.named_parameters() if name.endswith(".default")]
    model.delete_adapter("second")
    assert torch.equal(model.base_model.model(ids).logits, bare)  # PeftModel itself needs one adapter left


def test_training_one_adapter_leaves_another_unchanged_to_the_bit():
    model = tuned()
    model.add_adapter("other", PedroConfig(task_type="CAUSAL_LM"))
    randomize(model, 7, adapter="other")
    model.set_adapter("other")
    before = {n: p.clone() for n, p in model.named_parameters()}
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids, labels=ids, prompt_lens=torch.tensor([4, 4])).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".pedro_" in n and n.endswith(".other")}


@torch.no_grad()
def test_unloading_gives_the_backbone_back():
    model, ids = tuned(), tokens()
    backbone = model.unload()
    assert torch.equal(backbone(ids).logits, tiny_backbone()(ids).logits)
    assert not [module for module in backbone.modules() if isinstance(module, PedroLayer)]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in backbone.modules())
    again = get_peft_model(backbone, PedroConfig())
    assert torch.equal(again(ids).logits, tiny_backbone()(ids).logits)


def test_merging_is_refused_since_the_vectors_depend_on_the_prompt():
    model = tuned()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match="vectors depend on the prompt"):
            merge()


def gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_checkpointing_activations_changes_no_gradient_even_of_two_passes_before_one_backward(model_type):
    model = tuned(model_type).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = [
        {"input_ids": tokens(2, 8, seed), "labels": tokens(2, 8, seed), "prompt_lens": torch.tensor(lens)}
        for seed, lens in ((1, [3, 5]), (2, [6, 2]))
    ]
    plain = gradients(model, batches)
    model.gradient_checkpointing_enable()
    assert model.get_base_model().is_gradient_checkpointing
    checkpointed = gradients(model, batches)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 15
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused():
    model = tuned().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        model(tokens(), labels=tokens(), prompt_lens=torch.tensor([3, 3]))


def test_gradients_reach_the_generator_through_the_backbone():
    model, ids = tuned(), tokens()
    loss = lambda: model(ids, labels=ids, prompt_lens=torch.tensor([4, 4])).loss  # noqa: E731
    loss().backward()
    name, p = next((n, p) for n, p in model.named_parameters() if "layers.0" in n and "pedro_down" in n)
    with torch.no_grad():
        analytic, step = p.grad[3, 2].item(), 1e-2
        p[3, 2] += step
        above = loss().item()
        p[3, 2] -= 2 * step
        below = loss().item()
    assert analytic == pytest.approx((above - below) / (2 * step), rel=0.05), name


@pytest.mark.parametrize("autocast", [False, True])
def test_adapter_parameters_stay_float32_on_a_bfloat16_backbone(tmp_path, autocast):
    model = get_method("pedro").apply(tiny_backbone().to(torch.bfloat16))
    randomize(model)
    seen = []
    for module in model.modules():
        if isinstance(module, PedroLayer):
            module.register_forward_hook(lambda layer, args, output: seen.extend(v.dtype for v in output.values()))
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(ids, labels=ids, prompt_lens=torch.tensor([4, 4]))
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = PeftModel.from_pretrained(tiny_backbone().to(torch.bfloat16), tmp_path)
    assert {p.dtype for n, p in again.named_parameters() if ".pedro_" in n} == {torch.float32}


def test_an_update_of_a_below_a_bfloat16_step_survives_on_a_bfloat16_backbone(tmp_path):
    model = get_method("pedro").apply(tiny_backbone().to(torch.bfloat16))
    _, theta = get_method("pedro").parameter_groups(model)
    name, a = next((n, p) for n, p in theta if "pedro_a" in n)
    before = a[1].item()
    update = abs(before) * 1e-4
    assert torch.tensor(before + update).bfloat16() == torch.tensor(before).bfloat16()
    with torch.no_grad():
        a[1] += update
    model.save_pretrained(tmp_path)
    again = dict(PeftModel.from_pretrained(tiny_backbone().to(torch.bfloat16), tmp_path).named_parameters())[name]
    assert again[1].item() == pytest.approx(before + update, rel=1e-7)
    assert again[1].item() != before


@pytest.mark.parametrize(
    ("name", "without_bias", "whole"),
    [("pedro", 8.95e6, 9.56e6), ("pedro-3", 9.83e6, None), ("pedro-4", 9.44e6, None)],
)
def test_the_papers_parameter_counts_on_llama_2_7b(name, without_bias, whole):
    with torch.device("meta"):
        backbone = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B))
    counts = count_parameters(get_method(name).apply(backbone))
    assert counts["trainable_without_bias"] == pytest.approx(without_bias, abs=5e3)
    if whole:
        assert counts["trainable"] == pytest.approx(whole, abs=5e3)
    assert counts["total"] == pytest.approx(6.738e9 + counts["trainable"], rel=1e-3)


@torch.no_grad()
def test_a_copy_of_the_model_has_a_life_of_its_own():
    import copy

    model, ids = tuned(), tokens()
    expected = model(ids).logits
    other = copy.deepcopy(model)
    randomize(other, seed=9)
    changed = other(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(changed, expected)
    for p in model.parameters():
        p.zero_()
    assert torch.equal(other(ids).logits, changed)
    assert torch.equal(other.unload()(ids).logits, tiny_backbone()(ids).logits)


@pytest.mark.slow
def test_compiled_with_the_eager_backend_it_is_the_same():
    model, ids = tuned(), tokens()
    with torch.no_grad():
        expected = model(ids, prompt_lens=torch.tensor([4, 5])).logits
        got = torch.compile(model, backend="eager")(ids, prompt_lens=torch.tensor([4, 5])).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_sequence_classifier_conditions_on_the_whole_text():
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = tiny_backbone().config
    model = get_peft_model(LlamaForSequenceClassification(config).eval(), PedroConfig(task_type="SEQ_CLS"))
    assert torch.isfinite(model(tokens(), labels=torch.tensor([0, 1])).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected a whole number > 0, or a list of one a layer, got 0"),
        ({"r": True}, "r: expected a whole number > 0, or a list of one a layer, got True"),
        ({"targets": ("q", "o")}, r"targets: expected distinct names of q, k, v, gate, up, got \('q', 'o'\)"),
        ({"targets": "q"}, "targets: expected distinct names"),
        ({"targets": ()}, "targets: expected distinct names"),
        ({"targets": ("q", "q")}, "targets: expected distinct names"),
        ({"activation": "tanh"}, "activation: expected one of rational, gelu, relu"),
        ({"activation": ()}, "activation: expected one of rational, gelu, relu"),
        ({"orders": (6,)}, "orders: expected two whole numbers"),
        ({"orders": (0, 5)}, "orders: expected two whole numbers"),
        ({"pool": "first"}, "pool: expected one of last, mean, max, got 'first'"),
        ({"pool_source": "up"}, "pool_source: expected one of normed, residual, got 'up'"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(options, message):
    with pytest.raises(ConfigError, match=message):
        PedroConfig(**options)


def test_a_list_of_activations_of_the_wrong_length_is_named():
    with pytest.raises(ConfigError, match=r"activation: .*each of the backbone's 3 layers, got '2 names'"):
        get_peft_model(tiny_backbone(), PedroConfig(activation=("gelu", "relu")))


@torch.no_grad()
def test_a_layer_uses_its_own_activation():
    mixed = tuned(activation=("relu", "rational", "gelu"))
    assert {n.split("layers.")[1][0] for n, _ in mixed.named_parameters() if "pedro_a" in n} == {"1"}
    hidden, prompt = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    layers = [module for module in mixed.modules() if isinstance(module, PedroLayer)]
    for layer, activation in ((layers[0], torch.nn.functional.relu), (layers[2], torch.nn.functional.gelu)):
        pooled = layer.layer_sites.norm(hidden)[:, -1]
        expected = activation(pooled @ layer.pedro_down["default"]) @ layer.pedro_up["default"]
        got = torch.cat(list(layer(hidden, prompt, "default").values()), -1)
        torch.testing.assert_close(got, expected + layer.pedro_bias["default"])


def test_the_papers_variants():
    base = PedroConfig()
    assert (base.r, base.targets, base.activation, base.orders) == (12, ("q", "v", "up"), "rational", (6, 5))
    assert (base.pool, base.pool_source) == ("last", "normed")
    assert PedroConfig.variant(1).pool == "mean"
    assert PedroConfig.variant(2).pool == "max"
    assert (PedroConfig.variant(3).r, PedroConfig.variant(3).targets) == (8, ("q", "k", "v", "gate", "up"))
    assert (PedroConfig.variant(4).r, PedroConfig.variant(4).targets) == (24, ("q", "v"))
    assert PedroConfig.variant(5).activation == "relu"
    assert PedroConfig.variant(6, r=3).activation == "gelu"
    assert PedroConfig.variant(7, num_layers=5).activation == ("relu", "relu", "gelu", "gelu", "gelu")
    with pytest.raises(ConfigError, match="num_layers"):
        PedroConfig.variant(7)
    with pytest.raises(ConfigError, match="variant: expected a number from 1 to 7, got 8"):
        PedroConfig.variant(8)


def test_the_hugging_face_trainer_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(8) < 5, -100)} for row in tokens(8, 8)]
    model = get_method("pedro").apply(tiny_backbone())
    before = {n: p.clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, report_to=[], learning_rate=1e-2
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "pedro_" in n
    }


def test_an_unwrapped_backbone_of_any_origin_is_left_alone():
    model = AutoModelForCausalLM.from_config(tiny_backbone().config)
    assert not any(module._forward_pre_hooks for module in model.modules())
