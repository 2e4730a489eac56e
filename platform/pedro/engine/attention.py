"""Attention of a packed batch over the KV cache, as transformers' modules call it.

A step is passed where transformers expects a cache (`update`), and `attend` is registered as an attention function, so
a model's own modules run on a batch of any rows, packed without padding as [1, N, D].
Legend: N tokens of the packed batch, B rows, H query heads, K key-value heads, G = H / K, d head width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from pedro.engine.kv_cache import SlotCache
    from pedro.engine.modulation import Segment

NAME = "pedro_engine"
_current = threading.local()


class PrefillStep:
    """Prompts: each row attends only to itself, causally; its keys and values are written to its slot.

    `begins`: the position of each row's first token; earlier positions are already in the slot.
    """

    def __init__(self, cache: SlotCache, segments: list[Segment], begins: list[int]) -> None:
        self.segments = segments
        self._begins = begins
        self._cache = cache

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [1, K, N, d]."""
        for segment, begin in zip(self.segments, self._begins, strict=True):
            span = slice(segment.start, segment.stop)
            self._cache.fill(layer, segment.slot, keys[0, :, span], values[0, :, span], begin)
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        """What transformers asks of a cache; positions are always given, so that nothing depends on it."""
        return 0

    def attend(
        self,
        module: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Queries [1, H, N, d] → [1, N, H, d]."""
        out = torch.empty_like(queries)
        for segment, begin in zip(self.segments, self._begins, strict=True):
            span, length = slice(segment.start, segment.stop), begin + segment.stop - segment.start
            seen = keys[:, :, span], values[:, :, span]
            if begin:
                seen = self._cache.read_slot(module.layer_idx, segment.slot, length)
            mask = None
            if begin or (window is not None and length > window):
                at = torch.arange(length, device=queries.device)
                own = at[begin:, None]
                mask = at[None, :] <= own
                if window is not None:
                    mask &= at[None, :] > own - window
            out[:, :, span] = _attention(queries[:, :, span], *seen, mask, mask is None, scaling, softcap)
        return out.transpose(1, 2)


class DecodeStep:
    """One new token per row, which attends to its slot up to its own position. Rows may share a slot, at different
    positions."""

    def __init__(self, cache: SlotCache, slots: list[int], positions: list[int], device: torch.device) -> None:
        self.slot_ids = slots
        self.slots = torch.tensor(slots, device=device)
        self.positions = torch.tensor(positions, device=device)
        self._cache = cache
        self._length = max(positions) + 1
        self._reach = max(slots) + 1
        # If the slots are dense, rows are read in place; idle slots in between only cost attention.
        self.dense = self._reach == len(slots) and slots == list(range(self._reach))
        apart = len(set(slots)) == len(slots)
        self._scattered = apart and not self.dense and self._reach <= 2 * len(slots)
        self._rows: int | torch.Tensor = self._reach if self.dense or self._scattered else self.slots
        self._masks: dict[int | None, torch.Tensor] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [1, K, B, d]; returns those of all positions, [rows, K, T, d]."""
        self._cache.append(layer, self.slots, self.positions, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        return self._cache.read(layer, self._rows, self._length)

    def of_slots(self, buffer: torch.Tensor) -> torch.Tensor:
        """The rows [B, W] that belong to this step's slots, of a buffer [S, W]."""
        return buffer[: len(self.slot_ids)] if self.dense else buffer.index_select(0, self.slots)

    def get_seq_length(self, layer: int = 0) -> int:
        """What transformers asks of a cache; positions are always given, so that nothing depends on it."""
        return self._length - 1

    def attend(
        self,
        module: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Queries [1, H, B, d] → [1, B, H, d]; the G queries of a key-value head are treated as positions."""
        _, heads, batch, width = queries.shape
        rows = queries[0].transpose(0, 1).reshape(batch, keys.shape[1], -1, width)  # [B, K, G, d]
        if self._scattered:
            rows = rows.new_zeros(self._reach, *rows.shape[1:]).index_copy_(0, self.slots, rows)
        out = masked_attention(rows, keys, values, self._mask(window), scaling, softcap)
        if self._scattered:
            out = out.index_select(0, self.slots)
        return out.reshape(1, batch, heads, width)

    def _mask(self, window: int | None) -> torch.Tensor:
        """[rows, 1, 1, T]: True where a position is visible. An idle slot sees its first position."""
        if window not in self._masks:
            at = torch.arange(self._length, device=self.positions.device)
            last = self.positions
            if self._scattered:
                last = last.new_zeros(self._reach).index_copy_(0, self.slots, last)
            mask = at[None, :] <= last[:, None]
            if window is not None:
                mask &= at[None, :] > last[:, None] - window
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


def masked_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: Any,
    softcap: float | None,
) -> torch.Tensor:
    """Queries [B, K, G, d] over keys and values [B, K, T, d], masked by `mask` [B, 1, 1, T]."""
    return _attention(queries, keys, values, mask, False, scaling, softcap)


def _attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: Any,
    causal: bool,
    scaling: Any,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [B, H, n, d] × [B, K, m, d]; `softcap` is computed explicitly, since SDPA has none."""
    grouped = queries.shape[1] != keys.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.tanh(queries @ keys.transpose(-1, -2) * (scaling / softcap)) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores.float(), -1).to(values.dtype) @ values


@contextmanager
def attending(step: PrefillStep | DecodeStep) -> Iterator[None]:
    """Within this context, attention on this thread uses `step`."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def attend(  # noqa: PLR0913 - as transformers calls it
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers as `NAME`. Only the step provides masks."""
    assert attention_mask is None, "the engine's attention takes no mask"
    assert s_aux is None, "attention sinks are refused when the engine starts"
    step = _current.step
    assert step is not None, "a model that an engine owns is run by that engine only"
    return step.attend(module, query, key, value, scaling, sliding_window, softcap), None


def register() -> None:
    """Register `attend` with transformers, without a mask function, so that models build no masks."""
    AttentionInterface.register(NAME, attend)
