"""The adapters' effect on each slot: scales, shifts and low-rank terms of every site.

The rows of a request are written once, during prefill, and kept beside its KV cache; every later token uses them, so
that decoding never reads a generator's weights and a batch may mix any adapters.
Legend: S slots, N tokens of the packed batch, D model width, W output width of a site, B rows of a prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pedro.adapter_kinds import Adapter, Generator, GeneratorWeights, generate_vectors

SCALE, SHIFT = "scale", "shift"
NEUTRAL = {SCALE: 1.0, SHIFT: 0.0}
Key = tuple[str, int, str]  # SCALE or SHIFT, layer, site
SlotRows = dict[Key, torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the packed batch are one row, whose sequence holds `slot`."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True, eq=False)
class PreemptedState:
    """What is saved at a preemption: the slot's rows, or the adapter itself if decoding needs it."""

    rows: SlotRows
    held: Adapter | None
    start: int = 0  # as of `ConditionedRow`


@dataclass(frozen=True)
class ConditionedRow:
    """A row of a prefill: its tokens, how many of them condition its vectors, and its adapter (None: bare).

    `every_state`: whether the last layer's output is needed for all its tokens, not only for the last one.
    """

    segment: Segment
    conditioning_length: int
    adapter: Adapter | None
    preempted_state: PreemptedState | None = None
    begin: int = 0  # the position of its first token; earlier ones are in the slot
    start: int = 0  # the position from which the adapter acts; tokens before it see the bare backbone
    every_state: bool = False

    @property
    def modulated(self) -> bool:
        return self.adapter is not None or self.preempted_state is not None

    @property
    def span(self) -> slice:
        """Its tokens of the packed batch that are modulated."""
        first, stop = self.segment.start + max(0, self.start - self.begin), self.segment.stop
        return slice(min(first, stop) if self.modulated else stop, stop)

    @property
    def slots_by_token(self) -> list[int]:
        """For each of its tokens the slot whose modulation applies, -1 for none."""
        segment, span = self.segment, self.span
        return [-1] * (span.start - segment.start) + [segment.slot] * (span.stop - span.start)


@dataclass
class GeneratorBatch:
    """Rows of a prefill whose generators can run as a batch."""

    rows: list[ConditionedRow]
    generators: list[Generator]
    slots: torch.Tensor = field(init=False)

    def weights(self, layer: int) -> GeneratorWeights:
        """A single generator's weights unchanged; those of several stacked on a leading axis."""
        if all(generator is self.generators[0] for generator in self.generators):
            return self.generators[0].layers[layer]
        parts = [generator.layers[layer] for generator in self.generators]
        rational = parts[0].a is not None
        return GeneratorWeights(
            down=torch.stack([part.down for part in parts]),
            up=torch.stack([part.up for part in parts]),
            bias=torch.stack([part.bias for part in parts]),
            activation=parts[0].activation,
            a=torch.stack([part.a for part in parts]) if rational else None,  # type: ignore[misc]
            b=torch.stack([part.b for part in parts]) if rational else None,  # type: ignore[misc]
        )


class Modulation:
    """The slots' rows of every layer and site. A buffer is created when the first adapter needs it, and kept.

    Buffers are [S, W], W rounded up to a multiple of `simd_width`. `on_buffer(kind, layer, site, buffer)` is called for
    new ones, `on_low_rank(slot, adapter or None)` for a slot whose low-rank adapter changed.
    """

    def __init__(self, widths: list[dict[str, int]], slots: int, device: torch.device, simd_width: int = 1) -> None:
        self.buffers: dict[Key, torch.Tensor] = {}
        self.held: dict[int, Adapter] = {}  # by slot, adapters that decoding needs
        self.low_rank: dict[int, Adapter] = {}  # of those, adapters with low-rank terms
        self.modulated = [False] * slots  # whether a slot differs from the bare backbone
        self._starts = [0] * slots  # and from which position on
        self.on_buffer: Callable[[str, int, str, torch.Tensor], None] = lambda *_: None
        self.on_low_rank: Callable[[int, Adapter | None], None] = lambda *_: None
        self._widths = widths
        self._slots = slots
        self._device = device
        self._simd_width = simd_width
        self.generating: list[GeneratorBatch] = []  # vectors that the current prefill must generate

    def begin(self, rows: list[ConditionedRow]) -> list[GeneratorBatch]:
        """Write the rows of a prefill, except their generated vectors.

        Returns the batches that generate those; set `generating` to them whenever the prefill runs.
        """
        by_form: dict[tuple[Any, ...], list[ConditionedRow]] = {}
        for row in rows:
            slot, adapter = row.segment.slot, row.adapter
            was, self.modulated[slot] = self.modulated[slot], row.modulated
            self._starts[slot] = row.start
            if row.preempted_state is not None:
                self._set(slot, row.preempted_state.rows, row.preempted_state.held)
            elif adapter is not None:
                generated = adapter.generator.targets if adapter.generator is not None else ()
                self._set(slot, self._constants(adapter), adapter if adapter.must_stay else None, generated)
                if adapter.generator is not None:
                    self._reserve(adapter.generator)
                    by_form.setdefault(adapter.generator.form, []).append(row)
            elif was:
                self._set(slot, {}, None)
        generating = []
        for batch in by_form.values():
            made = GeneratorBatch(batch, [row.adapter.generator for row in batch])  # type: ignore[union-attr, misc]
            made.slots = torch.tensor([row.segment.slot for row in batch], device=self._device)
            generating.append(made)
        return generating

    def generate(self, layer: int, residual: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write this layer's generated vectors. residual [N, D] is the layer's input; `norm` maps [n, D] of it to the
        attention's input."""
        for batch in self.generating:
            first = batch.generators[0]
            normed = None if first.pool_source == "residual" else norm
            pooled = _pool(residual, batch.rows, first.pool, normed, first.window)
            made = generate_vectors(pooled, batch.weights(layer))  # [B, sum of widths]
            for site, part in zip(first.targets, made.split(first.widths[layer], -1), strict=True):
                self._buffer((SCALE, layer, site))[batch.slots, : part.shape[-1]] = part

    def edit(self, layer: int, hidden: torch.Tensor, rows: list[ConditionedRow]) -> None:
        """Apply edits to prompt tokens after a layer; its output hidden [N, D] is changed in place."""
        for row in rows if self.held else ():
            adapter = self.held.get(row.segment.slot)
            for edits in adapter.edits if adapter is not None else ():
                edit = edits.layers[layer]
                tokens = [at - row.begin for at in edits.tokens(row.conditioning_length) if at >= row.begin]
                if edit is not None and tokens:
                    index = torch.tensor(tokens, device=hidden.device) + row.segment.start
                    chosen = hidden[index].float()  # [n, D]
                    hidden[index] = (chosen + (chosen @ edit.a + edit.c) @ edit.b).to(hidden.dtype)

    def save_state(self, slot: int) -> PreemptedState:
        """The slot's rows, copied."""
        rows = {key: buffer[slot].clone() for key, buffer in self.buffers.items()} if self.modulated[slot] else {}
        return PreemptedState(rows, self.held.get(slot), self._starts[slot])

    def copy(self, source: int, targets: list[int]) -> None:
        """Copy the rows of slot `source` to `targets`."""
        differ = any(self.modulated[slot] for slot in (source, *targets))  # rows of all others are neutral
        for slot in targets:
            self.modulated[slot], self._starts[slot] = self.modulated[source], self._starts[source]
            self._hold(slot, self.held.get(source))
        if differ:
            for buffer in self.buffers.values():
                buffer[targets] = buffer[source].clone()

    def release(self, slot: int) -> None:
        """The slot's sequence ended: drop its adapter."""
        self._hold(slot, None)

    def width(self, layer: int, site: str) -> int:
        """The row width of the site's buffers."""
        return -(-self._widths[layer][site] // self._simd_width) * self._simd_width

    def _constants(self, adapter: Adapter) -> SlotRows:
        parts = ((SCALE, adapter.scale), (SHIFT, adapter.shift))
        return {
            (kind, layer, site): row
            for kind, layers in parts
            for layer, sites in enumerate(layers)
            for site, row in sites.items()
        }

    def _set(self, slot: int, rows: SlotRows, held: Adapter | None, generated: tuple[str, ...] = ()) -> None:
        """Write the slot's rows, neutral where `rows` has none; scales of the sites in `generated` are written
        later."""
        for key in rows:
            self._buffer(key)
        for key, buffer in self.buffers.items():
            if key[0] == SCALE and key[2] in generated:
                continue
            row = rows.get(key)
            if row is None:
                buffer[slot] = NEUTRAL[key[0]]
            else:
                buffer[slot, : len(row)] = row
        self._hold(slot, held)

    def _reserve(self, generator: Generator) -> None:
        """Create the buffers that the generator writes to."""
        for layer in range(len(generator.layers)):
            for site in generator.targets:
                self._buffer((SCALE, layer, site))

    def _hold(self, slot: int, adapter: Adapter | None) -> None:
        if self.held.get(slot) is adapter:
            return
        self.held.pop(slot, None)
        self.low_rank.pop(slot, None)
        if adapter is not None:
            self.held[slot] = adapter
        if adapter is not None and adapter.low_rank:
            self.low_rank[slot] = adapter
        self.on_low_rank(slot, self.low_rank.get(slot))

    def _buffer(self, key: Key) -> torch.Tensor:
        buffer = self.buffers.get(key)
        if buffer is None:
            kind, layer, site = key
            shape = (self._slots, self.width(layer, site))
            buffer = self.buffers[key] = torch.full(shape, NEUTRAL[kind], device=self._device)
            self.on_buffer(kind, layer, site, buffer)
        return buffer


def _pool(
    residual: torch.Tensor,
    rows: list[ConditionedRow],
    pool: str,
    norm: Callable[[torch.Tensor], torch.Tensor] | None,
    window: int | None,
) -> torch.Tensor:
    """The pooled prompts [B, D]: each row's last conditioning token, or the mean or maximum of them or the last few."""
    if pool == "last":
        last = [row.segment.start + row.conditioning_length - row.begin - 1 for row in rows]
        picked = residual[torch.tensor(last, device=residual.device)]
        return (picked if norm is None else norm(picked)).float()
    pooled = []
    for row in rows:
        stop = row.segment.start + row.conditioning_length - row.begin
        prompt = residual[stop - min(row.conditioning_length, window or row.conditioning_length) : stop]
        prompt = (prompt if norm is None else norm(prompt)).float()
        pooled.append(prompt.mean(0) if pool == "mean" else prompt.amax(0))
    return torch.stack(pooled)
