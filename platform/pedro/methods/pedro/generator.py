"""From a pooled prompt to the vectors of one layer, as a pure function. Knows nothing of models, hooks or batches.

Shapes: B rows, D model width, R bottleneck, W all targets' widths together, m and n the orders of R(x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from pedro.methods.pedro.rational import rational

FIXED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
}
ACTIVATIONS = ("rational", *FIXED_ACTIVATIONS)


class GeneratorWeights(NamedTuple):
    """One layer's generator. Each tensor may carry a leading B, for a batch whose rows have different adapters."""

    down: torch.Tensor  # [D, R]
    up: torch.Tensor  # [R, W]
    bias: torch.Tensor  # [W]
    activation: str = "rational"
    a: torch.Tensor | None = None  # [m+1], rational only
    b: torch.Tensor | None = None  # [n], rational only


def generate_vectors(pooled: torch.Tensor, weights: GeneratorWeights) -> torch.Tensor:
    """l = R(pooled W_down) W_up + b_up (PEDRO eq. 6), in float32 whatever the model or autocast say.

    pooled [B, D] -> [B, W]. With W_up = 0 and b_up = 1 every entry is exactly 1.
    """
    with torch.autocast(device_type=pooled.device.type, enabled=False):
        hidden = (pooled.float().unsqueeze(-2) @ weights.down.float()).squeeze(-2)  # [B, R]
        if weights.activation == "rational":
            assert weights.a is not None, "a rational generator needs its a"
            assert weights.b is not None, "a rational generator needs its b"
            hidden = rational(hidden, weights.a, weights.b)
        else:
            hidden = FIXED_ACTIVATIONS[weights.activation](hidden)
        return (hidden.unsqueeze(-2) @ weights.up.float()).squeeze(-2) + weights.bias.float()
