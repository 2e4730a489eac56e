"""A linear layer whose weight is frozen and sharded (ZeRO-3): for its backward pass it keeps neither weight nor input.

DeepSpeed's own keeps the input, of which only the gradient of a weight that is trained has use. Imports no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

Linear = Callable[..., torch.Tensor]


class FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b, with the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight  # the parameter, whose numbers come and go, and no tensor that would hold them here
        made: torch.Tensor = torch._C._nn.linear(x, weight, bias)  # PyTorch's own, which has another in its place
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        weight = ctx.weight
        away = weight.ds_status.name == "NOT_AVAILABLE"
        if away:
            weight.all_gather()
        try:
            return gradient @ weight, None, None
        finally:
            if away:
                weight.partition()


class ShardedLinear:
    """PyTorch's `linear` under ZeRO-3: `FrozenLinear` where it will do, else what was there before."""

    def __init__(self, before: Linear) -> None:
        self._before = before

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        frozen = hasattr(weight, "ds_id") and not weight.requires_grad and (bias is None or not bias.requires_grad)
        function: Any = FrozenLinear
        made: torch.Tensor = function.apply(x, weight, bias) if frozen else self._before(x, weight, bias)
        return made


def use_frozen_linear() -> None:
    """Have PyTorch's linear layers of this process use it, once; DeepSpeed has put its own in the same place."""
    module: Any = functional
    if not isinstance(module.linear, ShardedLinear):
        module.linear = ShardedLinear(module.linear)
