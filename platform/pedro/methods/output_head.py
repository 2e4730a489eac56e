"""Logits before supervised tokens alone: the output projection, most of a small model's work, skips all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

IGNORE = -100  # the label of a token that is not supervised, as in transformers


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of labels [B, T] come before a supervised token ([B, T], bool), and these N tokens [N]."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    positions = following != IGNORE
    return positions, following[positions]


@contextmanager
def logits_at(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Within it, a forward pass of the causal language model gives logits [1, N, V].

    They are those at the N marked `positions` ([B, T], bool), row after row. Adapters, DeepSpeed's wrapper and what a
    model does to its logits afterwards (scale, soft cap) are as without.
    """

    def choose(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs  # [B, T, d]
        return (hidden[positions][None], *rest)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()
