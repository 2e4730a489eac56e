"""Kept blocks as the CPU kernel has them: it copies what is kept out of slots, and reads it where it lies."""

from __future__ import annotations

from ctypes import POINTER, c_void_p, cast, pointer
from typing import TYPE_CHECKING, Any

from pedro.engine import native

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from pedro.engine.kv_cache import KVCache
    from pedro.engine.native_model import NativeModel

Span = tuple[int, int]  # the first of some positions that follow one another among the kept, and how many


class NativeBlocks:
    """`kept`: float32 tensors [K, P, d], a layer each: of the keys, and then of the values."""

    def __init__(self, model: NativeModel, cache: KVCache, kept: list[torch.Tensor]) -> None:
        kernel = native.load_kernel()
        assert kernel is not None, "asked for only where the kernel runs"
        self._kernel, self._threads = kernel, model.threads
        slots = [*cache.keys, *cache.values]
        self._tensors = [(c_void_p * len(slots))(*(tensor.data_ptr() for tensor in side)) for side in (kept, slots)]
        self._heads, positions, self._width = kept[0].shape
        self._strides = positions * self._width, cache.length * self._width  # floats from a head to the next
        self._kept = kept  # the kernel points at them
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
        )
        self._kernel.pedro_copy(self._threads.count, len(self._tensors[0]), pointer(copy))

    def borrow(self, slot: int, spans: Iterable[Span]) -> int:
        """Have the slot's first positions be these, until others are named. Gives how many those are."""
        made = [native.SpanStruct(*span) for span in spans]
        one, self._spans[slot] = self._borrowed[slot], (native.SpanStruct * len(made))(*made)
        one.count, one.spans, one.span = sum(span.count for span in made), len(made), self._spans[slot]
        return int(one.count)
