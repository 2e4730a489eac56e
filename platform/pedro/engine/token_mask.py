"""What holds an answer's tokens to a shape. Which shape, and how it is read, is the caller's: the engine knows tokens.

Legend: R rows, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Protocol

import torch


class TokenMask(Protocol):
    """Of one answer, from its first token on. Called by one thread at a time."""

    def bits(self) -> torch.Tensor:
        """Which tokens may come next: int32 [W] on the CPU, token t is bit t % 32 of word t // 32.

        Valid until the next call. Raises PedroError where that takes more than it may: the answer ends with it.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; True where the answer is whole and nothing can follow."""
        ...


def bias(masks: list[torch.Tensor], vocabulary: int, device: torch.device) -> torch.Tensor:
    """float32 [R, V] to add to scores: 0 for what the masks [W] let through, else -inf, also past their ends."""
    octets = torch.stack(masks).view(torch.uint8).reshape(-1).to(device).int()  # [R · 4 W]
    made = _bias_of_octets(device).index_select(0, octets).reshape(len(masks), -1)  # [R, 32 W]
    missing = vocabulary - made.shape[1]
    return torch.nn.functional.pad(made, (0, missing), value=-math.inf) if missing > 0 else made[:, :vocabulary]


@cache
def _bias_of_octets(device: torch.device) -> torch.Tensor:
    """float32 [256, 8]: of each byte, the bias of its bits, the lowest first."""
    values, places = torch.arange(256, device=device), torch.arange(8, device=device)
    return torch.where((values[:, None] >> places & 1) == 0, -math.inf, 0.0)
