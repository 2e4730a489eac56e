"""Room beside the slots for keys and values of blocks of tokens that are kept.

A block is copied once, when it is kept. The CPU kernel's sequences that begin with it read it where it lies
(`in_place`), and their slots have only what comes after; elsewhere, and where they may not, it is copied into the slot
of each. On a CPU, pages take memory when they are first written. Which block is whose is decided elsewhere. These
blocks are not those of the cache's budget.
Legend: K key-value heads, P positions of all blocks, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ctypes import POINTER, c_void_p, cast, pointer
from typing import TYPE_CHECKING, Any

import torch

from pedro.engine import native
from pedro.engine.kv_cache import MARGIN, KVCache, zeros

if TYPE_CHECKING:
    from pedro.engine.kv_cache import SlotCache
    from pedro.engine.native_model import NativeModel

BLOCK = 16  # tokens of a block
Span = tuple[int, int]  # the first of some positions that follow one another among the kept, and how many


def block_bytes(cache: SlotCache) -> int:
    """Bytes of the keys and values of one block."""
    return cache.block_bytes * BLOCK // cache.block


class KVBlocks:
    """`count` blocks, numbered from 0: one tensor of keys and one of values a layer, [K, P, d].

    `model`: the CPU kernel's; None is any other, on any device.
    """

    def __init__(self, cache: SlotCache, count: int, model: NativeModel | None = None) -> None:
        self._cache, self._slots = cache, [*cache.keys, *cache.values]
        shape = (cache.kv_heads, count * BLOCK, cache.width)
        size = cache.kv_heads * count * BLOCK * cache.width
        self._kept = [zeros(size + MARGIN, cache.dtype, cache.device)[0][:size].view(shape) for _ in self._slots]
        self.in_place = model is not None
        self._native = None
        if model is not None:
            assert isinstance(cache, KVCache), "the CPU kernel knows no pages"
            self._native = NativeBlocks(model, cache, self._kept)

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
        """Write the blocks at `places`, one after the other, from the slot's first own position on."""
        positions = self._positions(places)
        for kept, slots in zip(self._kept, self._slots, strict=True):
            self._cache.put(slots, slot, 0, kept.index_select(1, positions))

    def _positions(self, places: Sequence[int]) -> torch.Tensor:
        """Where the tokens of these blocks stand, [tokens]."""
        starts = BLOCK * torch.tensor(places, device=self._kept[0].device, dtype=torch.long)
        return (starts[:, None] + torch.arange(BLOCK, device=starts.device)).flatten()


class NativeBlocks:
    """Kept blocks as the CPU kernel has them: it copies what is kept out of slots, and reads it where it lies. `kept`:
    float32 tensors [K, P, d], a layer each: of the keys, and then of the values."""

    def __init__(self, model: NativeModel, cache: KVCache, kept: list[torch.Tensor]) -> None:
        kernel = native.load_kernel()
        assert kernel is not None, "asked for only where the kernel runs"
        self._kernel, self._threads = kernel, model.threads
        slots = [*cache.keys, *cache.values]
        self._tensors = [(c_void_p * len(slots))(*(tensor.data_ptr() for tensor in side)) for side in (kept, slots)]
        self._heads, positions, self._width = kept[0].shape
        self._strides = positions * self._width, cache.length * self._width  # floats from a head to the next
        self._kept = kept  # the kernel points at them
        self._written = 0  # positions from here on were never written
        half = len(cache.keys)
        for number, (keys, values) in enumerate(zip(kept[:half], kept[half:], strict=True)):
            layer = model.struct.layer[number]
            layer.kept_keys, layer.kept_values = keys.data_ptr(), values.data_ptr()
        self._borrowed = (native.BorrowedStruct * len(cache.lengths))()
        self._spans: list[Any] = [None] * len(cache.lengths)
        model.struct.kept, model.struct.borrowed = positions, self._borrowed

    def save(self, slot: int, position: int, place: int, count: int) -> None:
        """Copy `count` of the slot's own positions, from `position` on, to those from `place` on among the kept: of all
        layers in one call."""
        copy = native.CopyStruct(
            to=cast(self._tensors[0], POINTER(c_void_p)),
            from_=cast(self._tensors[1], POINTER(c_void_p)),
            to_at=place * self._width,
            to_stride=self._strides[0],
            from_at=slot * self._heads * self._strides[1] + position * self._width,
            from_stride=self._strides[1],
            heads=self._heads,
            count=count * self._width,
            fresh=place + count > self._written,
        )
        self._written = max(self._written, place + count)
        self._kernel.pedro_copy(self._threads.count, len(self._tensors[0]), pointer(copy))

    def borrow(self, slot: int, spans: Iterable[Span]) -> int:
        """Have the slot's first positions be these, until others are named. Gives how many those are."""
        made = [native.SpanStruct(*span) for span in spans]
        one, self._spans[slot] = self._borrowed[slot], (native.SpanStruct * len(made))(*made)
        one.count, one.spans, one.span = sum(span.count for span in made), len(made), self._spans[slot]
        return int(one.count)


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, its place, how many): places that follow one another are one piece."""
    start = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            yield start, places[start], at - start
            start = at
