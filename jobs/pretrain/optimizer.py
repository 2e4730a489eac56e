"""Muon for matrices, AdamW for embeddings and norms. torch only.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/): momentum whose singular values are all brought
near 1 by five Newton-Schulz steps, so that a matrix moves equally far in every direction. torch.optim.Muon does the
same in bfloat16, which a CPU without bf16 arithmetic is slow at; here it is float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_STEPS = 5


class Muon(torch.optim.Optimizer):
    """`lr` is how far a square matrix's singular values move in a step; `weight_decay` is decoupled."""

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum", torch.zeros_like(matrix))
                average.mul_(group["momentum"]).add_(matrix.grad)
                update = orthogonal(matrix.grad + group["momentum"] * average)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1 (between 0.7 and 1.2) [n, m] -> [n, m]."""
    a, b, c = COEFFICIENTS
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x: torch.Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(NEWTON_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
