"""Storage for cached blocks of keys and values, separate from the slots, and copies between the two.

Attention reads a running sequence's keys and values in its slot; a block is copied once when it is cached, and once for
each sequence that begins with it. On a CPU, pages take memory when they are first written. The prefix cache decides
which block is whose. These blocks are not those of the KV budget.
Legend: K key-value heads, P positions of all blocks, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_void_p, cast, pointer
from typing import TYPE_CHECKING

import torch

from pedro.engine import native
from pedro.engine.kv_cache import KVCache, zeros

if TYPE_CHECKING:
    from pedro.engine.kernel_threads import KernelThreads
    from pedro.engine.kv_cache import SlotCache

BLOCK = 16  # tokens per block


def block_bytes(cache: SlotCache) -> int:
    """Bytes of the keys and values of one block."""
    return cache.block_bytes * BLOCK // cache.block


class KVBlocks:
    """`count` blocks, numbered from 0: one tensor of keys and one of values per layer, [K, P, d].

    `threads`: the CPU kernel's threads used for copying; None copies with torch, on any device.
    """

    def __init__(self, cache: SlotCache, count: int, threads: KernelThreads | None = None) -> None:
        heads, length, width = cache.kv_heads, cache.length, cache.width
        shape = (heads, count * BLOCK, width)
        self._cache, self._slots = cache, [*cache.keys, *cache.values]
        size = heads * count * BLOCK * width
        self._kept = [zeros(size, cache.dtype, cache.device)[0].view(shape) for _ in self._slots]
        self._slot_size, self._width = heads * length * width, width
        self._copy = None
        if threads is not None:
            assert isinstance(cache, KVCache), "the CPU kernel does not support pages"
            self._copy = Copier(self._slots, self._kept, heads, (length * width, count * BLOCK * width), threads)

    def save(self, slot: int, first: int, places: Sequence[int]) -> None:
        """Copy the slot's blocks from number `first` on to `places`, one each."""
        start = first * BLOCK
        if self._copy is not None:
            for at, place, count in _runs(places):
                self._copy.save(self._slot_at(slot, start + at * BLOCK), *self._span(place, count))
            return
        positions = self._positions(places)
        for kept, slots in zip(self._kept, self._slots, strict=True):
            kept.index_copy_(1, positions, self._cache.get(slots, slot, start, start + len(positions)))

    def load(self, slot: int, places: Sequence[int]) -> None:
        """Copy the blocks at `places` to the slot, consecutively from its first position."""
        if self._copy is not None:
            for at, place, count in _runs(places):
                self._copy.load(self._slot_at(slot, at * BLOCK), *self._span(place, count))
            return
        positions = self._positions(places)
        for kept, slots in zip(self._kept, self._slots, strict=True):
            self._cache.put(slots, slot, 0, kept.index_select(1, positions))

    def _slot_at(self, slot: int, position: int) -> int:
        return slot * self._slot_size + position * self._width

    def _positions(self, places: Sequence[int]) -> torch.Tensor:
        """The positions of these blocks' tokens, [tokens]."""
        starts = BLOCK * torch.tensor(places, device=self._kept[0].device, dtype=torch.long)
        return (starts[:, None] + torch.arange(BLOCK, device=starts.device)).flatten()

    def _span(self, place: int, count: int) -> tuple[int, int]:
        return place * BLOCK * self._width, count * BLOCK * self._width


class Copier:
    """Copies with the CPU kernel's threads, all layers in one call, between `slots` and `kept`: equally many float32
    tensors with the same number of heads.

    `strides`: distance between heads, in floats, in a slot and in `kept`. Offsets and counts are in floats, counts per
    head.
    """

    def __init__(
        self,
        slots: list[torch.Tensor],
        kept: list[torch.Tensor],
        heads: int,
        strides: tuple[int, int],
        threads: KernelThreads,
    ) -> None:
        kernel = native.load_kernel()
        assert kernel is not None, "only used where the kernel runs"
        self._kernel, self._threads, self._count = kernel, threads, len(slots)
        self._tensors = [(c_void_p * len(slots))(*(tensor.data_ptr() for tensor in side)) for side in (slots, kept)]
        self._strides, self._heads = strides, heads

    def save(self, slot_at: int, kept_at: int, count: int) -> None:
        """From `slots` to `kept`."""
        self._run(1, kept_at, 0, slot_at, count)

    def load(self, slot_at: int, kept_at: int, count: int) -> None:
        """From `kept` to `slots`."""
        self._run(0, slot_at, 1, kept_at, count)

    def _run(self, to: int, to_at: int, source: int, source_at: int, count: int) -> None:
        copy = native.CopyStruct(
            to=cast(self._tensors[to], POINTER(c_void_p)),
            from_=cast(self._tensors[source], POINTER(c_void_p)),
            to_at=to_at,
            to_stride=self._strides[to],
            from_at=source_at,
            from_stride=self._strides[source],
            heads=self._heads,
            count=count,
        )
        self._kernel.pedro_copy(self._threads.count, self._count, pointer(copy))


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index of the first, its place, count): consecutive places are copied together."""
    start = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            yield start, places[start], at - start
            start = at
