"""Bi-level training (PEDRO, section 3.4, eq. 8) as alternating first-order steps. torch only.

Ω are the generators' weights, Θ the coefficients of their activations. A step updates one of the two: only its
gradients exist, so clipping and DeepSpeed's reductions see nothing else, and only its Adam moments advance. A learning
rate of zero for the other group would not suffice, since it would still update the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

OMEGA, THETA = "omega", "theta"
Named = Sequence[tuple[str, nn.Parameter]]


class GroupedAdamW(torch.optim.AdamW):
    """AdamW with a group for Ω and one for Θ; only groups named in `active` are updated.

    Parameters of Ω selected by `is_faster` have a separate group, whose rate is Ω's times `ratio`. Groups are found by
    `role`, not by position: ZeRO passes them one at a time, with flat partitions instead of the parameters.
    """

    def __init__(
        self,
        omega: Named,
        theta: Named,
        *,
        weight_decay: float = 0.0,
        ratio: float = 1.0,
        is_faster: Callable[[str], bool] = lambda _name: False,
    ) -> None:
        faster = [p for name, p in omega if is_faster(name)]
        plain = [p for name, p in omega if not is_faster(name)]
        groups: list[dict[str, Any]] = [
            {"params": plain, "role": OMEGA, "weight_decay": weight_decay},
            {"params": faster, "role": OMEGA, "weight_decay": weight_decay, "ratio": ratio},
            {"params": [p for _, p in theta], "role": THETA, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], lr=0.0, fused=True)  # one kernel per step
        self.active: frozenset[str] = frozenset((OMEGA, THETA))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One AdamW step of the active groups, among those present now."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if group["role"] in self.active]
        try:
            return super().step(closure)
        finally:
            self.param_groups = everything

    def set_lr(self, omega: float, theta: float) -> None:
        """Set the learning rates of the next step."""
        for group in self.param_groups:
            group["lr"] = theta if group["role"] == THETA else omega * group.get("ratio", 1.0)

    def materialise(self, masters: Iterable[torch.Tensor]) -> None:
        """Create the (zero) state of every master tensor, so that checkpoints always have the same tensors."""
        for tensor in masters:
            self.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }


class Alternation:
    """Decides which parameters are trained. `requires_grad` and the optimizer's `active` change together, only here."""

    def __init__(self, optimizer: GroupedAdamW, omega: Named, theta: Named) -> None:
        self.optimizer = optimizer
        self._parameters = {OMEGA: [p for _, p in omega], THETA: [p for _, p in theta]}

    def activate(self, *roles: str) -> None:
        """Train the parameters of `roles`, and no others."""
        self.optimizer.active = frozenset(roles)
        for role, parameters in self._parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(role in roles)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then linear decay that would reach 0 after the last.

    `step` counts from 0. The rate is positive in the first and in the last step.
    """
    climb = round(warmup * steps)
    if step < climb:
        return peak * (step + 1) / (climb + 1)
    return peak * (steps - step) / max(1, steps - climb)
