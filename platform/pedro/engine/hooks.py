"""Applies the slots' modulation inside a transformers model, by forward hooks.

Legend: N tokens of the packed batch, B rows, W output width of a module, S slots, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pedro.engine.modulation import SCALE, SHIFT, ConditionedRow, Modulation

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter, LowRank
    from pedro.engine.attention import DecodeStep
    from pedro.engine.graphs import StaticStep
    from pedro.methods.architectures import Architecture, Rows


@dataclass
class _Projection:
    """One module and the sites in its output."""

    module: nn.Module
    rows: dict[str, Rows] = field(default_factory=dict)  # of its output, by site


class Hooks:
    """The hooks on one model. `prefilling` and `decoding` arm them."""

    def __init__(self, architecture: Architecture, modulation: Modulation) -> None:
        self.version = 0  # changes when buffers do
        self._modulation = modulation
        self._dtype = next(architecture.decoder.parameters()).dtype
        self._prefill: list[ConditionedRow] = []
        self._decode: DecodeStep | StaticStep | None = None
        self._low_rank: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}  # ([S, in, R], [S, R, W])
        self._handles = []
        modulation.on_low_rank = self._use_low_rank
        for number, layer in enumerate(architecture.layers):
            projections: dict[int, _Projection] = {}
            sites = {name: (site.module, site.rows) for name, site in layer.sites.items()}
            for name, (module, rows) in {**sites, "o": (layer.output, None), "down": (layer.down, None)}.items():
                projections.setdefault(id(module), _Projection(module)).rows[name] = rows
            self._handles.append(layer.norm.register_forward_hook(self._make_norm_hook(number)))
            self._handles.append(layer.block.register_forward_hook(self._make_block_hook(number)))
            for projection in projections.values():
                hook = self._make_hook(number, projection)
                self._handles.append(projection.module.register_forward_hook(hook))

    @contextmanager
    def prefilling(self, rows: list[ConditionedRow]) -> Iterator[None]:
        """Within this context, forward passes generate and apply the modulation of `rows`, packed by their segments."""
        self._prefill = [row for row in rows if row.modulated]
        try:
            yield
        finally:
            self._prefill = []

    @contextmanager
    def decoding(self, step: DecodeStep | StaticStep, modulated: bool) -> Iterator[None]:
        """Within this context, forward passes apply the modulation of the step's slots, one token each, if
        `modulated`."""
        self._decode = step if modulated else None
        try:
            yield
        finally:
            self._decode = None

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _make_norm_hook(self, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, _output: Any) -> None:
            if self._prefill and self._modulation.generating:
                norm = module.forward  # not the call, which would recurse
                self._modulation.generate(layer, inputs[0][0], norm)

        return hook

    def _make_block_hook(self, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if self._prefill:
                hidden = output[0] if isinstance(output, tuple) else output
                self._modulation.edit(layer, hidden[0], self._prefill)

        return hook

    def _make_hook(self, layer: int, projection: _Projection) -> Callable[[Any, Any, Any], Any]:
        def hook(_module: Any, inputs: Any, output: torch.Tensor) -> Any:
            if self._prefill:
                return self._modulate_prompts(layer, projection, inputs[0], output)
            if self._decode is not None:
                return self._modulate_step(layer, projection, inputs[0], output, self._decode)
            return None

        return hook

    def _modulate_prompts(self, layer: int, projection: _Projection, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """output [1, N, W]: modulates each row's tokens by its slot; bare tokens are unchanged."""
        buffers, low_rank = self._modulation.buffers, self._modulation.low_rank
        for site, rows in projection.rows.items():
            scale, shift = buffers.get((SCALE, layer, site)), buffers.get((SHIFT, layer, site))
            for row in self._prefill:
                slot, span = row.segment.slot, row.span
                part = _part(output[0, span], rows)
                made = part
                if scale is not None:
                    made = made * scale[slot]
                if shift is not None:
                    made = made + shift[slot]
                term = low_rank[slot].low_rank[layer].get(site) if slot in low_rank else None
                if term is not None:
                    made = made + (inputs[0, span].float() @ term.a) @ term.b
                if made is not part:
                    _put(output[0, span], rows, made)
        return output

    def _modulate_step(
        self,
        layer: int,
        projection: _Projection,
        inputs: torch.Tensor,
        output: torch.Tensor,
        step: DecodeStep | StaticStep,
    ) -> torch.Tensor:
        """output [1, B, W], one row per slot."""
        buffers = self._modulation.buffers
        for site, rows in projection.rows.items():
            scale, shift = buffers.get((SCALE, layer, site)), buffers.get((SHIFT, layer, site))
            part = _part(output[0], rows)
            made = part
            if scale is not None:
                made = made * step.of_slots(scale)
            if shift is not None:
                made = made + step.of_slots(shift)
            terms = self._low_rank.get((layer, site))
            if terms is not None:
                a, b = (step.of_slots(term) for term in terms)
                made = made + torch.bmm(torch.bmm(inputs[0].to(a.dtype)[:, None], a), b)[:, 0]
            if made is not part:
                if rows is None:
                    output = made.to(output.dtype)[None]
                else:
                    _put(output[0], rows, made)
        return output

    def _use_low_rank(self, slot: int, adapter: Adapter | None) -> None:
        """Set the slot's low-rank terms in the buffers that batched decoding reads; zeros if it has none."""
        for terms in self._low_rank.values():
            for buffer in terms:
                buffer[slot] = 0
        for layer, sites in enumerate(adapter.low_rank if adapter is not None else ()):
            for site, term in sites.items():
                rank = term.a.shape[1]
                a, b = self._low_rank_buffers(layer, site, term)
                a[slot, :, :rank], b[slot, :rank] = term.a, term.b

    def _low_rank_buffers(self, layer: int, site: str, term: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        """The site's buffers [S, in, R] and [S, R, W], created or widened for this rank."""
        slots, rank = len(self._modulation.modulated), term.a.shape[1]
        old = self._low_rank.get((layer, site))
        if old is None or old[0].shape[2] < rank:
            dtype = self._dtype
            made = (
                term.a.new_zeros(slots, term.a.shape[0], rank, dtype=dtype),
                term.b.new_zeros(slots, rank, term.b.shape[1], dtype=dtype),
            )
            if old is not None:
                made[0][:, :, : old[0].shape[2]], made[1][:, : old[1].shape[1]] = old
            self._low_rank[(layer, site)] = made
            self.version += 1
        return self._low_rank[(layer, site)]


def _part(output: torch.Tensor, rows: Rows) -> torch.Tensor:
    return output if rows is None else output[..., rows]


def _put(output: torch.Tensor, rows: Rows, part: torch.Tensor) -> None:
    output[..., slice(None) if rows is None else rows] = part.to(output.dtype)
