"""Memory in huge pages, where Linux gives them: the processor looks small ones up so often that weights come at two
thirds of the speed in a virtual machine.

Linux gives them if `/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`; elsewhere this is ordinary
memory.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

HUGE = 2 << 20  # bytes of a huge page
CHUNK = 32 << 20  # asked for at once; what is not written to takes no memory
LINE = 64  # bytes of a cache line


def advise(pages: mmap.mmap) -> None:
    """Ask for huge pages wherever `pages` has room for a whole one."""
    _tell(pages, "MADV_HUGEPAGE")


def refuse(pages: mmap.mmap) -> None:
    """Ask for none in `pages`, even where every process is given them."""
    _tell(pages, "MADV_NOHUGEPAGE")


class HugeMemory:
    """Tensors one behind the other. A chunk is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of this shape, of zeros or what was there before."""
        size = torch.Size(shape).numel() * dtype.itemsize
        wanted = -(-size // LINE) * LINE
        if wanted > len(self._rest):
            self._rest = _chunk(-(-max(wanted, CHUNK) // HUGE) * HUGE)
        made, self._rest = self._rest[:size], self._rest[wanted:]
        return made.view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's contents, contiguous."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _chunk(size: int) -> torch.Tensor:
    """Bytes that begin with a huge page, if these can be asked for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise(pages)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE
    return whole[begin : begin + size]


def _tell(pages: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):  # on Linux
        with suppress(OSError):  # EINVAL if the system has no huge pages
            pages.madvise(getattr(mmap, advice))
