"""Applies the slots' modulation inside a transformers model, by forward hooks. Knows no policy and no adapters' files.

Legend: N tokens of the packed batch, B rows, W output width of a module, S slots, R rank.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from pedro.engine.attention import DecodeStep
from pedro.engine.modulation import SCALE, SHIFT, Conditioned, Modulation
from pedro.methods.architectures import Architecture, Rows


@dataclass
class _Projection:
    """One module and the sites that lie in its output."""

    module: nn.Module
    places: dict[str, Rows] = field(default_factory=dict)


class Hooks:
    """The hooks on one model. `prefilling` and `decoding` arm them."""

    def __init__(self, architecture: Architecture, modulation: Modulation) -> None:
        self._modulation = modulation
        self._prefill: list[Conditioned] = []
        self._decode: DecodeStep | None = None
        self._handles = []
        for number, layer in enumerate(architecture.layers):
            projections: dict[int, _Projection] = {}
            sites = {site: (found.module, found.rows) for site, found in layer.sites.items()}
            for site, (module, rows) in {**sites, "o": (layer.output, None), "down": (layer.down, None)}.items():
                projections.setdefault(id(module), _Projection(module)).places[site] = rows
            self._handles.append(layer.norm.register_forward_hook(self._make_norm_hook(number)))
            for projection in projections.values():
                hook = self._make_hook(number, projection)
                self._handles.append(projection.module.register_forward_hook(hook))

    @contextmanager
    def prefilling(self, rows: list[Conditioned]):
        """While this lasts, forwards make and apply the modulation of `rows`, packed as their segments say."""
        self._prefill = [row for row in rows if row.modulated]
        try:
            yield
        finally:
            self._prefill = []

    @contextmanager
    def decoding(self, step: DecodeStep):
        """While this lasts, forwards apply the modulation of the step's slots, one token each."""
        self._decode = step if any(self._modulation.modulated[slot] for slot in step.slot_ids) else None
        try:
            yield
        finally:
            self._decode = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _make_norm_hook(self, layer: int):
        def hook(module, inputs, output):
            if self._prefill and self._modulation.generating:
                norm = module.forward  # not the call, which would come back here
                self._modulation.generate(layer, inputs[0][0], norm)

        return hook

    def _make_hook(self, layer: int, projection: _Projection):
        def hook(_module, inputs, output):
            if self._prefill:
                return self._modulate_prompts(layer, projection, inputs[0], output)
            if self._decode is not None:
                return self._modulate_step(layer, projection, inputs[0], output, self._decode)
            return None

        return hook

    def _modulate_prompts(self, layer: int, projection: _Projection, inputs, output: torch.Tensor) -> torch.Tensor:
        """output [1, N, W]: each row's tokens by its slot's rows; bare rows are not touched."""
        buffers, low_rank = self._modulation.buffers, self._modulation.low_rank
        for site, place in projection.places.items():
            scale, shift = buffers.get((SCALE, layer, site)), buffers.get((SHIFT, layer, site))
            for row in self._prefill:
                slot, span = row.segment.slot, slice(row.segment.start, row.segment.stop)
                part = _part(output[0, span], place)
                made = part
                if scale is not None:
                    made = made * scale[slot]
                if shift is not None:
                    made = made + shift[slot]
                term = low_rank[slot].low_rank[layer].get(site) if slot in low_rank else None
                if term is not None:
                    made = made + (inputs[0, span].float() @ term.down) @ term.up
                if made is not part:
                    _put(output[0, span], place, made)
        return output

    def _modulate_step(
        self, layer: int, projection: _Projection, inputs: torch.Tensor, output: torch.Tensor, step: DecodeStep
    ) -> torch.Tensor:
        """output [1, B, W], one row a slot."""
        buffers, low_rank = self._modulation.buffers, self._modulation.low_rank
        for site, place in projection.places.items():
            scale, shift = buffers.get((SCALE, layer, site)), buffers.get((SHIFT, layer, site))
            part = _part(output[0], place)
            made = part
            if scale is not None:
                made = made * step.of_slots(scale)
            if shift is not None:
                made = made + step.of_slots(shift)
            if low_rank:
                made = self._add_low_rank(layer, site, inputs[0], made, step)
            if made is not part:
                if place is None:
                    output = made.to(output.dtype)[None]
                else:
                    _put(output[0], place, made)
        return output

    def _add_low_rank(self, layer: int, site: str, inputs: torch.Tensor, made: torch.Tensor, step: DecodeStep):
        """Low-rank terms gathered over the rows that have one: made [B, W] + (inputs [B, in] · down) · up."""
        held = self._modulation.low_rank
        terms = {
            row: held[slot].low_rank[layer][site]
            for row, slot in enumerate(step.slot_ids)
            if slot in held and site in held[slot].low_rank[layer]
        }
        if not terms:
            return made
        rank = max(term.down.shape[1] for term in terms.values())
        rows = torch.tensor(list(terms), device=made.device)
        down = torch.stack([_widen(term.down, 1, rank) for term in terms.values()])  # [b, in, R]
        up = torch.stack([_widen(term.up, 0, rank) for term in terms.values()])  # [b, R, W]
        low = torch.bmm(inputs[rows].float()[:, None], down)
        return made.float().index_add(0, rows, torch.bmm(low, up)[:, 0])


def _part(output: torch.Tensor, place: Rows) -> torch.Tensor:
    return output if place is None else output[..., place]


def _put(output: torch.Tensor, place: Rows, made: torch.Tensor) -> None:
    output[..., slice(None) if place is None else place] = made.to(output.dtype)


def _widen(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    return torch.nn.functional.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing)) if missing else tensor
