"""From a pooled prompt to the vectors of one layer, as a pure function, and the learnable activation R(x) on the way.

PEDRO eq. 7 (arXiv 2409.17834): R(x) = sum_{j=0..m} a_j x^j / (1 + |sum_{i=1..n} b_i x^i|), the "safe" Padé
activation unit of Molina et al. (arXiv 1907.06732): its denominator is never below 1.
Shapes: B rows, D model width, R bottleneck, W all targets' widths together, m and n the orders of R(x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

FIXED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
}
ACTIVATIONS = ("rational", *FIXED_ACTIVATIONS)


def rational(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """R(x) in float32, by Horner's rule.

    x [..., R]; a [m+1] and b [n] for one activation, or [B, m+1] and [B, n] for one a row of x [B, R].
    """
    x, a, b = x.float(), a.float(), b.float()
    above = torch.zeros_like(x)
    for j in reversed(range(a.shape[-1])):
        above = above * x + a[..., j : j + 1]
    below = torch.zeros_like(x)
    for i in reversed(range(b.shape[-1])):
        below = (below + b[..., i : i + 1]) * x
    return above / (1 + below.abs())


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
