"""Keys and values of every running sequence, allocated once; on a CPU, pages take memory when they are first written.

Who owns a slot is decided elsewhere.

Legend: S slots, K key-value heads, T positions, d head width, N tokens of a packed batch, B rows.
"""

from __future__ import annotations

import math
import mmap

import torch

PAGE = 256  # positions of a page
MARGIN = 64  # elements after the last: the CPU kernel reads whole SIMD vectors, and drops what lies outside


class KVCache:
    """One tensor of keys and one of values a layer, [S, K, T, d]: head-major in memory, or in pages for CUDA.

    Paged, a slot is a run of pages [page, K, d], T is rounded up to whole ones, and slot `spare` is nobody's.
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
        paged: bool = False,
    ) -> None:
        self.spare = slots
        self.pages_per_slot = -(-length // PAGE) if paged else 0
        positions = self.pages_per_slot * PAGE if paged else length
        shape = (slots + paged, positions, kv_heads, head_dim) if paged else (slots, kv_heads, positions, head_dim)

        def make() -> list[torch.Tensor]:
            size = math.prod(shape)
            whole = [zeros(size + MARGIN, dtype, device) for _ in range(num_layers)]
            return [tensor[:size].view(shape).transpose(1, 2 if paged else 1) for tensor in whole]

        self.keys, self.values = make(), make()

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as pages, [pages, PAGE, K, d]; the pages of slot s begin at s · pages_per_slot."""
        keys, values = (
            t[layer].transpose(1, 2).flatten(0, 1).unflatten(0, (-1, PAGE)) for t in (self.keys, self.values)
        )
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes once all of it is used."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def fill(self, layer: int, slot: int, keys: torch.Tensor, values: torch.Tensor, begin: int = 0) -> None:
        """Write keys and values [K, n, d] of a prompt to n positions of the slot, from `begin` on."""
        end = begin + keys.shape[1]
        self.keys[layer][slot, :, begin:end] = keys
        self.values[layer][slot, :, begin:end] = values

    def append(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write one position of each row: keys and values [B, K, d] at `positions` [B] of `slots` [B]."""
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, rows: int | torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions, [B, K, length, d]: a view of the first `rows` slots, or the slots gathered."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(rows, int):
            return keys[:rows, :, :length], values[:rows, :, :length]
        return keys[rows, :, :length], values[rows, :, :length]

    def read_slot(self, layer: int, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions of one slot, [1, K, length, d]: a view."""
        return self.keys[layer][slot, None, :, :length], self.values[layer][slot, None, :, :length]

    def move(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Simultaneously give each target slot the positions [start, stop) of its source."""
        for tensor in (*self.keys, *self.values):
            tensor[targets, :, start:stop] = tensor[sources, :, start:stop]

    def spread(self, source: int, targets: list[int], length: int) -> None:
        """Give each target slot the first `length` positions of `source`."""
        for tensor in (*self.keys, *self.values):
            for target in targets:
                tensor[target, :, :length] = tensor[source, :, :length]

    def wipe(self, slot: int, length: int | None = None, start: int = 0) -> None:
        """Zero a slot, or its positions [start, length), that may hold numbers that are not finite: masked out, they
        would still poison what comes next."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, start:length].zero_()


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, on a CPU in memory that the operating system gives page by page: `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)
