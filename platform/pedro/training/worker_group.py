"""Communication between workers: sums, broadcasts from rank 0, and whether any failed. torch only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pedro.errors import PedroError

Made = TypeVar("Made")


@dataclass(frozen=True)
class WorkerGroup:
    """All workers of a run; with a single worker, every method is a no-op."""

    rank: int = 0
    world: int = 1

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over the workers, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device())
        torch.distributed.all_reduce(total)
        return total.tolist()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcast rank 0's `tensor` into this one."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """Every worker's `value`, in rank order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, act: Callable[[], Made]) -> Made:
        """This worker's `act()`; a PedroError on any worker is raised on all of them, so that none waits forever.

        `act` must not communicate with other workers.
        """
        failure: PedroError | None = None
        try:
            made = act()
        except PedroError as error:
            failure = error
        for other in self.gather(failure):
            if other is not None:
                raise other
        return made

    @staticmethod
    def _device() -> str:
        return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


ALONE = WorkerGroup()
