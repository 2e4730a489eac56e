"""One block's constant vectors: scales and shifts its projections."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from pedro.methods.architectures import LayerSites, Rows
from pedro.methods.blocks import BlockLayer
from pedro.methods.constants.config import ConstantConfig, Vectors, constant_vectors

Cuts = list[tuple[str, Rows]]  # the targets of a module, and where they lie in its output


class ConstantLayer(BlockLayer):
    """The vectors of one block, by adapter. W_s, W_b: widths of all targets of scale and shift together."""

    adapter_layer_names = (
        "constant_scale",  # [W_s]
        "constant_scale_code",  # [targets, r]
        "constant_scale_up",  # [r, W_s]
        "constant_shift",  # [W_b]
        "constant_shift_code",  # [targets, r]
        "constant_shift_up",  # [r, W_b]
    )

    def __init__(self, index: int, layer_sites: LayerSites) -> None:
        super().__init__(index, layer_sites)
        self.widths = {target: site.width for target, site in layer_sites.linears.items()}
        cuts_of: dict[nn.Module, Cuts] = {}
        for target, site in layer_sites.linears.items():
            cuts_of.setdefault(site.module, []).append((target, site.rows))
        self._handles = [module.register_forward_hook(partial(self._modify, cuts)) for module, cuts in cuts_of.items()]

    def update_layer(self, adapter_name: str, config: ConstantConfig) -> None:
        """Add a fresh adapter, which changes nothing: scales of one, shifts of zero; of factors, codes are random."""
        fresh = self.fresh()
        for name, shape in config.shapes(self.widths).items():
            tensor = torch.zeros(shape, **fresh)
            if name == "constant_scale":
                tensor.fill_(1.0)
            elif name.endswith("_code"):
                tensor.normal_(std=shape[1] ** -0.5)
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        self.configs[adapter_name] = config

    def vectors(self, adapter_name: str) -> tuple[Vectors, Vectors]:
        """One adapter's (scales, shifts) in this block."""
        config = self.configs[adapter_name]
        tensors = {name: getattr(self, name)[adapter_name] for name in config.shapes(self.widths)}
        return constant_vectors(config, self.widths, tensors)

    def _modify(
        self, cuts: Cuts, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """output [B, T, W] scaled and shifted in float32, then back in the model's dtype."""
        changed: torch.Tensor | None = None
        for name in self.live():
            config = self.configs[name]
            if not any(target in config.scale or target in config.shift for target, _ in cuts):
                continue
            scales, shifts = self.vectors(name)
            changed = output.float() if changed is None else changed
            scale, shift = _assemble(cuts, scales, output, 1.0), _assemble(cuts, shifts, output, 0.0)
            changed = changed if scale is None else changed * scale
            changed = changed if shift is None else changed + shift
        return None if changed is None else changed.to(output.dtype)


def _assemble(cuts: Cuts, vectors: Vectors, output: torch.Tensor, empty: float) -> torch.Tensor | None:
    """The vector [W] of a whole module, or one a row [B, 1, W] where they are; `empty` where a fused projection is no
    target. None where none is."""
    own = [vectors[target] for target, _ in cuts if target in vectors]
    if not own or cuts[0][1] is None:
        return own[0] if own else None
    whole = torch.full((*own[0].shape[:-1], output.shape[-1]), empty, device=output.device)
    for target, rows in cuts:
        if target in vectors:
            whole[..., rows.to(whole.device) if isinstance(rows, torch.Tensor) else rows] = vectors[target]
    return whole
