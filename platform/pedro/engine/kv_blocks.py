"""Room beside the slots for keys and values of blocks of tokens that are kept.

A block is copied once, when it is kept. The CPU kernel's sequences that begin with it read it where it lies
(`in_place`), and their slots have only what comes after; elsewhere it is copied into the slot of each. On a CPU, pages
take memory when they are first written. Which block is whose is decided elsewhere. These blocks are not those of the
cache's budget.
Legend: K key-value heads, P positions of all blocks, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pedro.engine.kv_cache import MARGIN, KVCache, zeros
from pedro.engine.native_blocks import NativeBlocks

if TYPE_CHECKING:
    from pedro.engine.kv_cache import SlotCache
    from pedro.engine.native_model import NativeModel

BLOCK = 16  # tokens of a block


def block_bytes(cache: SlotCache) -> int:
    """Bytes of the keys and values of one block."""
    return cache.block_bytes * BLOCK // cache.block


class KVBlocks:
    """`count` blocks, numbered from 0: one tensor of keys and one of values a layer, [K, P, d].

    `native`: the model of the CPU kernel; None is any other, on any device.
    """

    def __init__(self, cache: SlotCache, count: int, native: NativeModel | None = None) -> None:
        self._cache, self._slots = cache, [*cache.keys, *cache.values]
        shape = (cache.kv_heads, count * BLOCK, cache.width)
        size = cache.kv_heads * count * BLOCK * cache.width
        self._kept = [zeros(size + MARGIN, cache.dtype, cache.device)[0][:size].view(shape) for _ in self._slots]
        self.in_place = native is not None
        self._native = None
        if native is not None:
            assert isinstance(cache, KVCache), "the CPU kernel knows no pages"
            self._native = NativeBlocks(native, cache, self._kept)

    def save(self, slot: int, first: int, places: Sequence[int]) -> None:
        """Keep the slot's own blocks from number `first` on at `places`, one each."""
        start = first * BLOCK
        if self._native is not None:
            for at, place, count in _runs(places):
                self._native.save(slot, start + at * BLOCK, place * BLOCK, count * BLOCK)
            return
        positions = self._positions(places)
        for kept, slots in zip(self._kept, self._slots, strict=True):
            kept.index_copy_(1, positions, self._cache.get(slots, slot, start, start + len(positions)))

    def borrow(self, slot: int, places: Sequence[int]) -> None:
        """Have the slot's sequence begin with the blocks at `places`, one after the other: it reads them in place, and
        its own positions come after. Whoever calls sees to it that they stay until it borrows others, or none."""
        assert self._native is not None, "nothing else reads in place"
        spans = ((place * BLOCK, count * BLOCK) for _, place, count in _runs(places))
        self._cache.borrowed[slot] = self._native.borrow(slot, spans)

    def load(self, slot: int, places: Sequence[int]) -> None:
        """Write the blocks at `places`, one after the other, from the slot's first position on."""
        positions = self._positions(places)
        for kept, slots in zip(self._kept, self._slots, strict=True):
            self._cache.put(slots, slot, 0, kept.index_select(1, positions))

    def _positions(self, places: Sequence[int]) -> torch.Tensor:
        """Where the tokens of these blocks stand, [tokens]."""
        starts = BLOCK * torch.tensor(places, device=self._kept[0].device, dtype=torch.long)
        return (starts[:, None] + torch.arange(BLOCK, device=starts.device)).flatten()


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, its place, how many): places that follow one another are one piece."""
    start = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            yield start, places[start], at - start
            start = at
