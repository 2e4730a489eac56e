"""Copies keys and values between slots and cached blocks with the CPU kernel's threads, all layers in one call."""

from __future__ import annotations

from ctypes import POINTER, c_void_p, cast, pointer
from typing import TYPE_CHECKING

from pedro.engine import native

if TYPE_CHECKING:
    import torch

    from pedro.engine.kernel_threads import KernelThreads


class Copier:
    """Copies between `slots` and `kept`, equally many float32 tensors with the same number of heads.

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
