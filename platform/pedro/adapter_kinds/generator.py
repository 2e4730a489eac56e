"""From a pooled prompt to the vectors of one layer, as a pure function, and the learnable activation R(x) on the way.

PEDRO eq. 7 (arXiv 2409.17834): R(x) = sum_{j=0..m} a_j x^j / (1 + |sum_{i=1..n} b_i x^i|), the "safe" Padé
activation unit of Molina et al. (arXiv 1907.06732): its denominator is never below 1.
Shapes: B rows, D model width, R bottleneck, W all targets' widths together, m and n the orders of R(x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
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
    function: Any = Rational
    made: torch.Tensor = function.apply(x.float(), a.float(), b.float())
    return made


class Rational(torch.autograd.Function):
    """R(x) = P(x) / (1 + |Q(x)|) with its derivatives written out: a graph of Horner's rule has 60 small steps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        above = torch.zeros_like(x)
        for j in reversed(range(a.shape[-1])):
            above.mul_(x).add_(a[..., j : j + 1])
        below = torch.zeros_like(x)
        for i in reversed(range(b.shape[-1])):
            below.add_(b[..., i : i + 1]).mul_(x)
        made = above / (1 + below.abs())
        ctx.save_for_backward(x, a, b, below, made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, below, made = ctx.saved_tensors
        m, n = a.shape[-1] - 1, b.shape[-1]
        to_above = grad / (1 + below.abs())  # [..., R]
        to_below = -to_above * made * below.sign()
        powers = x[..., None].expand(*x.shape, max(m, n)).cumprod(-1)  # x^1, x^2, … [..., R, max(m, n)]
        into_x = into_a = into_b = None
        if ctx.needs_input_grad[0]:
            lower = functional.pad(powers[..., :-1], (1, 0), value=1.0)  # x^0, x^1, …
            degrees = torch.arange(1.0, max(m, n) + 1, device=x.device)
            slope_above = (lower[..., :m] * (a[..., 1:] * degrees[:m])[..., None, :]).sum(-1)
            slope_below = (lower[..., :n] * (b * degrees[:n])[..., None, :]).sum(-1)
            into_x = to_above * slope_above + to_below * slope_below
        if ctx.needs_input_grad[1]:
            each = torch.cat([to_above[..., None], to_above[..., None] * powers[..., :m]], -1)
            into_a = each.sum(-2).sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            into_b = (to_below[..., None] * powers[..., :n]).sum(-2).sum_to_size(b.shape)
        return into_x, into_a, into_b


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
