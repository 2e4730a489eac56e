"""What an adapter's config may ask for, so that what is scored and served is what was trained. Knows no tensors.

Import, evaluation and the engine read it here: what changes the backbone's weights is refused by all three, and for the
types that mixed batches serve, every field that the engine's readers do not implement must be at its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

INITS = (True, False, "gaussian")  # LoRA starts from these on the backbone as it is; every other value changes it
CHANGES = ("kasa_config", "layer_replication")  # what else changes the backbone itself
NOT_READ = ("runtime_config",)  # keys that PEFT takes off again

_COMMON = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_COMMON |= {"inference_mode"}
_CHOICE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
_LORA = {"r", "lora_alpha", "lora_dropout", "init_lora_weights"}
IMPLEMENTED: dict[str, set[str]] = {
    "LORA": _COMMON | _CHOICE | _LORA | {"use_rslora"},
    "IA3": _COMMON | _CHOICE | {"feedforward_modules", "init_ia3_weights"},
    "ADALORA": _COMMON
    | _CHOICE
    | _LORA
    | {"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"}
    | {"orth_reg_weight", "total_step", "rank_pattern"},
}  # of our own types, the engine implements every field


def changed_backbone(config: Any) -> str:
    """Which field has the method start from other weights than the backbone's, and what to do; empty if none does."""
    start = getattr(config, "init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in INITS):
        return (
            f"init_lora_weights: {start!r} changes the backbone's weights, which all tenants share; "
            "use true, false or gaussian"
        )
    for name in CHANGES:
        if getattr(config, name, None):
            return f"{name}: changes the backbone itself, which all tenants share; leave it out"
    return ""


def unknown_keys(config: Any, written: Mapping[str, Any]) -> list[str]:
    """Keys of adapter_config.json with a value, that the config's class has no field for."""
    fields = {field.name for field in dataclasses.fields(config)} | set(NOT_READ)
    return sorted(name for name, value in written.items() if name not in fields and value)


def not_served(config: Any) -> list[str]:
    """Fields that are not at their defaults and that the engine does not implement, as `name = value`."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in IMPLEMENTED:
        return []
    found = []
    for field in dataclasses.fields(config):
        if field.name in IMPLEMENTED[kind]:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(config, field.name, default)
        if value != default and (value or default):  # None, false and empty are all "not asked for"
            found.append(f"{field.name} = {value!r}"[:100])
    return found
