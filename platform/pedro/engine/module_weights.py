"""What the CPU kernel takes out of a transformers model: weights, biases, norms, rotations, windows.

Legend: W output width, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def rotations(decoder: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotary width] of every position, computed by the model itself."""
    at = torch.arange(length)[None]
    cos, sin = decoder.rotary_emb(torch.zeros(1, length, 1), position_ids=at)
    return cos[0].float(), sin[0].float()


def norm_factor(module: nn.Module) -> torch.Tensor:
    """The factor of an RMS norm; Gemma stores it minus one."""
    weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
    return weight + 1 if type(module).__name__.startswith("Gemma") else weight


def weights_of(site: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [W, K] and bias [W] of a projection, cut out of a fused one."""
    weight, bias = own_weights(site.module)
    rows = slice(None) if site.rows is None else site.rows
    return weight[rows], None if bias is None else bias[rows]


def own_weights(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a module."""
    bias = module.bias
    return module.weight.data, None if bias is None else bias.data


def window(attention: Any) -> int:
    """How many positions a token sees; 0 for all. Mistral and Phi-3 only set it in their config."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    config = attention.config
    return getattr(config, "sliding_window", None) or 0 if config.model_type in ("mistral", "phi3") else 0


def release(module: nn.Module) -> None:
    """Free a module's weights once they are packed."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
