"""Restricts an answer's tokens to a shape. The caller defines the shape and parses it; the engine only sees tokens.

Legend: R rows, W words of 32 bits, V vocabulary.
"""

from __future__ import annotations

import math
from ctypes import c_int, c_void_p
from typing import Protocol

import numpy as np
import torch

from pedro.engine.native import load_kernel


class TokenMask(Protocol):
    """The mask of one answer, from its first token on. Called by one thread at a time."""

    def bits(self) -> torch.Tensor:
        """Which tokens may come next: int32 [W] on the CPU, token t is bit t % 32 of word t // 32.

        Valid until the next call. Raises PedroError if that exceeds its limits, which ends the answer.
        """
        ...

    def lets(self, token_id: int) -> bool:
        """Whether this token may come next, cheaper than `bits`. False if unknown: then use `bits`."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance by the chosen token; True if the answer is complete and nothing can follow."""
        ...


def likeliest(logits: torch.Tensor, rows: list[int], masks: list[torch.Tensor], native: bool = False) -> list[int]:
    """For each of `rows` of logits [R, V] the likeliest token that its mask [W] allows; -1 if that is not finite.
    `native`: use the CPU kernel, which made the logits."""
    kernel = load_kernel() if native else None
    if kernel is None:
        values, tokens = logits[rows].masked_fill(~allowed(masks, logits.shape[-1], logits.device), -math.inf).max(-1)
        finite = values.isfinite().tolist()
        return [token if good else -1 for token, good in zip(tokens.tolist(), finite, strict=True)]
    count, start, step = len(rows), logits.data_ptr(), logits.stride(0) * logits.element_size()
    found = (c_int * count)()
    of_rows = (c_void_p * count)(*(start + row * step for row in rows))
    of_masks = (c_void_p * count)(*(mask.data_ptr() for mask in masks))
    kernel.pedro_likeliest(count, of_rows, of_masks, len(masks[0]), logits.shape[-1], found)
    return list(found)


def allowed(masks: list[torch.Tensor], vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [R, V]: True where the masks [W] allow a token; False past their ends."""
    words = torch.stack(masks)
    if device.type != "cpu":
        return allowed_by_shifts(words.to(device), vocabulary)
    octets = words.view(torch.uint8).numpy()
    return torch.from_numpy(np.unpackbits(octets, axis=1, count=vocabulary, bitorder="little")).view(torch.bool)


def allowed_by_shifts(words: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The same for words [R, W] on their device, with torch."""
    let = (words[:, :, None] >> torch.arange(32, device=words.device) & 1).bool().flatten(1)[:, :vocabulary]
    return torch.nn.functional.pad(let, (0, vocabulary - let.shape[1]))
