"""MiSS, which PEFT has: its options, and its reader for the engine (Kang and Yin 2024, arXiv 2409.15371).

y ← y + D (Σ of x over its pieces of r): one matrix D [r, W] by projection, and the same piece for every r inputs, the
last filled up with zeros. That is a low-rank change of rank r whose first factor is fixed, and it is served as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import MissConfig

from pedro.adapter_kinds import Adapter, LowRank
from pedro.errors import AdapterError, BackboneError
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_share, paths_of
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
    expect(r <= model_config.hidden_size, "r", f"at most {model_config.hidden_size}, the backbone's width", r)
    expect_share("dropout", dropout)
    return MissConfig(r=r, miss_dropout=dropout, target_modules=paths_of(model_config, targets))


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
            if type(columns) is not int or columns < 1 or outputs % columns:
                raise AdapterError(f"adapter: mini_r: expected a divisor of the {outputs} outputs of {path}")
            shard = tensors.take(key, (config.r, columns)).repeat(1, outputs // columns)  # [r, W]
            inputs = input_width(block, sites, architecture.hidden_size)
            a = torch.eye(len(shard), device=shard.device).repeat(-(-inputs // len(shard)), 1)[:inputs]
            terms |= {site: LowRank(a, rows_of(shard.T, block, site).T) for site in sites}
        layers.append(terms)
    return Adapter(low_rank=tuple(layers))


METHOD = Method(
    name="miss",
    title="MiSS",
    source="Kang and Yin 2024, arXiv 2409.15371",
    equation="y ← y + D Σᵢ xᵢ, the sum over pieces of r inputs",
    build=_build,
    readers=(Reader("MISS", _read, PEFT_FIELDS | MODULE_FIELDS | FIELDS),),
    mergeable=True,
    identity_at_init=True,
)
