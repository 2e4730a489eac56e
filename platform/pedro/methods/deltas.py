"""What tuners that add to the outputs of projections share: y ← y + δ(x).

A method gives a `DeltaLayer` with its δ, and, where a weight can hold it, the change of that weight.
Shapes: B rows, T tokens, W output width of a projection.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pedro.errors import ConfigError
from pedro.methods.architectures import Architecture, LayerSites, Rows
from pedro.methods.blocks import BlockLayer, BlockTuner

Cuts = list[tuple[str, Rows]]  # the targets of a module, and where they lie in its output


class DeltaLayer(BlockLayer):
    """One block's share; `first` is the first block's, which holds what all blocks share."""

    def __init__(self, index: int, layer_sites: LayerSites, first: DeltaLayer | None = None) -> None:
        super().__init__(index, layer_sites)
        self._first = [first]  # in a list, so as not to become a child
        cuts_of: dict[nn.Module, Cuts] = {}
        for target, site in layer_sites.linears.items():
            cuts_of.setdefault(site.module, []).append((target, site.rows))
        self._handles = [m.register_forward_hook(partial(self._add_up, cuts)) for m, cuts in cuts_of.items()]

    @property
    def first(self) -> Any:
        """The layer of the first block, which may be this one."""
        return self._first[0] or self

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add a fresh adapter."""
        raise NotImplementedError

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """What an adapter adds to one target's output, float32.

        x [B, T, in] float32, output [B, T, W] -> [B, T, W]; None for nothing.
        """
        raise NotImplementedError

    def weight_change(self, name: str, target: str) -> torch.Tensor:
        """The change [W, in] of one target's weight that does what the adapter does, float32."""
        raise NotImplementedError

    def base_weight(self, target: str) -> torch.Tensor:
        """The backbone's weight [W, in] of one target, float32."""
        module, rows, _ = self.layer_sites.linears[target]
        return _oriented(module)[slice(None) if rows is None else rows].detach().float()

    def base_bias(self, target: str) -> torch.Tensor | None:
        """The backbone's bias [W] of one target, float32, if it has one."""
        module, rows, _ = self.layer_sites.linears[target]
        bias: Any = module.bias
        return None if bias is None else bias[slice(None) if rows is None else rows].detach().float()

    def inputs(self, target: str) -> int:
        """How many inputs a target has."""
        return inputs_of(self.layer_sites.linears[target].module)

    def _add_up(
        self, cuts: Cuts, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        changed: torch.Tensor | None = None
        for name in self.live():
            for target, rows in cuts:
                rows = slice(None) if rows is None else rows
                if target not in self.configs[name].targets:
                    continue
                added = self.delta(name, target, args[0].float(), output[..., rows])
                if added is not None:
                    changed = output.float().clone() if changed is None else changed
                    changed[..., rows] = changed[..., rows] + added
        return None if changed is None else changed.to(output.dtype)


class DeltaTuner(BlockTuner):
    """Puts DeltaLayers into the blocks. Its config has `targets`; with `no_merge`, no weight can hold its δ."""

    no_merge: ClassVar[str] = ""

    def check(self, config: Any, architecture: Architecture) -> None:
        """Raise ConfigError for targets that the backbone lacks."""
        linears = architecture.layers[0].linears
        if missing := [target for target in config.targets if target not in linears]:
            raise ConfigError(
                f"targets: this backbone has no {', '.join(missing)}; choose from {', '.join(linears)}",
                param="targets",
            )

    def add(self, block: nn.Module, index: int, adapter_name: str, config: Any) -> None:
        """Give the block a layer if it has none, and the layer a fresh adapter."""
        if not hasattr(block, self.child):
            first = getattr(self._architecture.layers[0].block, self.child, None)
            layer_cls: Any = self.tuner_layer_cls
            setattr(block, self.child, layer_cls(index, self._architecture.layers[index], first))
        getattr(block, self.child).update_layer(adapter_name, config)

    @torch.no_grad()
    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
            for layer in self.layers():
                for name in layer.live():
                    for target in layer.configs[name].targets:
                        _change_weight(layer, target, layer.weight_change(name, target))
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        if self.no_merge:
            super()._check_merge_allowed()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ConfigError: what is merged cannot be taken apart without rounding."""
        self._check_merge_allowed()
        raise ConfigError("merge: these changes are merged for good; use merge_and_unload")


def inputs_of(module: nn.Module) -> int:
    """How many inputs a linear has."""
    inputs: int = getattr(module, "in_features" if hasattr(module, "in_features") else "nx")  # transformers' Conv1D
    return inputs


def _oriented(module: Any) -> torch.Tensor:
    """A linear's weight as [W, in]: GPT-2's Conv1D has it the other way round."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _change_weight(layer: DeltaLayer, target: str, change: torch.Tensor) -> None:
    module, rows, _ = layer.layer_sites.linears[target]
    weight = _oriented(module)
    rows = slice(None) if rows is None else rows
    weight[rows] = (weight[rows].float() + change).to(weight.dtype)
