"""MiSS, which PEFT has: its options, and its reader for the engine (Kang and Yin 2024, arXiv 2409.15371).

y ← y + Dᵀ (Σ of x over its pieces of r): one matrix D [r, W] by projection, and the same piece for every r inputs, the
last filled up with zeros. That is a low-rank change of rank r whose first factor is fixed, and it is served as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import MissConfig

from pedro.adapter_kinds import Adapter, LowRank
from pedro.errors import AdapterError, BackboneError
from pedro.methods.architectures import head_width
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_share, is_count, paths_of, targets_of
from pedro.methods.reader import (
    MODULE_FIELDS,
    PEFT_FIELDS,
    ROOT,
    Reader,
    SavedTensors,
    input_width,
    rows_of,
    sites_by_module,
)

if TYPE_CHECKING:
    from pedro.methods.architectures import Architecture
    from pedro.model_protocols import ModelConfig

FIELDS = frozenset({"r", "miss_dropout", "mini_r", "init_weights"})


def _build(model_config: ModelConfig, *, r: int = 8, dropout: float = 0.0, targets: Targets = None) -> MissConfig:
    if model_config.model_type == "gpt2":
        raise BackboneError("method miss: PEFT's MiSS takes linear layers, and gpt2's are of another kind; take lora")
    expect_count("r", r)
    most = min(_inputs(model_config, target) for target in targets_of(model_config, targets))
    expect(r <= most, "r", f"at most {most}, the inputs of the narrowest target", r)
    expect_share("dropout", dropout)
    return MissConfig(r=r, miss_dropout=dropout, target_modules=paths_of(model_config, targets))


def _inputs(model_config: ModelConfig, target: str) -> int:
    """How many inputs a target has, by the config alone."""
    if target == "down":
        return model_config.intermediate_size
    heads = model_config.num_attention_heads * head_width(model_config)
    return heads if target == "o" else model_config.hidden_size


def _read(config: MissConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """D of each module as PEFT saves it; with `mini`, its columns are repeated until they are the module's outputs.

    Bat, which multiplies by the backbone's weight, is no low-rank change and is refused.
    """
    if config.init_weights == "bat":
        raise AdapterError("adapter: MISS with init_weights = 'bat' is not served in mixed batches; train without")
    mini = config.init_weights == "mini"
    layers = []
    for block in architecture.layers:
        terms: dict[str, LowRank] = {}
        for path, sites in sites_by_module(block).items():
            key = f"{ROOT}{block.name}.{path}.miss_block"
            if key not in tensors:
                continue
            outputs = sum(block.linears[site].width for site in sites)
            columns = config.mini_r if mini else outputs
            if not is_count(columns) or columns < 1 or outputs % columns:
                raise AdapterError(
                    f"adapter: mini_r: expected a divisor of the {outputs} outputs of {path}, got {columns!r}; "
                    "save the adapter again with PEFT"
                )
            inputs = input_width(block, sites, architecture.hidden_size)
            if config.r > inputs:
                raise AdapterError(
                    f"adapter: r: expected at most {inputs}, the inputs of {path}, got {config.r}; save the adapter "
                    "again with PEFT"
                )
            shard = tensors.take(key, (config.r, columns)).repeat(1, outputs // columns)  # [r, W]
            a = torch.eye(config.r, device=shard.device).repeat(-(-inputs // config.r), 1)[:inputs]
            terms |= {site: LowRank(a, rows_of(shard.T, block, site).T) for site in sites}
        layers.append(terms)
    return Adapter(low_rank=tuple(layers))


METHOD = Method(
    name="miss",
    title="MiSS",
    source="Kang and Yin 2024, arXiv 2409.15371",
    equation="y ← y + Dᵀ Σᵢ xᵢ, the sum over pieces of r inputs",
    build=_build,
    readers=(Reader("MISS", _read, PEFT_FIELDS | MODULE_FIELDS | FIELDS),),
    mergeable=True,
    identity_at_init=True,
)
