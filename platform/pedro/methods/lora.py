"""LoRA, which PEFT has: its options, and its reader for the engine.

An activated LoRA (aLoRA, arXiv 2504.12397) acts from its invocation tokens on: where they last begin in the prompt. In
a prompt without them it does nothing, nor in its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from pedro.adapter_kinds import Adapter, LowRank
from pedro.errors import AdapterError
from pedro.methods.config_check import wrong_invocation
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect_count, expect_share, paths_of
from pedro.methods.reader import (
    LORA_FIELDS,
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


def _build(
    model_config: ModelConfig, *, r: int = 8, alpha: int = 16, dropout: float = 0.0, targets: Targets = None
) -> LoraConfig:
    expect_count("r", r)
    expect_count("alpha", alpha)
    expect_share("dropout", dropout)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=paths_of(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _read(config: LoraConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """A and B of each module as PEFT saves them, alpha over the rank folded into B."""
    rank = config.r
    scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
    layers = []
    for block in architecture.layers:
        terms: dict[str, LowRank] = {}
        for path, sites in sites_by_module(block).items():
            prefix = f"{ROOT}{block.name}.{path}.lora_"
            if f"{prefix}A.weight" not in tensors:
                continue
            inputs = input_width(block, sites, architecture.hidden_size)
            a = tensors.take(f"{prefix}A.weight", (rank, inputs)).T
            outputs = sum(block.linears[site].width for site in sites)
            b = tensors.take(f"{prefix}B.weight", (outputs, rank)) * scaling
            terms |= {site: LowRank(a, rows_of(b, block, site).T) for site in sites}
        layers.append(terms)
    decoder: Any = architecture.decoder
    if wrong := wrong_invocation(config, decoder.get_input_embeddings().num_embeddings):
        raise AdapterError(f"adapter: {wrong}")
    tokens = config.alora_invocation_tokens
    return Adapter(low_rank=tuple(layers), start=None if tokens is None else partial(_invoked_at, tokens))


def _invoked_at(invocation: list[int], prompt_ids: Sequence[int], _conditioning_length: int) -> int | None:
    """The last place in a prompt where the invocation begins, as PEFT's `calculate_alora_offsets` finds it."""
    size = len(invocation)
    starts = range(len(prompt_ids) - size, -1, -1)
    return next((at for at in starts if list(prompt_ids[at : at + size]) == invocation), None)


METHOD = Method(
    name="lora",
    title="LoRA",
    source="Hu et al. 2021, arXiv 2106.09685",
    equation="y ← y + (α/r) B A x",
    build=_build,
    readers=(
        Reader("LORA", _read, PEFT_FIELDS | MODULE_FIELDS | LORA_FIELDS | {"use_rslora", "alora_invocation_tokens"}),
    ),
    mergeable=True,
    identity_at_init=True,
    paper={"r": 4},
)
