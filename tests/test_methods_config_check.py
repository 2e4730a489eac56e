"""Configs that ask for what is not served, or for another backbone, are refused by name wherever they come in."""

import json
from types import SimpleNamespace

import pytest
import torch
from engine_models import DIGEST, VOCABULARY, make_adapter, random_backbone
from serving_adapters import backbone
from serving_adapters import make_adapter as make_pedro

from pedro.adapter_directory import CONFIG, MANIFEST
from pedro.backbone import load_model
from pedro.errors import AdapterError, ConfigError
from pedro.methods import get_method
from pedro.methods.adapter_files import read_config, save_adapter
from pedro.methods.architectures import describe
from pedro.methods.servable import check_servable, read_adapter
from pedro.training.job import judge_version

LORA = {"peft_type": "LORA", "target_modules": ["q_proj"]}
BAD = ([], [5, -1], ["a"], [True], "ab", 7)  # as tokens that invoke an aLoRA


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "lora_ga", "orthogonal", "something new"]
)
def test_lora_from_changed_weights_is_refused_before_anything_is_trained(start):
    with pytest.raises(ConfigError, match=f"method.init_lora_weights: '{start}' changes the backbone's weights"):
        get_method("peft").config(random_backbone().config, {**LORA, "init_lora_weights": start})


def test_lora_that_changes_the_backbone_besides_is_refused_before_anything_is_trained():
    with pytest.raises(ConfigError, match=r"method.kasa_config: changes the backbone itself"):
        get_method("peft").config(random_backbone().config, {**LORA, "kasa_config": {"beta": 1e-4}})


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_lora_on_the_backbone_as_it_is_may_start_as_it_likes(start):
    assert get_method("peft").config(random_backbone().config, {**LORA, "init_lora_weights": start}) is not None


@pytest.mark.parametrize("bad", [*BAD, [5, VOCABULARY]])
def test_tokens_that_can_never_invoke_an_alora_are_refused_before_anything_is_trained(bad):
    with pytest.raises(ConfigError, match=r"method.alora_invocation_tokens: expected .* from 0 to 95, got") as refused:
        get_method("peft").config(random_backbone().config, {**LORA, "alora_invocation_tokens": bad})
    assert refused.value.param == "method.alora_invocation_tokens"


def test_an_invocation_that_the_backbone_has_no_token_for_is_not_served(lora, tmp_path):
    directory, architecture = lora
    copy = changed(directory, tmp_path, alora_invocation_tokens=[5, VOCABULARY])
    with pytest.raises(AdapterError, match=r"alora_invocation_tokens: expected .* from 0 to 95, got \[5, 96\]"):
        read_adapter(copy, architecture, DIGEST, torch.device("cpu"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "lora"
    model = random_backbone()
    make_adapter(model, directory, 1, "lora")
    return directory, describe(model)


def changed(directory, tmp_path, **fields):
    """A copy of an adapter with another config, as from elsewhere: without digests of its config and manifest."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / CONFIG).write_text(json.dumps(json.loads((copy / CONFIG).read_text()) | fields))
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"config_digest": None, "manifest_digest": None}))
    return copy


@pytest.mark.parametrize(
    "field",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["q_proj.weight"]},
        {"use_qalora": True},
    ],
)
def test_a_field_that_the_engine_does_not_implement_is_refused_by_name(lora, tmp_path, field):
    directory, architecture = lora
    with pytest.raises(AdapterError, match=f"LORA with {next(iter(field))} = .* is not served in mixed batches"):
        read_adapter(changed(directory, tmp_path, **field), architecture, DIGEST, torch.device("cpu"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow: PEFT .* has no such field of LoraConfig"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the backbone's weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: changes the backbone itself"),
        *(
            ({"alora_invocation_tokens": bad}, "alora_invocation_tokens: expected a list of one token id")
            for bad in BAD
        ),
    ],
)
def test_what_nobody_would_heed_or_would_change_the_backbone_is_refused_wherever_it_is_read(
    lora, tmp_path, field, message
):
    with pytest.raises(AdapterError, match=message):
        read_config(changed(lora[0], tmp_path, **field))


def test_an_empty_field_that_is_not_known_means_nothing(lora, tmp_path):
    directory, architecture = lora
    copy = changed(directory, tmp_path, a_field_of_tomorrow=None, use_dora=False, rank_pattern={}, lora_dropout=0.1)
    read_adapter(copy, architecture, DIGEST, torch.device("cpu"))


def test_an_adapter_is_opened_as_the_engine_would_without_the_backbones_weights(tmp_path):
    make_pedro(tmp_path / "pedro", 1, "completion")
    check_servable(tmp_path / "pedro", backbone())
    for method, options, why in (
        ("p-tuning-v2", {"tokens": 2}, "not PREFIX_TUNING"),
        ("full", {}, "a whole model is not served"),
        ("peft", {**LORA, "modules_to_save": ["lm_head"]}, "modules_to_save = .* is not served"),
    ):
        model = get_method(method).apply(load_model(backbone()), options)
        about = {"backbone": {"id": backbone().id, "digest": backbone().digest}, "method": {"name": method}}
        save_adapter(model, tmp_path / method, about)
        with pytest.raises(AdapterError, match=why):
            check_servable(tmp_path / method, backbone())


def test_a_version_that_cannot_be_served_passes_no_gate():
    trained = SimpleNamespace(unservable="adapter: the engine serves no such", champion=None, metrics={"accuracy": 1.0})
    decision = judge_version(None, trained, None)
    assert not decision.passed
    assert decision.reason == "it cannot be served: adapter: the engine serves no such"
