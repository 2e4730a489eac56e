"""A backbone's projection whose frozen weight is held in 8 or 4 bit, and is whole only while it is used.

The product is torch's own, with the weight that was read back. Gradients reach the input and the bias alone. No library
stands behind it: PEFT imports bitsandbytes into every process where that is installed. Knows no adapters, no files.
Shapes: W outputs and D inputs of a projection; N blocks of 64 numbers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

KINDS = ("int8", "nf4")
BLOCK = 64  # numbers of nf4 that share a scale, as in QLoRA
AT_ONCE = 2**16  # blocks that are quantised in one go, which takes several times their memory
TINY = 1e-38  # in place of the scale of a block of zeros
NF4 = (  # quantiles of the normal distribution, 0 among them: Dettmers et al. 2023, arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class HeldWeight(NamedTuple):
    """A weight in few bits. int8: [W, D] and float32 scales [W, 1]; nf4: two numbers a byte [N, 32], scales [N, 1]."""

    numbers: torch.Tensor
    scales: torch.Tensor


def hold_weight(weight: torch.Tensor, kind: str) -> HeldWeight:
    """weight [W, D] -> int8, where the largest of a row is 127, or NF4 (QLoRA, section 3) in blocks along the rows."""
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True).float() / 127
        return HeldWeight((weight / scales.clamp_min(TINY)).round().to(torch.int8), scales)
    flat = weight.reshape(-1)
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    parts = [_to_nf4(part.float()) for part in blocks.split(AT_ONCE)]
    return HeldWeight(torch.cat([part.numbers for part in parts]), torch.cat([part.scales for part in parts]))


def _to_nf4(blocks: torch.Tensor) -> HeldWeight:
    """blocks [N, 64] -> the nearest levels of each number."""
    levels = torch.tensor(NF4, device=blocks.device)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / scales.clamp_min(TINY), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return HeldWeight(nearest[:, ::2] << 4 | nearest[:, 1::2], scales)


def whole_weight(held: HeldWeight, shape: tuple[int, int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """What `hold_weight` kept of a weight, [W, D]."""
    if kind == "int8":
        return held.numbers.float().mul_(held.scales).to(dtype)
    pairs = _pairs(held.numbers.device).index_select(0, held.numbers.view(-1).int())
    blocks = pairs.view(torch.float32).view(-1, BLOCK).mul_(held.scales)
    return blocks.view(-1)[: math.prod(shape)].view(shape).to(dtype)


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two numbers of each byte [256], side by side in one of twice the width: half as much is looked up."""
    levels = torch.tensor(NF4, device=device)
    return torch.cartesian_prod(levels, levels).view(torch.float64).view(-1)


def held_bytes(shape: tuple[int, int], kind: str) -> int:
    """Bytes of a weight [W, D], scales included."""
    count = math.prod(shape)
    return count + 4 * shape[0] if kind == "int8" else -(-count // BLOCK) * (BLOCK // 2 + 4)


class _Product(torch.autograd.Function):
    """x [..., D] -> x Wᵀ [..., W]. Nothing is kept for the way back: the weight is read again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projection: QuantisedProjection) -> torch.Tensor:
        ctx.projection = projection
        return functional.linear(x, projection.whole(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.projection.whole(gradient.dtype), None


class QuantisedProjection(nn.Module):
    """What both forms of a projection share. `weight` is read back for whoever asks; what is written to it is lost."""

    def _take(self, weight: torch.Tensor, bias: nn.Parameter | None, kind: str) -> None:
        """Hold a weight [W, D]."""
        self.kind, self._shape, self._dtype = kind, (weight.shape[0], weight.shape[1]), weight.dtype
        held = hold_weight(weight.detach(), kind)
        self.numbers = nn.Parameter(held.numbers, requires_grad=False)
        self.scales = nn.Parameter(held.scales, requires_grad=False)
        self.register_parameter("bias", bias)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [W, D]."""
        return whole_weight(HeldWeight(self.numbers, self.scales), self._shape, self.kind, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., W]."""
        product: Any = _Product
        bias: Any = self.bias
        made: torch.Tensor = product.apply(x, self)
        return made if bias is None else made + bias


class QuantisedLinear(QuantisedProjection, nn.Linear):
    """In place of a linear."""

    weight: Any = property(lambda self: self.whole(self._dtype), doc="[W, D], as the backbone computes.")

    def __init__(self, module: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self._take(module.weight, module.bias, kind)


class QuantisedConv1D(QuantisedProjection, Conv1D):
    """In place of what GPT-2 has for linears."""

    weight: Any = property(lambda self: self.whole(self._dtype).T, doc="[D, W], as the backbone computes.")

    def __init__(self, module: Conv1D, kind: str) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = module.nf, module.nx
        self._take(module.weight.T, module.bias, kind)


def quantised(module: nn.Linear | Conv1D, kind: str) -> QuantisedProjection:
    """A projection with the same weight in few bits, and the same bias."""
    return QuantisedConv1D(module, kind) if isinstance(module, Conv1D) else QuantisedLinear(module, kind)
