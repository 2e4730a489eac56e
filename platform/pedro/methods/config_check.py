"""What an adapter's config may ask for, so that what is scored and served is what was trained.

Import, evaluation and serving read it here: what changes the backbone's weights is refused by all three. Which fields
of a config the engine heeds is said by the method's reader (`reader`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig

INITS = (True, False, "gaussian")  # LoRA starts from these on the backbone as it is; every other value changes it
CHANGES = ("kasa_config", "layer_replication")  # what else changes the backbone itself
NOT_READ = ("runtime_config",)  # keys that PEFT takes off again


def changed_backbone(config: PeftConfig) -> str:
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


def wrong_invocation(config: PeftConfig, vocabulary: int | None = None) -> str:
    """What is wrong with the tokens that invoke an aLoRA, and what to do; empty where nothing is.

    PEFT takes any, and an adapter whose tokens are in no prompt would never act. The backbone has `vocabulary` tokens.
    """
    tokens = getattr(config, "alora_invocation_tokens", None)
    most = f"{vocabulary - 1:,}" if vocabulary else "the vocabulary's last"
    if tokens is None or (
        isinstance(tokens, list)
        and len(tokens) > 0
        and all(type(token) is int and 0 <= token < (vocabulary or math.inf) for token in tokens)
    ):
        return ""
    return (
        f"alora_invocation_tokens: expected a list of one token id or more, from 0 to {most}, got {tokens!r}"[:200]
        + "; give the ids that the backbone's tokenizer makes of the invocation"
    )


def unknown_keys(config: PeftConfig, written: Mapping[str, Any]) -> list[str]:
    """Keys of adapter_config.json with a value, that the config's class has no field for."""
    fields = {field.name for field in dataclasses.fields(config)} | set(NOT_READ)
    return sorted(name for name, value in written.items() if name not in fields and value)
