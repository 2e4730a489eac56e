"""What a method may do between the steps of a run, if its adapter changes shape while it trains.

Most methods need none. AdaLoRA prunes ranks and the sparse structure search decides what to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class TrainingHook(Protocol):
    """Accompanies one training run of one model; every worker has its own and all do the same."""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss of a batch, or nothing."""

    def after_step(self, step: int) -> None:
        """Act after the `step`-th step, counted from 1, has moved the parameters."""

    def settled(self, step: int) -> bool:
        """Whether the adapter has its final shape after `step` steps: only then may a validation be the best."""

    def finish(self) -> None:
        """Take off what the training needed and the adapter does not; called once, with the best parameters in."""

    def kept(self) -> int:
        """How many of the trained parameters the saved adapter has."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs to continue as if it had never stopped."""

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
