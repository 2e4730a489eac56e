"""Makes the vectors of a request at its prefill and scales projections with them. Knows no policy and no sampling.

Vectors live in buffers indexed by slot, beside the KV cache: written once when a prompt is read, used by every
later token, so that decoding never touches an adapter's weights and a batch may mix any adapters.
Legend: S slots, N tokens of the packed batch, B rows, D model width, W output width of a projection module.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from pedro.engine.attention import DecodeStep, Segment
from pedro.engine.generators import GeneratorAdapter
from pedro.methods.architectures import Architecture
from pedro.methods.pedro.generator import generate_vectors


@dataclass(frozen=True, eq=False)
class Kept:
    """What a preempted request's slot held: a row of each buffer by layer (None: the buffer was not there yet)."""

    rows: list[list[torch.Tensor | None]] | None  # None: a bare slot


@dataclass(frozen=True)
class Conditioned:
    """A row of a prefill: its tokens, how many of them its vectors may see, and its adapter (None: bare).

    `kept` stands in for the adapter where the vectors were made before.
    """

    segment: Segment
    conditioning_length: int
    adapter: GeneratorAdapter | None
    kept: Kept | None = None

    @property
    def scaled(self) -> bool:
        """Whether any vector of this row may differ from one."""
        return self.adapter is not None or (self.kept is not None and self.kept.rows is not None)


@dataclass
class _Projection:
    """One module whose output is scaled: which targets lie where in it, and the slots' vectors once there are any."""

    module: nn.Module
    places: dict[str, slice | torch.Tensor] = field(default_factory=dict)
    buffer: torch.Tensor | None = None  # [S, W]; ones where no target lies and where no adapter is


class Vectors:
    """The slot buffers of every layer, and the hooks that fill and use them. `prefilling` and `decoding` arm them."""

    def __init__(self, architecture: Architecture, slots: int, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        self._layers: list[dict[int, _Projection]] = []
        self._targets: list[dict[str, _Projection]] = []
        self._prefill: list[Conditioned] | None = None
        self._decode: DecodeStep | None = None
        self._decode_slots: list[int] = []
        self._scaled: list[bool] = [False] * slots  # whether a slot's vectors are anything but ones
        self._handles = []
        for number, layer in enumerate(architecture.layers):
            projections: dict[int, _Projection] = {}
            targets: dict[str, _Projection] = {}
            for target, site in layer.sites.items():
                projection = projections.setdefault(id(site.module), _Projection(site.module))
                projection.places[target] = slice(None) if site.rows is None else site.rows
                targets[target] = projection
            self._layers.append(projections)
            self._targets.append(targets)
            self._handles.append(layer.norm.register_forward_hook(self._make_norm_hook(number)))
            for projection in projections.values():
                self._handles.append(projection.module.register_forward_hook(self._make_scale_hook(projection)))

    @contextmanager
    def prefilling(self, rows: list[Conditioned]):
        """While this lasts, forwards make and apply the vectors of `rows`, packed as their segments say."""
        for row in rows:
            slot = row.segment.slot
            if row.kept is not None and row.kept.rows is not None:
                self._restore(slot, row.kept.rows)
            elif row.adapter is None and self._scaled[slot]:
                self._reset(slot)
            self._scaled[slot] = row.scaled
        self._prefill = rows
        try:
            yield
        finally:
            self._prefill = None

    @contextmanager
    def decoding(self, step: DecodeStep, slots: list[int]):
        """While this lasts, forwards apply the vectors of `slots`, one token each."""
        self._decode = step if any(self._scaled[slot] for slot in slots) else None
        self._decode_slots = slots
        try:
            yield
        finally:
            self._decode = None

    def keep(self, slot: int) -> Kept:
        """A copy of the slot's vectors, in memory of its own."""
        if not self._scaled[slot]:
            return Kept(None)
        buffers = ([p.buffer for p in projections.values()] for projections in self._layers)
        return Kept([[None if b is None else b[slot].cpu().clone() for b in layer] for layer in buffers])

    def copy(self, source: int, targets: list[int]) -> None:
        """Give the slots `targets` the vectors of `source`."""
        for projections in self._layers:
            for projection in projections.values():
                if projection.buffer is not None:
                    projection.buffer[targets] = projection.buffer[source]
        for slot in targets:
            self._scaled[slot] = self._scaled[source]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _make_norm_hook(self, layer: int):
        def hook(_module, inputs, output):
            if self._prefill is not None:
                self._generate(layer, residual=inputs[0], normed=output)

        return hook

    def _make_scale_hook(self, projection: _Projection):
        def hook(_module, _inputs, output):
            buffer = projection.buffer
            if buffer is None:
                return None
            if self._prefill is not None:
                return self._scale_prompts(buffer, output)
            if self._decode is not None:
                count = len(self._decode_slots)
                rows = buffer[:count] if self._decode.dense else buffer.index_select(0, self._decode.slots)
                return (output * rows).to(output.dtype)
            return None

        return hook

    def _scale_prompts(self, buffer: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """output [1, N, W], each row's tokens times its vector; bare rows are not touched."""
        assert self._prefill is not None, "called while prefilling"
        for row in self._prefill:
            if row.scaled:
                span = slice(row.segment.start, row.segment.stop)
                output[0, span] = output[0, span] * buffer[row.segment.slot]
        return output

    def _generate(self, layer: int, residual: torch.Tensor, normed: torch.Tensor) -> None:
        """Fill this layer's buffers for the rows of the prefill, one call of the generator for each adapter."""
        assert self._prefill is not None, "called while prefilling"
        groups: dict[int, list[Conditioned]] = {}
        for row in self._prefill:
            if row.adapter is not None:
                groups.setdefault(id(row.adapter), []).append(row)
        for rows in groups.values():
            adapter = rows[0].adapter
            assert adapter is not None, "bare rows were left out"
            source = (residual if adapter.pool_source == "residual" else normed)[0]
            pooled = torch.stack([pool_prompt(source, row, adapter.pool) for row in rows])  # [b, D]
            made = generate_vectors(pooled, adapter.layers[layer])  # [b, sum of widths]
            slots = torch.tensor([row.segment.slot for row in rows], device=self._device)
            self._write(layer, slots, dict(zip(adapter.targets, made.split(adapter.widths[layer], -1), strict=True)))

    def _write(self, layer: int, slots: torch.Tensor, vectors: Mapping[str, torch.Tensor]) -> None:
        """Set the slots' rows: ones but where `vectors` (target → [b, width]) say."""
        wanted = {id(self._targets[layer][target]) for target in vectors}
        for projection in self._layers[layer].values():
            if projection.buffer is None:
                if id(projection) not in wanted:
                    continue
                projection.buffer = torch.ones(self._slots, _width(projection.module), device=self._device)
            fresh = torch.ones(len(slots), projection.buffer.shape[1], device=self._device)
            for target, place in projection.places.items():
                if target in vectors:
                    fresh[:, place] = vectors[target]
            projection.buffer[slots] = fresh

    def _restore(self, slot: int, rows: list[list[torch.Tensor | None]]) -> None:
        for projections, kept in zip(self._layers, rows, strict=True):
            for projection, row in zip(projections.values(), kept, strict=True):
                if projection.buffer is not None:
                    projection.buffer[slot] = 1.0 if row is None else row.to(self._device)

    def _reset(self, slot: int) -> None:
        for projections in self._layers:
            for projection in projections.values():
                if projection.buffer is not None:
                    projection.buffer[slot] = 1.0


def pool_prompt(source: torch.Tensor, row: Conditioned, pool: str) -> torch.Tensor:
    """The pooled prompt [D] of one row from source [N, D]: its last conditioning token, or their mean or maximum."""
    start = row.segment.start
    prompt = source[start : start + row.conditioning_length]
    if pool == "last":
        return prompt[-1].float()
    return prompt.float().mean(0) if pool == "mean" else prompt.float().amax(0)


def _width(module: nn.Module) -> int:
    """How wide the module's output is: nn.Linear's out_features, or nf of GPT-2's Conv1D."""
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]
