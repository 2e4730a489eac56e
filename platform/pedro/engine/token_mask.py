"""What holds an answer's tokens to a shape. Which shape, and how it is read, is the caller's: the engine knows tokens.

Legend: R rows, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

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


def barred(masks: list[torch.Tensor], vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [R, V]: which tokens each of the masks [W] leaves out. What lies past a mask's end is left out too."""
    octets = torch.stack(masks).view(torch.uint8).to(device).int()  # [R, 4 W]
    out = _unset(device)[octets].reshape(len(masks), -1)  # [R, 32 W]
    missing = vocabulary - out.shape[1]
    return torch.nn.functional.pad(out, (0, missing), value=True) if missing > 0 else out[:, :vocabulary]


@cache
def _unset(device: torch.device) -> torch.Tensor:
    """bool [256, 8]: of each byte, which bits are 0, the lowest first."""
    values, places = torch.arange(256, device=device), torch.arange(8, device=device)
    return (values[:, None] >> places & 1) == 0
