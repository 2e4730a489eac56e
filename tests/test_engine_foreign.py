"""Adapters that PEFT made elsewhere: each field of a config is served as PEFT computes it, or refused by its name."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from engine_models import DIGEST, make_adapter, prompt, random_backbone, reference_logits
from peft import AdaLoraConfig, IA3Config, LoraConfig, MissConfig

from pedro.engine.runner import PrefillRow, Runner
from pedro.errors import AdapterError
from pedro.methods.adalora import METHOD as ADALORA
from pedro.methods.architectures import describe
from pedro.methods.constants.reader import IA3_READER
from pedro.methods.lora import METHOD as LORA
from pedro.methods.miss import METHOD as MISS
from pedro.methods.reader import PEFT_FIELDS, SavedTensors
from pedro.methods.servable import read_adapter

READERS = {
    LoraConfig: LORA.readers[0],
    AdaLoraConfig: ADALORA.readers[0],
    IA3Config: IA3_READER,
    MissConfig: MISS.readers[0],
}
CASES = [
    pytest.param(config_class, field.name, id=f"{reader.peft_type}-{field.name}")
    for config_class, reader in READERS.items()
    for field in dataclasses.fields(config_class)
    if field.name not in (reader.fields or ())
]
SERVED: list[dict[str, Any]] = [
    {"r": 3},
    {"lora_alpha": 5},
    {"lora_dropout": 0.5},
    {"use_rslora": True, "r": 4},
    {"init_lora_weights": "gaussian"},
    {"target_modules": r".*\.(q_proj|down_proj)"},
    {"exclude_modules": ["up_proj"]},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"alora_invocation_tokens": prompt(7)[3:5]},
]
SERVED_OF_MISS: list[dict[str, Any]] = [
    {"r": 3},
    {"miss_dropout": 0.5},
    {"init_weights": "mini", "mini_r": 2},
    {"target_modules": r".*\.(q_proj|down_proj)"},
    {"exclude_modules": ["up_proj"]},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
]


@pytest.mark.parametrize(("config_class", "name"), CASES)
def test_each_field_that_its_reader_does_not_implement_is_named(config_class, name):
    """The fields are those of the installed PEFT, so one that a later PEFT adds is refused as well."""
    config = AdaLoraConfig(total_step=10) if config_class is AdaLoraConfig else config_class()
    setattr(config, name, not getattr(config, name) if isinstance(getattr(config, name), bool) else "something else")
    assert [text.partition(" = ")[0] for text in READERS[config_class].unsupported(config)] == [name]


@pytest.mark.parametrize("options", SERVED, ids=lambda options: "-".join(options))
def test_each_field_of_lora_that_is_served_equals_peft(options, tmp_path):
    _serves_as_peft("LORA", options, tmp_path)


@pytest.mark.parametrize("options", SERVED_OF_MISS, ids=lambda options: "-".join(options))
def test_each_field_of_miss_that_is_served_equals_peft(options, tmp_path):
    _serves_as_peft("MISS", {"r": 4, **options}, tmp_path)


def test_bat_which_multiplies_the_backbones_weight_is_refused_by_name(tmp_path):
    model = random_backbone("llama")
    options = {"r": 4, "init_weights": "bat", "target_modules": ["q_proj"]}
    make_adapter(model, tmp_path / "bat", 1, "peft", peft_type="MISS", **options)
    with pytest.raises(AdapterError, match=r"MISS with init_weights = 'bat' is not served .*; train without"):
        read_adapter(tmp_path / "bat", describe(model), DIGEST, torch.device("cpu"))


@pytest.mark.parametrize("columns", [0, -2, 5, 2.5])
def test_a_miss_whose_columns_do_not_make_up_the_outputs_is_refused(columns, tmp_path):
    model = random_backbone("llama")
    options = {"r": 4, "init_weights": "mini", "mini_r": 2, "target_modules": ["q_proj"]}
    make_adapter(model, tmp_path / "mini", 1, "peft", peft_type="MISS", **options)
    config = MissConfig(**(options | {"mini_r": columns}))
    tensors = SavedTensors(tmp_path / "mini", torch.device("cpu"))
    with pytest.raises(AdapterError, match=r"mini_r: expected a divisor of the \d+ outputs of self_attn\.q_proj"):
        MISS.readers[0].read(config, tensors, describe(model))


def _serves_as_peft(peft_type, options, tmp_path):
    model = random_backbone("llama")
    given = {"target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    tuned = make_adapter(model, tmp_path / "made", seed=1, method="peft", peft_type=peft_type, **given)
    runner = Runner(copy.deepcopy(model), slots=1, length=16)
    adapter = read_adapter(tmp_path / "made", runner.architecture, DIGEST, runner.device, runner.simd_width)
    runner.begin([PrefillRow(0, prompt(7), 7, adapter, start=adapter.start_in(prompt(7), 7) or 0)])
    runner.advance(None)
    logits, _ = runner.end()
    torch.testing.assert_close(logits.values[0], reference_logits(tuned, prompt(7), 7)[-1], atol=1e-4, rtol=1e-4)


def test_the_fields_of_lora_that_are_served_are_those_compared_with_peft():
    """`fan_in_fan_out` is how GPT-2's modules lie, which its own tests compare."""
    compared = {name for options in SERVED for name in options}
    assert (LORA.readers[0].fields or frozenset()) - PEFT_FIELDS == compared | {"fan_in_fan_out"}


def test_the_fields_of_miss_that_are_served_are_those_compared_with_peft():
    compared = {name for options in SERVED_OF_MISS for name in options}
    assert (MISS.readers[0].fields or frozenset()) - PEFT_FIELDS == compared | {"fan_in_fan_out"}
