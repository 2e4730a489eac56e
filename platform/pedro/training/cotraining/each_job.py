"""Tokens that lie job by job, each job's by its own weights. torch only.

A product for each job: nothing in one job's tokens or weights, NaN neither, enters another's numbers, forwards or back.
Written out, since autograd would keep and sum up a graph of every piece. Legend: N tokens, of each job as many as its
count says, S jobs, D width of an input, W of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def linear(x: torch.Tensor, counts: Sequence[int], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """x [N, D] by S weights [W, D]: [N, W]."""
    function: Any = _Linear
    made: torch.Tensor = function.apply(x, counts, *weights)
    return made


def scale(x: torch.Tensor, counts: Sequence[int], vectors: torch.Tensor) -> torch.Tensor:
    """x [N, W] times vectors [S, W]: [N, W], in the wider dtype."""
    function: Any = _Scale
    made: torch.Tensor = function.apply(x, counts, vectors)
    return made


def spread(counts: Sequence[int], vectors: torch.Tensor) -> torch.Tensor:
    """One of the vectors [S, W] for each token: [N, W]."""
    return torch.cat([vector.expand(count, -1) for vector, count in zip(vectors, counts, strict=True)])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: Sequence[int], *weights: torch.Tensor) -> torch.Tensor:
        ctx.counts = list(counts)
        ctx.save_for_backward(x, *weights)
        made = x.new_empty(len(x), len(weights[0]))
        for part, weight, out in zip(x.split(ctx.counts), weights, made.split(ctx.counts), strict=True):
            torch.mm(part, weight.T, out=out)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        parts, grads = x.split(ctx.counts), grad.split(ctx.counts)
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = torch.empty_like(x)
            for part, weight, out in zip(grads, weights, into_x.split(ctx.counts), strict=True):
                torch.mm(part, weight, out=out)
        into_weights = [
            part_grad.T @ part if needed else None
            for part_grad, part, needed in zip(grads, parts, ctx.needs_input_grad[2:], strict=True)
        ]
        return into_x, None, *into_weights


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: Sequence[int], vectors: torch.Tensor) -> torch.Tensor:
        ctx.counts = list(counts)
        ctx.save_for_backward(x, vectors)
        return _scaled(x, ctx.counts, vectors, torch.promote_types(x.dtype, vectors.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        x, vectors = ctx.saved_tensors
        into_x = into_vectors = None
        if ctx.needs_input_grad[0]:
            into_x = _scaled(grad, ctx.counts, vectors, grad.dtype).to(x.dtype)
        if ctx.needs_input_grad[2]:
            into_vectors = torch.stack([part.sum(0) for part in (grad * x).split(ctx.counts)])
        return into_x, None, into_vectors


def _scaled(x: torch.Tensor, counts: list[int], vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part, vector, out in zip(x.split(counts), vectors, made.split(counts), strict=True):
        torch.mul(part, vector, out=out)
    return made
