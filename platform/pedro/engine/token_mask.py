"""What holds an answer's tokens to a shape. Which shape, and how it is read, is the caller's: the engine knows tokens.

Legend: R rows, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
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


def allowed(masks: list[torch.Tensor], vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [R, V], where the masks [W] let a token through; nothing past their ends."""
    words = torch.stack(masks)
    if device.type != "cpu":
        return allowed_by_shifts(words.to(device), vocabulary)
    octets = words.view(torch.uint8).numpy()
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=vocabulary, bitorder="little")).view(torch.bool)


def allowed_by_shifts(words: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The same of words [R, W] where they are, by torch alone."""
    let = (words[:, :, None] >> torch.arange(32, device=words.device) & 1).bool().flatten(1)[:, :vocabulary]
    return torch.nn.functional.pad(let, (0, vocabulary - let.shape[1]))
