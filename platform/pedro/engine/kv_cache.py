"""Keys and values of running sequences, within a budget of blocks that slots take as their sequences grow.

`KVCache`: each slot reserves addresses for all its positions, so that attention reads them contiguously. On a CPU a
block takes physical memory when it is first written, until that is released. `PagedKVCache`, for CUDA: blocks are pages
of a pool, found through a table.

The scheduler decides who owns a slot and whether another sequence fits. A released slot keeps its blocks until others
need them, so that its next sequence finds memory already allocated.
Legend: S slots, K key-value heads, T positions, d head width, N tokens of a packed batch, B rows.
"""

from __future__ import annotations

import math
import mmap
import sys
from abc import ABC, abstractmethod

import torch

from pedro.engine import huge_pages

PAGE = 256  # positions per page
LEAST_BLOCK = 16  # positions per block, at least
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # reserves addresses, not memory
HUGE_BYTES = 256 << 20  # of a cache in huge pages, at most
MARGIN = 64  # elements past the end: the CPU kernel reads whole SIMD vectors and ignores the excess


class SlotCache(ABC):
    """Base of both forms: how many blocks each slot has, and reading and writing of spans."""

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int,
    ) -> None:
        self.kv_heads, self.width, self.dtype, self.device = kv_heads, head_dim, dtype, device
        self.block = block  # positions
        self.blocks_per_slot = -(-length // block)
        self.length = self.blocks_per_slot * block  # per slot
        self.block_bytes = 2 * num_layers * kv_heads * block * head_dim * dtype.itemsize
        self.blocks = self._free = slots * self.blocks_per_slot
        self.lengths = [0] * slots  # positions used by each slot's sequence, 0 after its end; set by the runner
        self.room = [0] * slots  # positions with memory, perhaps from an earlier sequence; `grow` adds more
        self.borrowed = [0] * slots  # positions read in cached blocks; all other positions here count from the next one
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values with all blocks in use."""
        return self.blocks * self.block_bytes

    def grow(self, slot: int) -> None:
        """Allocate memory for the slot's `lengths`. Raises RuntimeError if all blocks are in use."""
        held, wanted = self.room[slot] // self.block, -(-self.lengths[slot] // self.block)
        if wanted - held > self._free:
            self._take_back(wanted - held)
        self._map(slot, held, wanted)
        self._free -= wanted - held
        self.room[slot] = wanted * self.block

    def fill(self, layer: int, slot: int, keys: torch.Tensor, values: torch.Tensor, begin: int = 0) -> None:
        """Write keys and values [K, n, d] of a prompt to n positions of the slot, from `begin` on."""
        self.put(self.keys[layer], slot, begin, keys)
        self.put(self.values[layer], slot, begin, values)

    def read_slot(self, layer: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions of one slot, [1, K, length, d]."""
        return self.get(self.keys[layer], slot, 0, length)[None], self.get(self.values[layer], slot, 0, length)[None]

    def spread(self, source: int, targets: list[int], length: int, start: int = 0) -> None:
        """Give each target slot the positions [start, length) of `source`, as its first."""
        for tensor in (*self.keys, *self.values):
            shared = self.get(tensor, source, start, length)
            for target in targets:
                self.put(tensor, target, 0, shared)

    def wipe(self, slot: int, length: int | None = None, start: int = 0) -> None:
        """Zero a slot, or its positions [start, length), that may contain non-finite numbers: even masked out, these
        would corrupt later results."""
        stop = self.room[slot] if length is None else min(length, self.room[slot])
        if start < stop:
            nothing = torch.zeros(self.kv_heads, stop - start, self.width, dtype=self.dtype, device=self.device)
            for tensor in (*self.keys, *self.values):
                self.put(tensor, slot, start, nothing)

    @abstractmethod
    def limit(self, blocks: int) -> None:
        """Limit the cache to `blocks`; called before any is used."""

    @abstractmethod
    def append(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write one position of each row: keys and values [B, K, d] at `positions` [B] of `slots` [B]."""

    @abstractmethod
    def read(self, layer: int, rows: int | torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions, [B, K, length, d], of the first `rows` slots or of the slots given."""

    @abstractmethod
    def get(self, tensor: torch.Tensor, slot: int, start: int, stop: int) -> torch.Tensor:
        """Positions [start, stop) of a slot in one of `keys` or `values`: [K, n, d]."""

    @abstractmethod
    def put(self, tensor: torch.Tensor, slot: int, start: int, given: torch.Tensor) -> None:
        """Write [K, n, d] to the slot's positions from `start` on, in one of `keys` or `values`."""

    @abstractmethod
    def move(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Simultaneously give each target slot the positions [start, stop) of its source."""

    @abstractmethod
    def _map(self, slot: int, low: int, high: int) -> None:
        """Allocate memory for the slot's blocks [low, high)."""

    @abstractmethod
    def _unmap(self, slot: int, low: int, high: int) -> None:
        """Free their memory."""

    def _take_back(self, missing: int) -> None:
        """Reclaim blocks that earlier sequences left in their slots, until `missing` are free."""
        for slot in reversed(range(len(self.room))):  # low slots are assigned first
            used, held = -(-self.lengths[slot] // self.block), self.room[slot] // self.block
            if held > used:
                self._unmap(slot, used, held)
                self.room[slot] = used * self.block
                self._free += held - used
                if self._free >= missing:
                    return
        raise RuntimeError(f"all {self.blocks} blocks of the KV cache are in use")


class KVCache(SlotCache):
    """One tensor of keys and one of values per layer, [S, K, T, d], head-major in memory."""

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._row_bytes = head_dim * dtype.itemsize
        block = max(LEAST_BLOCK, mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes))  # whole pages of a head
        super().__init__(num_layers, slots, kv_heads, length, head_dim, dtype, device, block)
        shape = (slots, kv_heads, self.length, head_dim)
        self._maps: list[mmap.mmap] = []
        for tensors in (self.keys, self.values):
            for _ in range(num_layers):
                tensor, pages = zeros(math.prod(shape) + MARGIN, dtype, device)
                tensors.append(tensor[: math.prod(shape)].view(shape))
                self._maps += [pages] if pages is not None else []

    def limit(self, blocks: int) -> None:
        self.blocks = self._free = min(blocks, self.blocks)
        whole = self.blocks == len(self.room) * self.blocks_per_slot
        for pages in self._maps:
            if not whole:  # a huge page would span many slots
                huge_pages.refuse(pages)
            elif self.nbytes <= HUGE_BYTES:  # attention reads them faster; but they fill memory that is only reserved
                huge_pages.advise(pages)

    def append(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, rows: int | torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(rows, int):  # views
            return keys[:rows, :, :length], values[:rows, :, :length]
        return keys[rows, :, :length], values[rows, :, :length]

    def get(self, tensor: torch.Tensor, slot: int, start: int, stop: int) -> torch.Tensor:
        return tensor[slot, :, start:stop]

    def put(self, tensor: torch.Tensor, slot: int, start: int, given: torch.Tensor) -> None:
        tensor[slot, :, start : start + given.shape[1]] = given

    def move(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[targets, :, start:stop] = tensor[sources, :, start:stop]

    def _map(self, slot: int, low: int, high: int) -> None:
        """Nothing to do: the operating system allocates at the first write."""

    def _unmap(self, slot: int, low: int, high: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        head_bytes = self.length * self._row_bytes
        heads = range(slot * self.kv_heads, (slot + 1) * self.kv_heads)
        spans = [(head * head_bytes + low * self.block * self._row_bytes, high - low) for head in heads]
        if low == 0:  # all of them in one call
            spans = [(spans[0][0], self.kv_heads * self.blocks_per_slot)]
        for pages in self._maps:
            for start, blocks in spans:
                pages.madvise(mmap.MADV_DONTNEED, start, blocks * self.block * self._row_bytes)


class PagedKVCache(SlotCache):
    """One tensor of pages of keys and one of values per layer, [pages, PAGE, K, d]; `table` [S + 1, pages per slot]
    lists each slot's pages. No sequence owns slot `spare`.

    The first page stands for missing ones in the table: zeros, never written. The second belongs to the spare slot.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_layers, slots, kv_heads, length, head_dim, dtype, device, PAGE)
        self.spare = slots
        self.table = torch.zeros(slots + 1, self.blocks_per_slot, dtype=torch.int32, device=device)
        self.table[slots, 0] = 1
        self._own: list[list[int]] = [[] for _ in range(slots)]
        self._num_layers = num_layers
        self._unused: list[int] = []

    def limit(self, blocks: int) -> None:
        """Limit the cache to `blocks` and allocate their tensors."""
        self.blocks = self._free = min(blocks, self.blocks)
        self._unused = list(range(self.blocks + 1, 1, -1))
        shape = (self.blocks + 2, PAGE, self.kv_heads, self.width)
        for tensors in (self.keys, self.values):
            tensors += [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self._num_layers)]

    def places(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Indices of these positions of these slots, counted over all pages."""
        return self.table[slots, positions // PAGE].long() * PAGE + positions % PAGE

    def fill(self, layer: int, slot: int, keys: torch.Tensor, values: torch.Tensor, begin: int = 0) -> None:
        places = self._span([slot], begin, begin + keys.shape[1])[0]
        self.append_at(layer, places, keys.transpose(0, 1), values.transpose(0, 1))

    def append_at(self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [B, K, d] to `places` [B]."""
        self.keys[layer].flatten(0, 1)[places] = keys
        self.values[layer].flatten(0, 1)[places] = values

    def append(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.append_at(layer, self.places(slots, positions), keys, values)

    def read(self, layer: int, rows: int | torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.table[:rows] if isinstance(rows, int) else self.table[rows]
        pages = table[:, : -(-length // PAGE)].long()
        keys, values = (t[layer][pages].flatten(1, 2)[:, :length].transpose(1, 2) for t in (self.keys, self.values))
        return keys, values

    def get(self, tensor: torch.Tensor, slot: int, start: int, stop: int) -> torch.Tensor:
        return tensor.flatten(0, 1)[self._span([slot], start, stop)[0]].transpose(0, 1)

    def put(self, tensor: torch.Tensor, slot: int, start: int, given: torch.Tensor) -> None:
        tensor.flatten(0, 1)[self._span([slot], start, start + given.shape[1])[0]] = given.transpose(0, 1)

    def move(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        origin, aim = self._span(sources, start, stop), self._span(targets, start, stop)
        for tensor in (*self.keys, *self.values):
            flat = tensor.flatten(0, 1)
            flat[aim] = flat[origin]

    def _span(self, slots: list[int], start: int, stop: int) -> torch.Tensor:
        """The places of positions [start, stop) of these slots, [slots, n]."""
        at = torch.arange(start, stop, device=self.device)
        return self.places(torch.tensor(slots, device=self.device)[:, None], at[None, :])

    def _map(self, slot: int, low: int, high: int) -> None:
        taken = [self._unused.pop() for _ in range(high - low)]
        self._own[slot] += taken
        self.table[slot, low:high] = torch.tensor(taken, dtype=torch.int32, device=self.device)

    def _unmap(self, slot: int, low: int, high: int) -> None:
        self._unused += self._own[slot][low:]
        del self._own[slot][low:]
        self.table[slot, low:high] = 0


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, mmap.mmap | None]:
    """Zeros; on a CPU in memory that is allocated page by page: `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device), None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    pages = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype), pages
