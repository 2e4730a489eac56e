"""Constant vectors as a PEFT tuner: a ConstantLayer in each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pedro.errors import ConfigError
from pedro.methods.blocks import BlockTuner
from pedro.methods.constants.layer import ConstantLayer

if TYPE_CHECKING:
    from pedro.methods.architectures import Architecture
    from pedro.methods.constants.config import ConstantConfig

CHILD = "vectors"


class ConstantModel(BlockTuner):
    """The tuner that PEFT builds for a ConstantConfig. Scales merge into the weights; shifts do not."""

    prefix = "constant_"
    tuner_layer_cls = ConstantLayer
    child = CHILD
    packs = shares_beginnings = True
    no_merge = "a linear without a bias, as most backbones have, can hold no shift"

    def check(self, config: ConstantConfig, architecture: Architecture) -> None:
        """Raise ConfigError for targets that the backbone lacks."""
        linears = architecture.layers[0].linears
        for name, targets in (("scale", config.scale), ("shift", config.shift)):
            if missing := [target for target in targets if target not in linears]:
                raise ConfigError(
                    f"{name}: this backbone has no {', '.join(missing)}; choose from {', '.join(linears)}", param=name
                )

    def add(self, block: nn.Module, index: int, adapter_name: str, config: ConstantConfig) -> None:
        """Give the block a ConstantLayer if it has none, and the layer a fresh adapter."""
        if not hasattr(block, CHILD):
            setattr(block, CHILD, ConstantLayer(index, self._architecture.layers[index]))
        getattr(block, CHILD).update_layer(adapter_name, config)

    @torch.no_grad()
    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
            for layer in self.layers():
                for name in layer.live():
                    _scale_weights(layer, name)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        if any(getattr(self.peft_config[name], "shift", ()) for name in self.active_adapters):
            super()._check_merge_allowed()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ConfigError: what is merged cannot be taken apart without rounding."""
        self._check_merge_allowed()
        raise ConfigError("merge: constant vectors are merged for good; use merge_and_unload")


def _scale_weights(layer: ConstantLayer, adapter_name: str) -> None:
    """Multiply the rows of weights and biases by one adapter's scales."""
    scales, _ = layer.vectors(adapter_name)
    for target, vector in scales.items():
        module: Any
        module, rows, _ = layer.layer_sites.linears[target]
        rows = slice(None) if rows is None else rows
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # [W, in]
        weight[rows] = (weight[rows].float() * vector[:, None]).to(weight.dtype)
        if module.bias is not None:
            module.bias[rows] = (module.bias[rows].float() * vector).to(module.bias.dtype)
